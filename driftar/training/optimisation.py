"""What the training tasks share: parameter groups, seeds, refusal of non-finite gradients."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def parameter_groups(
    modules: Iterable[tuple[nn.Module, float]], weight_decay: float
) -> list[dict[str, Any]]:
    """AdamW groups of ``(module, learning-rate scale)`` pairs; vectors and biases are not decayed.

    A parameter belongs to the first module that holds it; those without gradient are left out.
    """
    groups: list[dict[str, Any]] = []
    seen: set[int] = set()
    for module, scale in modules:
        own = [p for p in module.parameters() if p.requires_grad and id(p) not in seen]
        seen.update(id(p) for p in own)
        matrices = [p for p in own if p.dim() > 1]
        vectors = [p for p in own if p.dim() <= 1]
        for parameters, decay in ((matrices, weight_decay), (vectors, 0.0)):
            if parameters:
                groups.append({"params": parameters, "weight_decay": decay, "scale": scale})
    return groups


def seeded_generator(seed: int) -> torch.Generator:
    """A CPU generator; ValueError for a seed that is no integer in 0 .. 2^63 - 1."""
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise ValueError(f"seed must be an integer in [0, 2**63), got {seed!r}")
    return torch.Generator().manual_seed(seed)


@contextmanager
def global_seed(generator: torch.Generator) -> Iterator[None]:
    """Draw the global seed from ``generator``: initialisers and dropout know no other source."""
    seed = int(torch.randint(2**62, (), generator=generator))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def clipped_backward(
    loss: Tensor, optimizer: torch.optim.Optimizer, largest_norm: float
) -> float | None:
    """Clipped gradients of the loss; their norm, or None (and no gradients) if not finite."""
    optimizer.zero_grad(set_to_none=True)
    if not bool(torch.isfinite(loss)):
        return None
    loss.backward()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = float(nn.utils.clip_grad_norm_(parameters, largest_norm))
    if not torch.isfinite(torch.tensor(norm)):
        optimizer.zero_grad(set_to_none=True)
        return None
    return norm
