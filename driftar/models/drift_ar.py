"""Drift-AR (arXiv 2603.28049): one AR pass, an entropy-shaped prior, one decoder evaluation."""

from __future__ import annotations

import copy
import math
from typing import Any, Protocol

import torch
from torch import Tensor, nn

import driftar_kernels
from driftar.decoding.draft import DraftModel

from .diffusion import Noise
from .drift_decoder import DriftDecoder
from .generation import Generation, GenerationStats, Stopwatch, check_finite, noise_source
from .layers import TransformerBlock


class EntropyBackbone(Protocol):
    """What Drift-AR needs of an autoregressive model (a module): features with their entropy."""

    seq_len: int
    token_channels: int
    width: int
    num_classes: int
    config: dict[str, Any]

    def condition(self, class_labels: Tensor) -> Tensor: ...

    def entropy_features(self, condition: Tensor) -> tuple[Tensor, Tensor]: ...

    def patchify(self, latents: Tensor) -> Tensor: ...

    def unpatchify(self, tokens: Tensor) -> Tensor: ...

    @property
    def penultimate_block(self) -> TransformerBlock: ...

    @property
    def draft_source(self) -> tuple[list[TransformerBlock], nn.LayerNorm]: ...


class FeatureEncoder(nn.Module):
    """phi: a frozen copy of the target's penultimate block, applied without a mask.

    Always in evaluation mode: :meth:`train` is ignored. (In the published training code a global
    ``train()`` reaches the copy and leaves dropout on in the map that is meant to be fixed.)
    """

    def __init__(self, block: TransformerBlock) -> None:
        super().__init__()
        self.block = copy.deepcopy(block)
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> FeatureEncoder:
        """Stay in evaluation mode, whatever ``mode`` says."""
        return super().train(False)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, L, D]`` to ``[B, L, D]``; gradients reach x, never the weights."""
        return self.block(x)


class DriftAR(nn.Module):
    """Drift-AR on an autoregressive backbone.

    Args:
        backbone: module that satisfies :class:`EntropyBackbone`; owned by the model from now on
            (pass a copy to keep the original untouched).
        drift_depth, drift_num_heads: blocks and heads of the decoder; its width is the backbone's.
        draft_depth, draft_num_heads: the draft model.
        mlp_ratio: of decoder and draft.
        dropout: of decoder and draft, in training only.
        draft_eps: LayerNorm eps of the draft model.
        sigma_max, tau_sigma: the prior (Eq. 6).

    ``config`` holds these arguments and the backbone's under "backbone".
    """

    name: str = "drift_ar"
    backbone: Any
    seq_len: int
    token_channels: int
    num_classes: int
    feature_width: int

    def __init__(
        self,
        backbone: nn.Module,
        *,
        drift_depth: int = 12,
        drift_num_heads: int = 12,
        draft_depth: int = 6,
        draft_num_heads: int = 12,
        mlp_ratio: float = 4.0,
        dropout: float = 0.1,
        draft_eps: float = 1e-6,
        sigma_max: float = 0.5,
        tau_sigma: float = 2.0,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.config: dict[str, Any] = {
            "backbone": dict(self.backbone.config),
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
        self.sigma_max, self.tau_sigma = sigma_max, tau_sigma
        width, channels = self.backbone.width, self.backbone.token_channels
        self.seq_len, self.token_channels = self.backbone.seq_len, channels
        self.num_classes = self.backbone.num_classes
        self.feature_width = width
        self.enc_to_token_proj = nn.Linear(width, channels)
        self.token_to_enc_proj = nn.Linear(channels, width)
        self._initialise_projections()
        self.drift_decoder = DriftDecoder(
            seq_len=self.seq_len,
            token_channels=channels,
            context_width=width,
            width=width,
            num_heads=drift_num_heads,
            depth=drift_depth,
            mlp_ratio=mlp_ratio,
            dropout=dropout,
        )
        self.draft_model = DraftModel(
            width,
            draft_num_heads,
            draft_depth,
            mlp_ratio=mlp_ratio,
            dropout=dropout,
            eps=draft_eps,
        )
        self.feature_encoder = FeatureEncoder(self.backbone.penultimate_block)
        self.initialise_copies()

    def initialise_copies(self) -> None:
        """Make phi and the draft copies of the backbone's blocks: once its weights are loaded."""
        block = self.backbone.penultimate_block
        self.feature_encoder.block.load_state_dict(block.state_dict())
        self.draft_model.copy_from(*self.backbone.draft_source)

    def _initialise_projections(self) -> None:
        nn.init.xavier_uniform_(self.enc_to_token_proj.weight)
        nn.init.zeros_(self.enc_to_token_proj.bias)
        # An isometry up to its gain, which gives features of the tokens' own magnitude: no
        # direction of token space is lost on the way into phi.
        gain = math.sqrt(self.token_to_enc_proj.out_features / self.token_channels)
        nn.init.orthogonal_(self.token_to_enc_proj.weight, gain=gain)
        nn.init.zeros_(self.token_to_enc_proj.bias)

    def condition(self, class_labels: Tensor) -> Tensor:
        """Condition vectors ``[B, D]`` of int labels ``[B]``; -1 is unconditional."""
        return self.backbone.condition(class_labels)

    def patchify(self, latents: Tensor) -> Tensor:
        """Latents ``[B, C, h, w]`` to tokens ``[B, L, C p p]``."""
        return self.backbone.patchify(latents)

    def unpatchify(self, tokens: Tensor) -> Tensor:
        """Tokens ``[B, L, C p p]`` to latents ``[B, C, h, w]``."""
        return self.backbone.unpatchify(tokens)

    def features(self, condition: Tensor) -> tuple[Tensor, Tensor]:
        """One AR pass: condition ``[B, D]`` to z ``[B, L, D]`` and entropy ``[B, L]`` (Eq. 4)."""
        return self.backbone.entropy_features(condition)

    def prior(self, z: Tensor, entropy: Tensor, noise: Tensor) -> Tensor:
        """Prior sample x0 ``[B, L, C]`` = W z + sigma(entropy) noise (Eqs. 6, 7)."""
        return driftar_kernels.entropy_prior(
            self.enc_to_token_proj(z),
            entropy,
            noise,
            sigma_max=self.sigma_max,
            tau=self.tau_sigma,
        )

    def decode(self, x0: Tensor, z: Tensor, entropy: Tensor | None) -> Tensor:
        """Tokens ``[B, L, C]`` from a prior sample: the one network evaluation of the decoder."""
        return self.drift_decoder(x0, z, entropy)

    def draft(self, z: Tensor) -> Tensor:
        """Draft predictions ``[B, L, D]``; row r predicts z at r + 1."""
        return self.draft_model(z)

    def phi(self, tokens: Tensor) -> Tensor:
        """Features ``[B, L, D]`` of tokens ``[B, L, C]`` in which the drift is measured."""
        return self.feature_encoder(self.token_to_enc_proj(tokens))

    def generate(self, class_labels: Tensor, **options: Any) -> Tensor:
        """Latents ``[B, C, h, w]``; arguments as :meth:`generate_with_stats`."""
        return self.generate_with_stats(class_labels, **options).latents

    @torch.no_grad()
    def generate_with_stats(
        self,
        class_labels: Tensor,
        *,
        cfg: float = 1.0,
        noise: Noise | None = None,
        generator: torch.Generator | None = None,
    ) -> Generation:
        """Sample images with one AR pass and one decoder evaluation.

        Args:
            class_labels: int ``[B]``, -1 = unconditional.
            cfg: guidance weight w; other than 1, tokens are u + w (c - u) of an unconditional and a
                conditional branch that share their noise and run side by side.
            noise: ``noise(shape) -> Tensor``, asked once for ``[B, L, C]``; replaces ``generator``.
            generator: source of randomness; torch's default one if None.

        Returns:
            :class:`Generation` with the conditional branch's entropy.

        Raises:
            TypeError, ValueError: an argument of a wrong type, shape or range.
        """
        check_finite("cfg", cfg)
        condition = self.condition(class_labels)
        watch, stats = Stopwatch(condition.device), GenerationStats()
        batch = condition.shape[0]
        guided = cfg != 1.0
        if guided:
            blank = self.condition(torch.full((batch,), -1))
            condition = torch.cat([condition, blank])
        z, entropy = self.features(condition)
        stats.ar_seconds = watch.lap()
        draw = noise_source(noise, generator, z.device, z.dtype)
        shared = draw((batch, self.seq_len, self.token_channels))
        x0 = self.prior(z, entropy, shared.repeat(2, 1, 1) if guided else shared)
        tokens = self.decode(x0, z, entropy)
        if guided:
            conditional, unconditional = tokens.chunk(2)
            tokens = unconditional + cfg * (conditional - unconditional)
        latents = self.unpatchify(tokens)
        stats.decoder_seconds = watch.lap()
        stats.decoder_nfe = 1
        stats.total_seconds = stats.ar_seconds + stats.decoder_seconds
        return Generation(latents, entropy[:batch], stats)
