from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from driftar.models import diffusion
from driftar.models.diffusion import DiffusionSchedule
from tests.driftar import golden

TABLES = (
    "betas",
    "alphas_cumprod",
    "alphas_cumprod_prev",
    "posterior_variance",
    "posterior_log_variance_clipped",
    "posterior_mean_coef1",
    "posterior_mean_coef2",
    "sqrt_recip_alphas_cumprod",
    "sqrt_recipm1_alphas_cumprod",
)


@pytest.mark.parametrize(("respacing", "tag"), [("", "T1000"), ("100", "T100"), ("10", "T10")])
def test_schedule_matches_published_tables(respacing: str, tag: str) -> None:
    numbers = golden.tensors("C_mar_diffusion_schedule")
    schedule = DiffusionSchedule.build(respacing)
    assert torch.equal(schedule.timesteps, numbers[f"{tag}_timestep_map"])
    for table in TABLES:
        torch.testing.assert_close(
            getattr(schedule, table), numbers[f"{tag}_{table}_f64"], rtol=1e-12, atol=0
        )


def test_sections_keep_their_own_steps() -> None:
    kept = diffusion.space_timesteps("8,0")
    assert len(kept) == 8
    assert kept[0] == 0
    assert kept[-1] == 499
    assert diffusion.space_timesteps("1") == [0]


@pytest.mark.parametrize("respacing", ["0", "1001", "ten", "-1", "10,", "501,1"])
def test_bad_respacing_is_named(respacing: str) -> None:
    with pytest.raises(ValueError, match="num_sampling_steps"):
        diffusion.space_timesteps(respacing)


def _exact_network(data: float) -> diffusion.Network:
    """The perfect noise prediction for data that is one point."""
    schedule = DiffusionSchedule.build()

    def network(x: Tensor, t: Tensor) -> Tensor:
        cumulative = schedule.alphas_cumprod[t].to(x.dtype)[:, None]
        noise = (x - cumulative.sqrt() * data) / (1 - cumulative).sqrt()
        return torch.cat([noise, torch.zeros_like(noise)], dim=1)

    return network


def test_sampler_recovers_a_point() -> None:
    generator = torch.Generator().manual_seed(0)
    sampled = diffusion.sample(
        DiffusionSchedule.build("50,0"),
        _exact_network(0.7),
        lambda shape: torch.randn(shape, generator=generator, dtype=torch.float64),
        rows=6,
        channels=3,
    )
    torch.testing.assert_close(sampled, torch.full((6, 3), 0.7, dtype=torch.float64))


def test_guidance_extrapolates_and_draws_doubled_noise() -> None:
    shapes: list[tuple[int, ...]] = []

    def noise(shape: tuple[int, ...]) -> Tensor:
        shapes.append(shape)
        return torch.zeros(shape)

    def network(x: Tensor, t: Tensor) -> Tensor:
        rows = len(x) // 2
        predicted = torch.cat([torch.full((rows, 2), 0.5), torch.full((rows, 2), 0.1)])
        return torch.cat([predicted, torch.zeros_like(predicted)], dim=1)

    schedule = DiffusionSchedule.build("1")
    sampled = diffusion.sample(schedule, network, noise, rows=3, channels=2, guidance=2.0)
    assert shapes == [(3, 2), (6, 2)]
    expected = -float(schedule.sqrt_recipm1_alphas_cumprod[0]) * (0.1 + 2.0 * 0.4)
    torch.testing.assert_close(sampled, torch.full((3, 2), expected))


def test_clip_bounds_the_result() -> None:
    sampled = diffusion.sample(
        DiffusionSchedule.build("5"),
        lambda x, t: torch.zeros(len(x), 4),
        torch.randn,
        rows=8,
        channels=2,
        clip=1.0,
    )
    assert float(sampled.abs().max()) <= 1


def test_no_rows_draw_noise_but_evaluate_nothing() -> None:
    calls: list[tuple[int, ...]] = []

    def noise(shape: tuple[int, ...]) -> Tensor:
        calls.append(shape)
        return torch.zeros(shape)

    def network(x: Tensor, t: Tensor) -> Tensor:
        raise AssertionError("evaluated")

    sampled = diffusion.sample(
        DiffusionSchedule.build("3"), network, noise, rows=0, channels=2, guidance=1.5
    )
    assert sampled.shape == (0, 2)
    assert calls == [(0, 2)] * 4


def test_first_step_uses_the_discretised_likelihood() -> None:
    """At step 0 a prediction of exactly the data costs the width of its bin, not a divergence."""
    schedule = DiffusionSchedule.build()
    target, noise = torch.tensor([[0.25]]), torch.tensor([[0.3]])
    index = torch.zeros(1, dtype=torch.long)
    x = schedule.diffuse(target, index, noise)

    def network(x: Tensor, t: Tensor) -> Tensor:
        return torch.cat([noise, -torch.ones_like(noise)], dim=1)

    squared, variational = diffusion.training_losses(schedule, network, target, index, noise)
    deviation = math.exp(0.5 * float(schedule.posterior_log_variance_clipped[0]))
    inside = torch.distributions.Normal(0.0, deviation)
    mass = 2 * float(inside.cdf(torch.tensor(1 / 255))) - 1
    assert float(squared) == 0
    assert float(variational) == pytest.approx(-math.log2(mass), abs=2e-3)
    assert x.shape == target.shape
