"""The published speculative decoding of Drift-AR: drafted features where the target agrees."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from driftar.models.diffusion import Noise
from driftar.models.drift_stage import DriftStage
from driftar.models.generation import check_finite, noise_source, sampling_dtype

from .early_stopping import EntropyTracker


class SpeculativeGeneration(NamedTuple):
    """Result of :func:`speculative_generate`.

    Attributes:
        latents: ``[B, C, h, w]``.
        distance: ``[B, L]``, Euclidean distance of drafted and target features.
        accepted: bool ``[B, L]``, where the drafted features were used.
        accepted_lengths: int64 ``[B]``, of the accepted prefixes.
        draft_entropy: ``[B, L]``, of the draft's last block.
        early_stop: whether the draft's mean entropy fell below both thresholds.
    """

    latents: Tensor
    distance: Tensor
    accepted: Tensor
    accepted_lengths: Tensor
    draft_entropy: Tensor
    early_stop: bool


@torch.no_grad()
def speculative_generate(
    model: DriftStage,
    class_labels: Tensor,
    *,
    threshold: float = 0.1,
    cfg: float = 1.0,
    tracker: EntropyTracker | None = None,
    noise: Noise | None = None,
    generator: torch.Generator | None = None,
) -> SpeculativeGeneration:
    """Sample images from the draft's features wherever they are near the target's.

    One round of the published procedure. It runs the target on all positions first and compares
    row r of the draft with z at r, although the draft is trained to predict r + 1; it saves no time
    and is here as the reference of what was published. The published loop repeats this up to four
    times, until ``early_stop``, and keeps the last round's image.

    Args:
        class_labels: int ``[B]``, -1 = unconditional.
        threshold: distance below which a drafted position is accepted.
        cfg: guidance weight. With one (other than 1) the drafted features shape the conditional
            prior only and the decoder sees the target's.
        tracker: running statistics, updated with the target's entropies; fresh ones if None.
        noise: ``noise(shape) -> Tensor``, asked once for ``[B, L, C]``; replaces ``generator``.
        generator: source of randomness; torch's default one if None.

    Raises:
        TypeError, ValueError: an argument of a wrong type, shape or range.
    """
    check_finite("cfg", cfg)
    check_finite("threshold", threshold)
    tracker = EntropyTracker() if tracker is None else tracker
    condition = model.condition(class_labels)
    z, entropy = model.features(condition)
    drafted, draft_entropy = model.draft_model.with_entropy(z)
    distance = (drafted - z).norm(dim=-1)
    accepted = distance < threshold
    merged = torch.where(accepted[..., None], drafted, z)
    tracker.update(entropy)
    draw = noise_source(noise, generator, z.device, sampling_dtype(z.dtype))
    fresh = draw((z.shape[0], model.seq_len, model.token_channels))
    source = context = merged
    if cfg != 1.0:
        blank = torch.full_like(class_labels, -1)
        z_blank, entropy_blank = model.features(model.condition(blank))
        source, context = torch.cat([merged, z_blank]), torch.cat([z, z_blank])
        entropy = torch.cat([entropy, entropy_blank])
    return SpeculativeGeneration(
        latents=model.render(source, context, entropy, fresh, cfg),
        distance=distance,
        accepted=accepted,
        accepted_lengths=accepted.long().cumprod(1).sum(1),
        draft_entropy=draft_entropy,
        early_stop=tracker.stops(float(draft_entropy.mean())),
    )
