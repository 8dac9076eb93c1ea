"""Drift-AR on the masked autoencoder of MAR."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .drift_stage import DriftStage
from .layers import LAYER_NORM_EPS, TransformerBlock
from .mar_backbone import MARBackbone


class DriftARMAR(DriftStage):
    """Drift-AR whose features are those of a MAR with every position masked.

    Args:
        backbone: owned by the model from now on (pass a copy to keep the original untouched).
        drift_depth, drift_num_heads: blocks and heads of the decoder; its width is the backbone's.
        draft_depth, draft_num_heads: the draft model.
        mlp_ratio: of decoder and draft.
        dropout: of decoder and draft, in training only.
        draft_eps: LayerNorm eps of the draft model.
        sigma_max, tau_sigma: the prior (Eq. 6).

    ``config`` holds these arguments and the backbone's under "backbone".
    """

    name: str = "drift_ar_mar"

    def __init__(
        self,
        backbone: MARBackbone,
        *,
        drift_depth: int = 12,
        drift_num_heads: int = 12,
        draft_depth: int = 6,
        draft_num_heads: int = 12,
        mlp_ratio: float = 4.0,
        dropout: float = 0.1,
        draft_eps: float = LAYER_NORM_EPS,
        sigma_max: float = 0.5,
        tau_sigma: float = 2.0,
    ) -> None:
        super().__init__()
        options: dict[str, Any] = {
            "drift_depth": drift_depth,
            "drift_num_heads": drift_num_heads,
            "draft_depth": draft_depth,
            "draft_num_heads": draft_num_heads,
            "mlp_ratio": mlp_ratio,
            "dropout": dropout,
            "draft_eps": draft_eps,
            "sigma_max": sigma_max,
            "tau_sigma": tau_sigma,
        }
        self.config: dict[str, Any] = {"backbone": dict(backbone.config), **options}
        self.backbone = backbone
        self.seq_len, self.token_channels = backbone.seq_len, backbone.token_channels
        self.num_classes = backbone.num_classes
        self._build_stage(width=backbone.width, drift_width=backbone.width, **options)

    def condition(self, class_labels: Tensor) -> Tensor:
        """Condition vectors ``[B, D]`` of int labels ``[B]``; -1 is unconditional."""
        return self.backbone.condition(class_labels)

    def features(self, condition: Tensor) -> tuple[Tensor, Tensor]:
        """One AR pass: condition ``[B, D]`` to z ``[B, L, D]`` and entropy ``[B, L]`` (Eq. 4)."""
        return self.backbone.entropy_features(condition)

    def patchify(self, latents: Tensor) -> Tensor:
        """Latents ``[B, C, h, w]`` to tokens ``[B, L, C p p]``."""
        return self.backbone.patchify(latents)

    def unpatchify(self, tokens: Tensor) -> Tensor:
        """Tokens ``[B, L, C p p]`` to latents ``[B, C, h, w]``."""
        return self.backbone.unpatchify(tokens)

    @property
    def penultimate_block(self) -> TransformerBlock:
        """The backbone's block before the last."""
        return self.backbone.penultimate_block

    @property
    def draft_source(self) -> tuple[list[TransformerBlock], nn.LayerNorm]:
        """The backbone's blocks and norm."""
        return self.backbone.draft_source
