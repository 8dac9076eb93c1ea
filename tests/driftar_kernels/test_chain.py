"""Speculative sampling along a chain of Gaussians: what it emits follows the target."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor

from driftar_kernels import ChainVerdict, verify_chain
from tests.helpers.inputs import LAYOUTS, MANY, Chain, chain, generator, in_layout
from tests.helpers.interpreter import size
from tests.helpers.tolerance import assert_bitwise

LEAST_P = 1e-5  # hundreds of tests; n = 20,000 still shows a distribution function wrong by 0.02


def emitted(inputs: Chain, verdict: ChainVerdict, position: int) -> Tensor:
    """What stands at ``position`` wherever it is reached: an accepted draft or the next sample."""
    reached = verdict.length >= position
    length = verdict.length[reached]
    if position == inputs.draft.shape[1]:
        return verdict.next_sample[reached]
    kept = inputs.draft[reached, position]
    return torch.where((length > position)[:, None], kept, verdict.next_sample[reached])


def assert_normal(sample: Tensor, mean: float, std: float) -> None:
    """Kolmogorov-Smirnov for each coordinate and for the radius, which sees dependence."""
    assert len(sample) > 500
    standard = ((sample.double() - mean) / std).cpu().numpy()
    for column in standard.T:
        assert stats.kstest(column, "norm").pvalue > LEAST_P
    radius = (standard**2).sum(1)
    assert stats.kstest(radius, "chi2", args=(standard.shape[1],)).pvalue > LEAST_P


@pytest.mark.parametrize("dim", [1, 2, 5])
@pytest.mark.parametrize(
    ("draft", "target"),
    [
        ((0.0, 1.0), (0.0, 1.0)),
        ((0.0, 1.0), (0.8, 1.0)),
        ((0.0, 1.0), (0.5, 0.6)),
        ((0.3, 0.5), (0.0, 1.0)),
        ((0.0, 1.0), (4.0, 0.5)),
    ],
    ids=["same", "shifted", "narrower", "wider", "far"],
)
def test_emitted_vectors_follow_the_target(
    backend: str, draft: tuple[float, float], target: tuple[float, float], dim: int
) -> None:
    inputs = chain(
        [draft[0], draft[0]],
        [draft[1], draft[1]],
        [target[0], target[0] + 0.3, -1.0],
        [target[1], target[1], 0.7],
        dim=dim,
    )
    verdict = verify_chain(*inputs, generator=generator(7))
    assert_normal(emitted(inputs, verdict, 0), *target)
    for position, mean, std in ((1, target[0] + 0.3, target[1]), (2, -1.0, 0.7)):
        sample = emitted(inputs, verdict, position)
        if len(sample) > 500:
            assert_normal(sample, mean, std)


@pytest.mark.parametrize("dim", [1, 768, size(4096, 1024)])
def test_acceptance_rate_is_the_overlap(backend: str, dim: int) -> None:
    """Equal spreads, means 1 std apart: min(p, q) integrates to 2 Phi(-1/2), in any dimension.

    A density in fp32 underflows long before D = 768; a ratio in log space does not.
    """
    batch = min(MANY, size(2_400_000, 600_000) // dim)
    shift = 1.0 / math.sqrt(dim)
    inputs = chain([0.0], [1.0], [shift, 0.0], [1.0, 1.0], dim=dim, batch=batch)
    verdict = verify_chain(*inputs, generator=generator(3))
    rate = float((verdict.length == 1).double().mean())
    expected = 2 * stats.norm.cdf(-0.5)
    assert abs(rate - expected) < 4 * math.sqrt(expected * (1 - expected) / batch)
    assert bool(verdict.next_sample.isfinite().all())
    along = emitted(inputs, verdict, 0).sum(1, keepdim=True) / math.sqrt(dim)
    assert_normal(along, 1.0, 1.0)


@pytest.mark.parametrize("std", [1e-3, 1.0, 1e3])
def test_the_scale_of_the_data_does_not_matter(backend: str, std: float) -> None:
    inputs = chain([0.0], [std], [std, 0.0], [std, std], dim=1)
    verdict = verify_chain(*inputs, generator=generator(3))
    rate = float((verdict.length == 1).double().mean())
    assert abs(rate - 2 * stats.norm.cdf(-0.5)) < 0.014
    assert_normal(emitted(inputs, verdict, 0), std, std)


def test_equal_distributions_accept_everything(backend: str) -> None:
    """The ratio is exactly 1 and every u in [0, 1) is below it."""
    inputs = chain(
        [0.2, -0.4, 3.0], [0.5, 1e-3, 7.0], [0.2, -0.4, 3.0, 1.0], [0.5, 1e-3, 7.0, 2.0], dim=64
    )
    verdict = verify_chain(*inputs, generator=generator(5))
    assert bool((verdict.length == 3).all())
    assert_normal(verdict.next_sample[:, :3], 1.0, 2.0)


def test_hopeless_drafts_are_never_accepted(backend: str) -> None:
    """A ratio that underflows to 0 is not accepted, not even by u = 0."""
    inputs = chain([0.0], [1.0], [60.0, 0.0], [1.0, 1.0], dim=8)
    verdict = verify_chain(*inputs, generator=generator(5))
    assert not verdict.length.any()
    assert_normal(verdict.next_sample, 60.0, 1.0)


def test_first_rejection_ends_the_chain(backend: str) -> None:
    """Accepted, rejected for sure, accepted for sure: the length is 1."""
    inputs = chain(
        [0.0, 0.0, 0.0], [1.0, 1.0, 1.0], [0.0, 99.0, 0.0, 0.0], [1.0] * 4, dim=3, batch=50
    )
    verdict = verify_chain(*inputs)
    assert verdict.length.dtype == torch.int64
    assert verdict.length.tolist() == [1] * 50
    assert float((verdict.next_sample - 99).abs().max()) < 10


# -- standard deviations of 0 ---------------------------------------------------


def test_equal_point_masses_are_accepted(backend: str) -> None:
    inputs = chain([0.7, 0.0], [0.0, 0.0], [0.7, 0.0, 2.5], [0.0, 0.0, 0.0], dim=3, batch=4)
    verdict = verify_chain(*inputs)
    assert verdict.length.tolist() == [2] * 4
    assert torch.equal(verdict.next_sample, torch.full((4, 3), 2.5))


@pytest.mark.parametrize(
    ("draft_std", "target_mean", "target_std"),
    [(0.0, 0.1, 0.0), (1.0, 0.0, 0.0), (0.0, 0.0, 1.0), (0.0, 1e-7, 0.0)],
    ids=["other_point", "target_point", "draft_point", "almost_equal_points"],
)
def test_unequal_point_masses_are_rejected(
    backend: str, draft_std: float, target_mean: float, target_std: float
) -> None:
    """The target's own sample is emitted."""
    inputs = chain([0.0], [draft_std], [target_mean, 9.0], [target_std, 1.0], dim=2)
    verdict = verify_chain(*inputs, generator=generator(5))
    assert not verdict.length.any()
    if target_std == 0:
        assert torch.equal(verdict.next_sample, torch.full((MANY, 2), target_mean))
    else:
        assert_normal(verdict.next_sample, target_mean, target_std)


