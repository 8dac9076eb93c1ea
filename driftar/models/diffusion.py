"""Gaussian diffusion of single tokens with a learned variance: schedule, loss, ancestral sampler.

Improved DDPM (arXiv 2102.09672) as MAR (arXiv 2406.11838) uses it: cosine schedule, 1000 training
steps, noise prediction, log variance interpolated between its two bounds.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

TRAIN_STEPS = 1000
MAX_BETA = 0.999

Noise = Callable[[tuple[int, ...]], Tensor]
Network = Callable[[Tensor, Tensor], Tensor]  # (x [N, C], original time steps [N]) -> [N, 2 C]


def cosine_betas(steps: int = TRAIN_STEPS) -> Tensor:
    """Noise variances ``[steps]`` of the cosine schedule, fp64."""

    def remaining(u: float) -> float:
        return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2

    return torch.tensor(
        [
            min(1 - remaining((i + 1) / steps) / remaining(i / steps), MAX_BETA)
            for i in range(steps)
        ],
        dtype=torch.float64,
    )


def space_timesteps(respacing: str, steps: int = TRAIN_STEPS) -> list[int]:
    """Training steps that a sampler keeps, ascending.

    Args:
        respacing: "" keeps all; "100" keeps 100 evenly spaced ones including both ends; "10,5"
            cuts the range into equal sections and keeps 10 of the first and 5 of the second.
        steps: length of the training schedule.

    Raises:
        ValueError: not a list of counts, none kept, or more steps asked for than a section has.
    """
    if respacing == "":
        return list(range(steps))
    try:
        counts = [int(part) for part in respacing.split(",")]
    except ValueError:
        raise ValueError(
            f"num_sampling_steps must be '' or counts such as '100' or '10,5', got {respacing!r}"
        ) from None
    if min(counts) < 0 or sum(counts) < 1:
        raise ValueError(f"num_sampling_steps must keep at least one step, got {respacing!r}")
    kept: list[int] = []
    start = 0
    for section, count in enumerate(counts):
        size = steps // len(counts) + (1 if section < steps % len(counts) else 0)
        if count > size:
            raise ValueError(
                f"num_sampling_steps asks for {count} steps of a section of {size} in {respacing!r}"
            )
        stride = (size - 1) / (count - 1) if count > 1 else 1.0
        position = 0.0
        for _ in range(count):
            # Python rounds half to even, and the sum accumulates: both as published.
            kept.append(start + round(position))
            position += stride
        start += size
    return kept


@dataclass(frozen=True)
class DiffusionSchedule:
    """Tables of a (respaced) diffusion process, fp64 ``[n]``; index 0 is the least noisy step.

    Attributes:
        timesteps: original training step of every kept step, int64: what the network is given.
    """

    timesteps: Tensor
    betas: Tensor
    alphas_cumprod: Tensor
    alphas_cumprod_prev: Tensor
    sqrt_recip_alphas_cumprod: Tensor
    sqrt_recipm1_alphas_cumprod: Tensor
    posterior_variance: Tensor
    posterior_log_variance_clipped: Tensor
    posterior_mean_coef1: Tensor
    posterior_mean_coef2: Tensor

    @classmethod
    def build(cls, respacing: str = "") -> DiffusionSchedule:
        """Schedule with the steps of :func:`space_timesteps`."""
        timesteps = torch.tensor(space_timesteps(respacing))
        kept = torch.cumprod(1 - cosine_betas(), 0)[timesteps]
        one = torch.ones(1, dtype=torch.float64)
        betas = 1 - kept / torch.cat([one, kept[:-1]])
        cumulative = torch.cumprod(1 - betas, 0)
        previous = torch.cat([one, cumulative[:-1]])
        variance = betas * (1 - previous) / (1 - cumulative)
        # The first posterior variance is 0; its logarithm borrows the second one.
        clipped = torch.cat([variance[1:2], variance[1:]]) if len(variance) > 1 else betas
        return cls(
            timesteps=timesteps,
            betas=betas,
            alphas_cumprod=cumulative,
            alphas_cumprod_prev=previous,
            sqrt_recip_alphas_cumprod=(1 / cumulative).sqrt(),
            sqrt_recipm1_alphas_cumprod=(1 / cumulative - 1).sqrt(),
            posterior_variance=variance,
            posterior_log_variance_clipped=clipped.log(),
            posterior_mean_coef1=betas * previous.sqrt() / (1 - cumulative),
            posterior_mean_coef2=(1 - previous) * (1 - betas).sqrt() / (1 - cumulative),
        )

    def __len__(self) -> int:
        return len(self.timesteps)

    def at(self, table: Tensor, index: Tensor | int, like: Tensor) -> Tensor:
        """Entries of a table as a column that broadcasts over ``like`` ``[N, C]``, in its dtype."""
        return table[index].to(device=like.device, dtype=like.dtype).reshape(-1, 1)

    def diffuse(self, x0: Tensor, index: Tensor, noise: Tensor) -> Tensor:
        """Sample of q(x_t | x0), ``[N, C]``."""
        cumulative = self.alphas_cumprod
        return (
            self.at(cumulative.sqrt(), index, x0) * x0
            + self.at((1 - cumulative).sqrt(), index, x0) * noise
        )

    def posterior_mean(self, x0: Tensor, x: Tensor, index: Tensor | int) -> Tensor:
        """Mean of q(x_{t-1} | x_t, x0)."""
        return (
            self.at(self.posterior_mean_coef1, index, x) * x0
            + self.at(self.posterior_mean_coef2, index, x) * x
        )

    def predict_x0(self, x: Tensor, noise: Tensor, index: Tensor | int) -> Tensor:
        """Data from x_t and its predicted noise; never clipped."""
        return (
            self.at(self.sqrt_recip_alphas_cumprod, index, x) * x
            - self.at(self.sqrt_recipm1_alphas_cumprod, index, x) * noise
        )

    def log_variance(self, interpolation: Tensor, index: Tensor | int) -> Tensor:
        """Learned log variance: (v + 1) / 2 of the way from the posterior's to log beta."""
        lower = self.at(self.posterior_log_variance_clipped, index, interpolation)
        upper = self.at(self.betas.log(), index, interpolation)
        fraction = (interpolation + 1) / 2
        return fraction * upper + (1 - fraction) * lower


