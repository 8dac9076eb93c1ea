"""What the tests of the model families share: replayed noise, random weights, a few steps."""

from __future__ import annotations

from collections.abc import Callable, Set
from typing import TypeVar

import torch
from torch import Tensor, nn

Model = TypeVar("Model", bound=nn.Module)


class replay:
    """A noise source that returns recorded draws in turn and refuses a wrong shape."""

    def __init__(self, *draws: Tensor) -> None:
        self._draws = list(draws)

    def __call__(self, shape: tuple[int, ...]) -> Tensor:
        draw = self._draws.pop(0)
        assert tuple(draw.shape) == shape
        return draw

    @property
    def exhausted(self) -> bool:
        return not self._draws


@torch.no_grad()
def randomise(model: Model, scale: float = 0.2) -> Model:
    """Noise on every weight: zero-initialised outputs hide what is before them."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter += scale * torch.randn(parameter.shape, generator=generator)
    return model


def train(model: nn.Module, loss: Callable[[], Tensor], steps: int = 30) -> set[str]:
    """A few steps on a loss; the names of trainable parameters that no gradient reached."""
    untouched = {name for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=2e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
        untouched -= {
            name
            for name, p in model.named_parameters()
            if p.grad is not None and bool(p.grad.any())
        }
    return untouched


def assert_learns(
    model: nn.Module, loss: Callable[[], Tensor], *, unused: Set[str] = frozenset()
) -> None:
    """A fixed batch's loss falls by a tenth, and gradients reach every parameter but the unused."""
    first = loss().item()
    assert train(model, loss) == unused
    assert loss().item() < 0.9 * first