def test_point_masses_that_differ_in_one_coordinate(backend: str) -> None:
    inputs = chain([0.0], [0.0], [0.0, 1.0], [0.0, 0.0], dim=70, batch=3)
    inputs.target_mean[1, 0, 69] = 0.5
    verdict = verify_chain(*inputs)
    assert verdict.length.tolist() == [1, 0, 1]
    assert torch.equal(verdict.next_sample[1], inputs.target_mean[1, 0])


def test_a_draft_beside_its_own_point_mass_is_rejected(backend: str) -> None:
    """Accepting it would emit a vector that the target cannot produce."""
    inputs = chain([0.0], [0.0], [0.0, 1.0], [0.0, 0.0], dim=70, batch=3)
    inputs.draft[1, 0, 69] = 0.5
    verdict = verify_chain(*inputs)
    assert verdict.length.tolist() == [1, 0, 1]
    assert torch.equal(verdict.next_sample[1], torch.zeros(70))


# -- non-finite data --------------------------------------------------------------


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("which", ["draft", "draft_mean", "target_mean"])
def test_non_finite_positions_are_rejected(backend: str, which: str, poison: float) -> None:
    """Of three sure acceptances, the second of one sample holds one bad number."""
    inputs = chain([0.0] * 3, [1.0] * 3, [0.0] * 4, [1.0] * 4, dim=33, batch=6)
    getattr(inputs, which)[2, 1, 32] = poison
    verdict = verify_chain(*inputs)
    assert verdict.length.tolist() == [3, 3, 1, 3, 3, 3]
    others = torch.arange(6) != 2
    assert bool(verdict.next_sample[others].isfinite().all())
    if which != "target_mean":
        assert bool(verdict.next_sample.isfinite().all())


@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("which", ["draft_std", "target_std"])
def test_bad_standard_deviations(backend: str, which: str, value: float) -> None:
    inputs = chain([0.0, 0.0], [1.0, 1.0], [0.0] * 3, [1.0] * 3, batch=3)
    getattr(inputs, which)[1, 1] = value
    with pytest.raises(ValueError, match=which):
        verify_chain(*inputs)


# -- form -------------------------------------------------------------------------