def training_losses(
    schedule: DiffusionSchedule, network: Network, target: Tensor, index: Tensor, noise: Tensor
) -> tuple[Tensor, Tensor]:
    """Per-token noise error and variational term, ``[N]`` each; their sum is the loss.

    The variational term, in bits per dimension, trains the variance only: its mean is detached.

    Args:
        network: called once with the noised tokens and the original time steps.
        target: clean tokens ``[N, C]``.
        index: step of the schedule per token, int64 ``[N]``.
        noise: ``[N, C]``, standard normal.
    """
    x = schedule.diffuse(target, index, noise)
    predicted, interpolation = network(x, schedule.timesteps[index].to(x.device)).chunk(2, dim=-1)
    squared = (noise - predicted).square().mean(-1)

    mean = schedule.posterior_mean(schedule.predict_x0(x, predicted.detach(), index), x, index)
    log_variance = schedule.log_variance(interpolation, index)
    true_mean = schedule.posterior_mean(target, x, index)
    true_log_variance = schedule.at(schedule.posterior_log_variance_clipped, index, x)
    divergence = 0.5 * (
        log_variance
        - true_log_variance
        - 1
        + (true_log_variance - log_variance).exp()
        + (true_mean - mean).square() * (-log_variance).exp()
    )
    likelihood = -_discretised_log_likelihood(target, mean, 0.5 * log_variance)
    first = (index == 0).reshape(-1, 1).to(x.device)
    variational = torch.where(first, likelihood, divergence).mean(-1) / math.log(2)
    return squared, variational


def sample(
    schedule: DiffusionSchedule,
    network: Network,
    noise: Noise,
    *,
    rows: int,
    channels: int,
    guidance: float | None = None,
    temperature: float = 1.0,
    clip: float | None = None,
) -> Tensor:
    """Ancestral sampling of ``rows`` tokens, one network evaluation per step.

    With ``guidance`` the network's conditions are the rows' conditional ones followed by as many
    unconditional ones: it is evaluated on 2 ``rows`` tokens and its noise predictions are mixed.

    Args:
        noise: ``noise(shape)``: one draw ``[rows, C]``, then one per step (2 ``rows`` of them with
            guidance), including the last step, which does not use it.
        guidance: weight w of ``eps_u + w (eps_c - eps_u)``, or None.
        temperature: factor of the noise of every step.
        clip: bound of the predicted clean tokens' entries, for data of a known range; None (as MAR
            samples its unbounded latents) trusts the network even where 1/sqrt(alpha_bar) is 2e4.

    Returns:
        ``[rows, C]``: the conditional half with guidance.
    """
    x = noise((rows, channels))
    count = rows if guidance is None else 2 * rows
    for index in reversed(range(len(schedule))):
        fresh = noise((count, channels))
        if rows == 0:
            continue
        # Both halves start from the same tokens and only the first half's noise is ever used.
        doubled = x if guidance is None else torch.cat([x, x])
        time = schedule.timesteps[index].to(x.device).expand(count)
        predicted, interpolation = network(doubled, time).chunk(2, dim=-1)
        if guidance is not None:
            conditional, unconditional = predicted.chunk(2)
            predicted = unconditional + guidance * (conditional - unconditional)
            interpolation = interpolation[:rows]
        clean = schedule.predict_x0(x, predicted, index)
        if clip is not None:
            clean = clean.clamp(-clip, clip)
        mean = schedule.posterior_mean(clean, x, index)
        if index == 0:
            x = mean
        else:
            deviation = (0.5 * schedule.log_variance(interpolation, index)).exp()
            x = mean + deviation * temperature * fresh[:rows]
    return x


def _discretised_log_likelihood(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """Log-probability of x, in bins of half-width 1/255, under a Gaussian."""
    inverse = (-log_scale).exp()
    centred = x - mean
    upper = _normal_cdf(inverse * (centred + 1 / 255))
    lower = _normal_cdf(inverse * (centred - 1 / 255))
    floor = 1e-12
    inside = (upper - lower).clamp(min=floor).log()
    above = (1 - lower).clamp(min=floor).log()
    below = upper.clamp(min=floor).log()
    return torch.where(x < -0.999, below, torch.where(x > 0.999, above, inside))


def _normal_cdf(x: Tensor) -> Tensor:
    """The tanh approximation of the normal distribution function that the published loss uses."""
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
