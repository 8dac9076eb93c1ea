"""What the training loop needs to know about the thing it trains."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import nn

__all__ = ["TrainingTask"]


class TrainingTask(Protocol):
    """A model, its optimisers and one optimisation step.

    name: short, of letters, digits and underscores; num_steps: length of the training;
    modules: everything with parameters or buffers that training changes (model, EMA copy, banks);
    optimizers, generators: by name; all of a step's randomness comes from the generators.
    Together with `extra_state` (nested dicts and lists of numbers, strings and tensors) they are
    the complete state: a task built anew and loaded with them continues bitwise.
    """

    name: str
    num_steps: int
    modules: dict[str, nn.Module]
    optimizers: dict[str, torch.optim.Optimizer]
    generators: dict[str, torch.Generator]

    def step(self, step: int) -> dict[str, float]:
        """Do step number `step` (from 0) and return the scalars to log.

        ``"skipped": 1.0`` among them says that a loss or gradient was not finite and that no state
        was changed (other than the generators').
        """
        ...

    def extra_state(self) -> dict[str, Any]:
        """The rest of the state."""
        ...

    def load_extra_state(self, state: dict[str, Any]) -> None:
        """Put back what `extra_state` returned."""
        ...