def test_reproducible(backend: str) -> None:
    inputs = chain([0.0] * 3, [1.0] * 3, [0.5] * 4, [0.8] * 4, dim=4, batch=64)

    def equal(left: ChainVerdict, right: ChainVerdict) -> bool:
        return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))

    first = verify_chain(*inputs, generator=generator(11))
    assert equal(first, verify_chain(*inputs, generator=generator(11)))
    assert not equal(first, verify_chain(*inputs, generator=generator(12)))
    shared = generator(11)
    assert equal(first, verify_chain(*inputs, generator=shared))
    assert not equal(first, verify_chain(*inputs, generator=shared))
    torch.manual_seed(4)
    default = verify_chain(*inputs)
    assert not equal(default, verify_chain(*inputs))
    torch.manual_seed(4)
    assert equal(default, verify_chain(*inputs))


def test_samples_of_a_batch_are_independent(backend: str) -> None:
    inputs = chain([60.0], [1.0], [0.0, 0.0], [1.0, 1.0], dim=2)
    sample = verify_chain(*inputs, generator=generator(2)).next_sample
    assert len(sample.unique()) > 0.99 * sample.numel()
    for lag in (1, 2, 64):
        assert abs(float((sample[lag:] * sample[:-lag]).mean())) < 5 / math.sqrt(2 * MANY)
    assert abs(float((sample[:, 0] * sample[:, 1]).mean())) < 5 / math.sqrt(MANY)


def test_dtypes(backend: str, dtype: torch.dtype) -> None:
    inputs = Chain(*(t.to(dtype) for t in chain([0.0], [1.0], [0.5, 0.0], [1.0, 1.0], dim=2)))
    verdict = verify_chain(*inputs, generator=generator(7))
    assert verdict.next_sample.dtype == torch.float32
    assert bool(verdict.next_sample.isfinite().all())
    overlap = 2 * stats.norm.cdf(-math.sqrt(0.5) / 2)
    assert abs(float(verdict.length.double().mean()) - overlap) < 0.02


def test_fp64(backend: str) -> None:
    inputs = Chain(*(t.double() for t in chain([0.0], [1.0], [0.5, 0.0], [1.0, 1.0], batch=9)))
    try:
        verdict = verify_chain(*inputs)
    except TypeError:
        assert backend != "reference"
        return
    assert verdict.next_sample.dtype in (torch.float32, torch.float64)


def test_layouts_do_not_matter(backend: str) -> None:
    inputs = chain([0.0] * 3, [1.0] * 3, [0.5] * 4, [0.8] * 4, dim=6, batch=16)
    copies = [t.clone() for t in inputs]
    plain = verify_chain(*inputs, generator=generator(1))
    for how in LAYOUTS:
        other = verify_chain(*(in_layout(t, how) for t in inputs), generator=generator(1))
        assert_bitwise(plain, other)
    assert_bitwise(inputs, copies)


def test_empty_chain_and_batch(backend: str) -> None:
    inputs = chain([0.0], [1.0], [3.0], [0.5])
    inputs = inputs._replace(
        draft=inputs.draft[:, :0],
        draft_mean=inputs.draft_mean[:, :0],
        draft_std=inputs.draft_std[:, :0],
    )
    verdict = verify_chain(*inputs, generator=generator(1))
    assert not verdict.length.any()
    assert_normal(verdict.next_sample, 3.0, 0.5)
    none = verify_chain(*(t[:0] for t in chain([0.0], [1.0], [0.0] * 2, [1.0] * 2, dim=3, batch=2)))
    assert none.length.shape == (0,) and none.next_sample.shape == (0, 3)


@pytest.mark.parametrize(
    ("change", "error", "argument"),
    [
        ({"draft": torch.randn(2, 4)}, ValueError, "draft"),
        ({"draft_mean": torch.randn(2, 4, 4)}, ValueError, "draft_mean"),
        ({"draft_mean": torch.randn(2, 3, 5)}, ValueError, "draft_mean"),
        ({"draft_std": torch.ones(2, 4)}, ValueError, "draft_std"),
        ({"draft_std": torch.ones(2, 3, 1)}, ValueError, "draft_std"),
        ({"target_mean": torch.randn(2, 3, 4)}, ValueError, "target_mean"),
        ({"target_std": torch.ones(2, 3)}, ValueError, "target_std"),
        ({"target_std": torch.ones(1, 4)}, ValueError, "target_std"),
        ({"draft": torch.ones(2, 3, 4, dtype=torch.int64)}, TypeError, "draft"),
        ({"draft": [0.0]}, TypeError, "draft"),
        ({"target_mean": torch.empty(2, 4, 4, device="meta")}, ValueError, "target_mean"),
        ({"generator": 3}, TypeError, "generator"),
    ],
)
def test_bad_input(
    backend: str, change: dict[str, Any], error: type[Exception], argument: str
) -> None:
    arguments: dict[str, Any] = {
        "draft": torch.randn(2, 3, 4),
        "draft_mean": torch.randn(2, 3, 4),
        "draft_std": torch.ones(2, 3),
        "target_mean": torch.randn(2, 4, 4),
        "target_std": torch.ones(2, 4),
    }
    with pytest.raises(error, match=argument):
        verify_chain(**{**arguments, **change})
