"""What every Drift-AR (arXiv 2603.28049) has behind its AR pass: prior, one-step decoder, draft."""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn

import driftar_kernels
from driftar.decoding.draft import DraftModel

from .diffusion import Noise
from .drift_decoder import DriftDecoder
from .generation import (
    Generation,
    GenerationStats,
    Stopwatch,
    check_finite,
    latents_of,
    noise_source,
    sampling_dtype,
)
from .layers import TransformerBlock


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


class DriftStage(nn.Module):
    """Prior, one-step decoder, draft model and feature map on features with their entropy.

    The autoregressive side comes from the class that inherits this: it gives ``condition``,
    ``features``, ``patchify``, ``unpatchify``, ``penultimate_block`` and ``draft_source``, and
    calls :meth:`_build_stage` once its own weights exist.
    """

    seq_len: int
    token_channels: int
    num_classes: int
    feature_width: int

    def _build_stage(
        self,
        *,
        width: int,
        drift_width: int,
        drift_depth: int,
        drift_num_heads: int,
        draft_depth: int,
        draft_num_heads: int,
        mlp_ratio: float,
        dropout: float,
        draft_eps: float,
        sigma_max: float,
        tau_sigma: float,
    ) -> None:
        """Make the modules.

        Args:
            width: of the features.
            drift_width, drift_depth, drift_num_heads: the decoder.
            draft_depth, draft_num_heads: the draft model.
            mlp_ratio: of decoder and draft.
            dropout: of decoder and draft, in training only.
            draft_eps: LayerNorm eps of the draft model.
            sigma_max, tau_sigma: the prior (Eq. 6).
        """
        self.sigma_max, self.tau_sigma = sigma_max, tau_sigma
        self.feature_width = width
        self.enc_to_token_proj = nn.Linear(width, self.token_channels)
        self.token_to_enc_proj = nn.Linear(self.token_channels, width)
        self._initialise_projections()
        self.drift_decoder = DriftDecoder(
            seq_len=self.seq_len,
            token_channels=self.token_channels,
            context_width=width,
            width=drift_width,
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
        self.feature_encoder = FeatureEncoder(self.penultimate_block)
        self.initialise_copies()

    def condition(self, class_labels: Tensor) -> Tensor:
        """Condition vectors ``[B, D]`` of int labels ``[B]``; -1 is unconditional."""
        raise NotImplementedError

    def features(self, condition: Tensor) -> tuple[Tensor, Tensor]:
        """One AR pass: condition ``[B, D]`` to z ``[B, L, D]`` and entropy ``[B, L]`` (Eq. 4)."""
        raise NotImplementedError

    def patchify(self, latents: Tensor) -> Tensor:
        """Latents ``[B, C, h, w]`` to tokens ``[B, L, C p p]``."""
        raise NotImplementedError

    def unpatchify(self, tokens: Tensor) -> Tensor:
        """Tokens ``[B, L, C p p]`` to latents ``[B, C, h, w]``."""
        raise NotImplementedError

    @property
    def penultimate_block(self) -> TransformerBlock:
        """The target's block before the last, of which phi is a copy."""
        raise NotImplementedError

    @property
    def draft_source(self) -> tuple[list[TransformerBlock], nn.LayerNorm]:
        """Blocks and norm that the draft model starts from."""
        raise NotImplementedError

    def initialise_copies(self) -> None:
        """Make phi and the draft copies of the target's blocks: once its weights are loaded."""
        block = self.penultimate_block
        self.feature_encoder.block.load_state_dict(block.state_dict())
        self.draft_model.copy_from(*self.draft_source)

    def _initialise_projections(self) -> None:
        nn.init.xavier_uniform_(self.enc_to_token_proj.weight)
        nn.init.zeros_(self.enc_to_token_proj.bias)
        # An isometry up to its gain, which gives features of the tokens' own magnitude: no
        # direction of token space is lost on the way into phi.
        gain = math.sqrt(self.token_to_enc_proj.out_features / self.token_channels)
        nn.init.orthogonal_(self.token_to_enc_proj.weight, gain=gain)
        nn.init.zeros_(self.token_to_enc_proj.bias)

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
        draw = noise_source(noise, generator, z.device, sampling_dtype(z.dtype))
        shared = draw((batch, self.seq_len, self.token_channels))
        latents = self.render(z, z, entropy, shared, cfg)
        stats.decoder_seconds = watch.lap()
        stats.decoder_nfe = 1
        stats.total_seconds = stats.ar_seconds + stats.decoder_seconds
        return Generation(latents, entropy[:batch], stats)

    generate = latents_of(generate_with_stats)

    def render(
        self, source: Tensor, context: Tensor, entropy: Tensor, noise: Tensor, cfg: float
    ) -> Tensor:
        """Prior, one decoder evaluation and guidance: latents ``[B, C, h, w]``.

        Args:
            source: features ``[b, L, D]`` of the prior's mean; b = B, or 2 B with guidance (cfg
                other than 1): conditional ones, then unconditional ones.
            context: features ``[b, L, D]`` that the decoder sees.
            entropy: ``[b, L]``.
            noise: ``[B, L, C]``, shared by both branches.
            cfg: weight w of ``u + w (c - u)``.
        """
        draws = noise.to(source.dtype)
        if cfg == 1.0:
            return self.unpatchify(
                self.decode(self.prior(source, entropy, draws), context, entropy)
            )
        x0 = self.prior(source, entropy, draws.repeat(2, 1, 1))
        conditional, unconditional = self.decode(x0, context, entropy).chunk(2)
        return self.unpatchify(unconditional + cfg * (conditional - unconditional))
