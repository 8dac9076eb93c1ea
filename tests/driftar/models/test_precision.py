"""Every family in bfloat16, under autocast and through torch.compile."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import driftar
from tests.driftar.models.training import randomise

Passes = Callable[[Any], list[Tensor]]


def _mar(model: Any) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randn(2, 16, 4, generator=generator)
    mask = torch.rand(2, 16, generator=generator).argsort(1) < 9
    z = model.features(tokens, mask, model.condition(torch.tensor([3, -1])))
    t = torch.tensor([0, 999])
    return [z, model.head(tokens[:, 0], t, z[:, 0])]


def _transdiff(model: Any) -> list[Tensor]:
    z = model.features(model.condition(torch.tensor([3, -1])))
    x = torch.randn(2, 64, 1, generator=torch.Generator().manual_seed(1))
    return [z, model.velocity(x, z, torch.tensor([1000.0, 40.0]))]


def _transdiff_mrar(model: Any) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    tokens, x = (
        torch.randn(2, 48, 4, generator=generator),
        torch.randn(2, 64, 1, generator=generator),
    )
    z = model.features(tokens, model.condition(torch.tensor([3, -1])))
    return [z, model.velocity(x, z, torch.tensor([1000.0, 40.0]))]


def _drift_ar(model: Any) -> list[Tensor]:
    z, entropy = model.features(model.condition(torch.tensor([3, -1])))
    noise = torch.randn(z.shape[0], 16, 4, generator=torch.Generator().manual_seed(1)).to(z.dtype)
    x0 = model.prior(z, entropy, noise)
    return [z, entropy, x0, model.decode(x0, z, entropy), model.draft(z)]


FAMILIES: dict[str, tuple[Passes, dict[str, Any]]] = {
    "mar_tiny": (_mar, {"num_iter": 3, "num_sampling_steps": "5"}),
    "transdiff_tiny": (_transdiff, {"num_steps": 3}),
    "transdiff_mrar_tiny": (_transdiff_mrar, {"num_steps": 2}),
    "drift_ar_tiny": (_drift_ar, {}),
    "drift_ar_mar_tiny": (_drift_ar, {}),
}
families = pytest.mark.parametrize("name", list(FAMILIES))


def _build(name: str) -> Any:
    torch.manual_seed(0)
    return randomise(driftar.build_model(name), scale=0.05).eval()


def _errors(actual: list[Tensor], expected: list[Tensor]) -> list[float]:
    return [float((a.float() - b).norm() / b.norm()) for a, b in zip(actual, expected, strict=True)]


@torch.no_grad()
@families
def test_bfloat16_is_near_fp32(name: str) -> None:
    passes, options = FAMILIES[name]
    model = _build(name)
    half = copy.deepcopy(model).bfloat16()
    assert max(_errors(passes(half), passes(model))) < 0.05
    latents = half.generate(torch.tensor([1, -1]), cfg=1.5, **options)
    assert latents.dtype is torch.bfloat16
    assert bool(torch.isfinite(latents).all())


@torch.no_grad()
@families
def test_autocast_is_near_fp32(name: str) -> None:
    passes, options = FAMILIES[name]
    model = _build(name)
    expected = passes(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert max(_errors(passes(model), expected)) < 0.05
        assert bool(torch.isfinite(model.generate(torch.tensor([1]), **options)).all())


def _compiled(model: Any, *, fullgraph: bool) -> Any:
    """The model with its passes compiled; AOT's eager backend traces forward and backward."""
    torch._dynamo.reset()
    for method in ("features", "velocity", "head", "prior", "decode", "draft"):
        if hasattr(model, method):
            function = torch.compile(
                getattr(model, method), backend="aot_eager", fullgraph=fullgraph
            )
            setattr(model, method, function)
    return model


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "mar_tiny"])
def test_passes_compile_to_one_graph_with_gradients(name: str) -> None:
    passes, _ = FAMILIES[name]
    model = _build(name)
    compiled = _compiled(copy.deepcopy(model), fullgraph=True)
    outputs = passes(model), passes(compiled)
    for expected, actual in zip(*outputs, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    for results in outputs:
        torch.stack([result.square().mean() for result in results]).sum().backward()
    for parameter, other in zip(model.parameters(), compiled.parameters(), strict=True):
        assert (parameter.grad is None) == (other.grad is None)
        if parameter.grad is not None and other.grad is not None:
            scale = float(parameter.grad.abs().max())
            torch.testing.assert_close(other.grad, parameter.grad, rtol=1e-3, atol=1e-4 * scale)


@pytest.mark.slow
@torch.no_grad()
def test_mar_compiles_around_the_count_of_unmasked_tokens() -> None:
    """Its encoder's length depends on the mask's content: no single graph."""
    model = _build("mar_tiny")
    compiled = _compiled(copy.deepcopy(model), fullgraph=False)
    for actual, expected in zip(_mar(compiled), _mar(model), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
