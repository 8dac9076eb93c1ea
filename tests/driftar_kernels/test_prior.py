"""Eq. 6 and Eq. 7: the entropy-parameterised prior."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from hypothesis import given
from hypothesis import strategies as st

from driftar_kernels import entropy_prior, entropy_to_sigma
from tests.helpers import oracle
from tests.helpers.inputs import golden, normal
from tests.helpers.interpreter import size
from tests.helpers.tolerance import assert_close_to_truth


def test_published_values(backend: str) -> None:
    numbers = golden("B_entropy_functions")
    rows = numbers["params_sigmamax_tau_Emax"].tolist()
    for (sigma_max, tau, entropy_max), expected in zip(rows, numbers["sigma"], strict=True):
        found = entropy_to_sigma(
            numbers["E"][0], sigma_max=sigma_max, tau=tau, entropy_max=entropy_max
        )
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    "name", ["B_entropy_buffered_00_B2H4b8N24D16", "B_entropy_buffered_01_B1H2b4N64D32"]
)
def test_published_sigma_of_published_entropy(backend: str, name: str) -> None:
    numbers = golden(name)
    found = entropy_to_sigma(numbers["entropy"])
    torch.testing.assert_close(found, numbers["sigma"], rtol=1e-5, atol=1e-7)


@given(
    sigma_max=st.floats(0, 10, width=32),
    tau=st.floats(0.0625, 50, width=32) | st.floats(-50, -0.0625, width=32),
    entropy_max=st.floats(0.015625, 8, width=32),
)
def test_formula(backend: str, sigma_max: float, tau: float, entropy_max: float) -> None:
    entropy = torch.linspace(-0.5, 1.5, 41) * entropy_max
    keywords = {"sigma_max": sigma_max, "tau": tau, "entropy_max": entropy_max}
    found = entropy_to_sigma(entropy, **keywords)
    truth = oracle.sigma(entropy, **keywords)
    # exp(E/tau) - 1 in fp32: the argument's rounding is amplified by its size.
    steepness = 1 + entropy_max / abs(tau)
    assert_close_to_truth(found, truth, floor=4 * 2.0**-23 * steepness * sigma_max)
    assert found.dtype == torch.float32
    assert bool((found >= 0).all()) and bool((found <= sigma_max).all())
    assert not found[:10].any()
    torch.testing.assert_close(found[-1], torch.tensor(sigma_max), rtol=1e-6, atol=0)


def test_small_entropies_do_not_cancel(backend: str) -> None:
    """exp(x) - 1 for x near 1e-6 keeps its digits."""
    entropy = torch.tensor([1e-6, 1e-4, 1e-3])
    torch.testing.assert_close(
        entropy_to_sigma(entropy), oracle.sigma(entropy).float(), rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 0, 4), (2, 3, 4, 5)])
def test_shapes(backend: str, shape: tuple[int, ...]) -> None:
    entropy = torch.rand(shape)
    assert entropy_to_sigma(entropy).shape == shape
    mean = torch.randn(*shape, 6)
    assert entropy_prior(mean, entropy, torch.randn(*shape, 6)).shape == mean.shape


def test_dtypes(backend: str, dtype: torch.dtype) -> None:
    entropy, mean, noise = (
        torch.rand(4, 5),
        normal(4, 5, 6, seed=1, dtype=dtype),
        normal(4, 5, 6, seed=2, dtype=dtype),
    )
    assert entropy_to_sigma(entropy.to(dtype)).dtype == torch.float32
    sample = entropy_prior(mean, entropy, noise)
    assert sample.dtype == dtype
    truth = mean.double() + oracle.sigma(entropy)[..., None] * noise.double()
    plain = mean + oracle.sigma(entropy).to(dtype)[..., None] * noise
    assert_close_to_truth(sample, truth, plain)


def test_nan_entropy_shows(backend: str) -> None:
    found = entropy_to_sigma(torch.tensor([0.5, math.nan, 1.0]))
    assert found.isnan().tolist() == [False, True, False]


def test_strides(backend: str) -> None:
    entropy = torch.rand(5, 4).t()
    mean, noise = torch.randn(5, 4, 6).transpose(0, 1), torch.randn(1, 1, 6).expand(4, 5, 6)
    found = entropy_prior(mean, entropy, noise)
    expected = entropy_prior(mean.contiguous(), entropy.contiguous(), noise.contiguous())
    assert torch.equal(found, expected)


@pytest.mark.parametrize("tau", [2.0, 0.3, -1.5])
def test_gradients(backend: str, tau: float) -> None:
    entropy = torch.linspace(0.02, 0.98, 12).reshape(3, 4)
    inputs = (normal(3, 4, 5, seed=1), entropy, normal(3, 4, 5, seed=2))
    weight = normal(3, 4, 5, seed=3)
    leaves = tuple(t.clone().requires_grad_() for t in inputs)
    sample = entropy_prior(*leaves, tau=tau)
    found = torch.autograd.grad((sample * weight).sum(), leaves)
    exact = tuple(t.double().requires_grad_() for t in inputs)
    truth = exact[0] + oracle.sigma(exact[1], tau=tau)[..., None] * exact[2]
    expected = torch.autograd.grad((truth * weight).sum(), exact)
    for left, right in zip(found, expected, strict=True):
        torch.testing.assert_close(left.double(), right, rtol=1e-5, atol=1e-6)
    (summed,) = torch.autograd.grad(entropy_to_sigma(leaves[1], tau=tau).sum(), leaves[1])
    (right,) = torch.autograd.grad(oracle.sigma(exact[1], tau=tau).sum(), exact[1])
    torch.testing.assert_close(summed.double(), right, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("length", [1, 17, 511, 513, size(40_000, 1_100)])
def test_lengths_that_fill_no_block(backend: str, length: int) -> None:
    entropy = torch.linspace(-0.1, 1.1, length)
    mean, noise = normal(length, 3, seed=1), normal(length, 3, seed=2)
    assert_close_to_truth(entropy_to_sigma(entropy), oracle.sigma(entropy), floor=1e-6)
    leaves = tuple(t.requires_grad_() for t in (mean, entropy, noise))
    weight = normal(length, 3, seed=3)
    found = torch.autograd.grad(entropy_prior(*leaves), leaves, weight)
    exact = tuple(t.detach().double().requires_grad_() for t in leaves)
    truth = exact[0] + oracle.sigma(exact[1])[:, None] * exact[2]
    for left, right in zip(found, torch.autograd.grad(truth, exact, weight.double()), strict=True):
        torch.testing.assert_close(left.double(), right, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("which", [0, 1, 2])
def test_gradient_of_one_argument_alone(backend: str, dtype: torch.dtype, which: int) -> None:
    inputs = [normal(4, 6, seed=1, dtype=dtype), torch.rand(4), normal(4, 6, seed=2, dtype=dtype)]
    inputs[which].requires_grad_()
    weight = normal(4, 6, seed=3, dtype=dtype)
    (found,) = torch.autograd.grad(entropy_prior(*inputs), inputs[which], weight)
    exact = [t.detach().double() for t in inputs]
    exact[which].requires_grad_()
    truth = exact[0] + oracle.sigma(exact[1])[:, None] * exact[2]
    (expected,) = torch.autograd.grad(truth, exact[which], weight.double())
    assert found.dtype == inputs[which].dtype
    tolerance = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)


def test_forward_derivatives_are_right_or_raise(backend: str) -> None:
    """A native operator must not drop the tangent, whichever way it is called."""
    entropy = torch.tensor([0.3, 0.7])
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(entropy, torch.ones(2))
        try:
            tangent = forward_ad.unpack_dual(entropy_to_sigma(dual)).tangent
        except RuntimeError:
            return
        assert tangent is not None and bool((tangent > 0).all())


def test_gradient_is_zero_outside_the_range(backend: str) -> None:
    entropy = torch.tensor([-0.5, 0.5, 1.5], requires_grad=True)
    (gradient,) = torch.autograd.grad(entropy_to_sigma(entropy).sum(), entropy)
    assert (gradient != 0).tolist() == [False, True, False]


def test_double_backward_is_right_or_raises(backend: str) -> None:
    entropy = torch.tensor([0.3, 0.7], requires_grad=True)
    try:
        (first,) = torch.autograd.grad(entropy_to_sigma(entropy).sum(), entropy, create_graph=True)
        (second,) = torch.autograd.grad(first.sum(), entropy)
    except RuntimeError:
        return
    exact = entropy.detach().double().requires_grad_()
    (first,) = torch.autograd.grad(oracle.sigma(exact).sum(), exact, create_graph=True)
    (expected,) = torch.autograd.grad(first.sum(), exact)
    torch.testing.assert_close(second.double(), expected, rtol=1e-5, atol=0)


def test_gradcheck_fp64() -> None:
    import driftar_kernels

    leaves = (
        normal(3, 4, 5, seed=1, dtype=torch.float64).requires_grad_(),
        torch.linspace(0.05, 0.95, 12, dtype=torch.float64).reshape(3, 4).requires_grad_(),
        normal(3, 4, 5, seed=2, dtype=torch.float64).requires_grad_(),
    )
    with driftar_kernels.use_backend("reference"):
        assert torch.autograd.gradcheck(entropy_prior, leaves)


BAD_SETTINGS: dict[str, tuple[type[Exception], str, Any]] = {
    "tau_zero": (ValueError, "tau", 0.0),
    "tau_nan": (ValueError, "tau", math.nan),
    "tau_infinite": (ValueError, "tau", math.inf),
    "sigma_negative": (ValueError, "sigma_max", -0.1),
    "sigma_nan": (ValueError, "sigma_max", math.nan),
    "entropy_max_zero": (ValueError, "entropy_max", 0.0),
    "entropy_max_negative": (ValueError, "entropy_max", -1.0),
    "entropy_max_nan": (ValueError, "entropy_max", math.nan),
    "tau_text": (TypeError, "tau", "2"),
}


@pytest.mark.parametrize("name", list(BAD_SETTINGS))
def test_bad_settings(backend: str, name: str) -> None:
    error, argument, value = BAD_SETTINGS[name]
    with pytest.raises(error, match=argument):
        entropy_to_sigma(torch.rand(3), **{argument: value})
    with pytest.raises(error, match=argument):
        entropy_prior(torch.rand(3, 2), torch.rand(3), torch.rand(3, 2), **{argument: value})


BAD_TENSORS: dict[str, tuple[type[Exception], str, dict[str, Any]]] = {
    "entropy_int": (TypeError, "entropy", {"entropy": torch.ones(3, dtype=torch.int64)}),
    "entropy_list": (TypeError, "entropy", {"entropy": [0.1]}),
    "entropy_shape": (ValueError, "entropy", {"entropy": torch.rand(4)}),
    "entropy_rank": (ValueError, "entropy", {"entropy": torch.rand(3, 2)}),
    "entropy_device": (ValueError, "entropy", {"entropy": torch.empty(3, device="meta")}),
    "noise_shape": (ValueError, "noise", {"noise": torch.rand(3, 3)}),
    "noise_dtype": (TypeError, "noise", {"noise": torch.rand(3, 2).bfloat16()}),
    "noise_device": (ValueError, "noise", {"noise": torch.empty(3, 2, device="meta")}),
    "mean_int": (TypeError, "mean", {"mean": torch.ones(3, 2, dtype=torch.int64)}),
    "mean_scalar": (ValueError, "mean", {"mean": torch.tensor(1.0)}),
}


@pytest.mark.parametrize("name", list(BAD_TENSORS))
def test_bad_tensors(backend: str, name: str) -> None:
    error, argument, change = BAD_TENSORS[name]
    arguments = {"mean": torch.rand(3, 2), "entropy": torch.rand(3), "noise": torch.rand(3, 2)}
    with pytest.raises(error, match=argument):
        entropy_prior(**{**arguments, **change})


def test_autocast_computes_in_fp32_and_takes_mixed_inputs(backend: str) -> None:
    mean, noise, entropy = torch.randn(2, 3, 4).bfloat16(), torch.randn(2, 3, 4), torch.rand(2, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        sample = entropy_prior(mean, entropy, noise)
    assert sample.dtype == torch.float32
    torch.testing.assert_close(sample, entropy_prior(mean.float(), entropy, noise))
