"""A task of a few parameters that uses every kind of state a checkpoint must hold."""

from __future__ import annotations

import copy
import random
from typing import Any

import numpy as np
import torch
from torch import nn


class TinyModel(nn.Module):
    name = "tiny"

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.config = {"width": width}
        self.layer = nn.Linear(width, width)
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))


class FakeTask:
    """Fits noise; `signal_at` is called with the step number at the start of each step."""

    name = "fake"

    def __init__(
        self,
        num_steps: int = 12,
        width: int = 4,
        bad_steps: tuple[int, ...] = (),
        signal_at: Any = None,
    ) -> None:
        self.num_steps = num_steps
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = TinyModel(width)
        self.modules: dict[str, nn.Module] = {"model": model, "ema": copy.deepcopy(model)}
        self.optimizers: dict[str, torch.optim.Optimizer] = {
            "main": torch.optim.AdamW(model.parameters(), lr=1e-2)
        }
        self.generators = {"noise": torch.Generator().manual_seed(3)}
        self.average = 0.5
        self.bad_steps = bad_steps
        self.signal_at = signal_at

    def step(self, step: int) -> dict[str, float]:
        if self.signal_at is not None:
            self.signal_at(step)
        model, ema = self.modules["model"], self.modules["ema"]
        assert isinstance(model, TinyModel) and isinstance(ema, TinyModel)
        noise = torch.randn(8, model.layer.in_features, generator=self.generators["noise"])
        if step in self.bad_steps:
            return {"skipped": 1.0, "loss": float("nan")}
        # The global generators are used on purpose: a resumed run must continue those as well.
        shift = random.random() + float(np.random.rand()) + float(torch.rand(()))
        loss = (model.layer(noise) - shift).square().mean()
        optimizer = self.optimizers["main"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.seen += 1
        with torch.no_grad():
            for slow, fast in zip(ema.parameters(), model.parameters(), strict=True):
                slow.lerp_(fast, 0.1)
        self.average = 0.9 * self.average + 0.1 * loss.item()
        return {"loss": loss.item(), "grad_norm": 1.0}

    def extra_state(self) -> dict[str, Any]:
        return {
            "average": self.average,
            "history": [1, (2, 3)],
            "by_class": {0: 1.5, 1: float("inf")},
        }

    def load_extra_state(self, state: dict[str, Any]) -> None:
        self.average = state["average"]
        if state["history"] != [1, (2, 3)] or state["by_class"] != {0: 1.5, 1: float("inf")}:
            raise ValueError(f"extra state came back changed: {state}")


def seed_everything(seed: int = 5) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def fingerprint(task: FakeTask) -> list[Any]:
    """Everything that must be equal, bit for bit, between two runs."""
    tensors = [entry for module in task.modules.values() for entry in module.state_dict().values()]
    for slot in task.optimizers["main"].state_dict()["state"].values():
        tensors += [slot[key] for key in sorted(slot)]
    tensors.append(task.generators["noise"].get_state())
    globals_ = [random.random(), float(np.random.rand()), float(torch.rand(()))]
    return [[entry.tolist() for entry in tensors], task.average, globals_]
