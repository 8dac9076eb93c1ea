from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from driftar.data import ImageDataset
from driftar.training.config import MARTrainingConfig
from driftar.training.mar_task import MARTask

CONFIG = MARTrainingConfig(num_steps=30, batch_size=16, warmup_steps=5)


def stripes(per_class: int = 8, classes: int = 3) -> ImageDataset:
    """Classes that differ in which rows are bright, with noise."""
    generator = torch.Generator().manual_seed(5)
    labels = torch.arange(classes).repeat(per_class)
    images = 0.1 * torch.randn(len(labels), 1, 8, 8, generator=generator)
    for image, label in zip(images, labels.tolist(), strict=True):
        image[:, 2 * label : 2 * label + 2] += 0.5
    return ImageDataset("stripes", images.clamp(-1, 1), labels, classes)


def test_loss_falls() -> None:
    task = MARTask(stripes(), CONFIG, seed=0)
    logs = [task.step(step) for step in range(CONFIG.num_steps)]
    first = sum(log["loss"] for log in logs[:5])
    last = sum(log["loss"] for log in logs[-5:])
    assert last < 0.7 * first
    assert all(log["grad_norm"] > 0 and "skipped" not in log for log in logs)
    assert task.modules["model"].num_classes == 3


def test_a_seed_fixes_the_run_and_the_global_generator_does_not_matter() -> None:
    def run(seed: int, global_seed: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(global_seed)
        task = MARTask(stripes(), CONFIG, seed)
        for step in range(3):
            task.step(step)
        return task.model.state_dict()

    first, again, other = run(1, 0), run(1, 9), run(2, 0)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_state_continues_a_run_bitwise() -> None:
    task = MARTask(stripes(), CONFIG, seed=0)
    for step in range(3):
        task.step(step)
    resumed = MARTask(stripes(), CONFIG, seed=0)
    for name, module in task.modules.items():
        resumed.modules[name].load_state_dict(module.state_dict())
    for name, optimizer in task.optimizers.items():
        resumed.optimizers[name].load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for name, generator in task.generators.items():
        resumed.generators[name].set_state(generator.get_state())
    resumed.load_extra_state(task.extra_state())
    for step in range(3, 6):
        assert task.step(step) == resumed.step(step)
    for name, value in task.average.state_dict().items():
        assert torch.equal(value, resumed.average.state_dict()[name])


def test_a_step_that_is_not_finite_changes_nothing() -> None:
    task = MARTask(stripes(), CONFIG, seed=0)
    task.step(0)
    before = {name: copy.deepcopy(module.state_dict()) for name, module in task.modules.items()}
    moments = copy.deepcopy(task.optimizers["model"].state_dict()["state"])
    task._tokens = task._tokens * torch.nan
    log = task.step(1)
    assert log["skipped"] == 1.0
    for name, state in before.items():
        for key, value in state.items():
            assert torch.equal(value, task.modules[name].state_dict()[key]), key
    for index, state in task.optimizers["model"].state_dict()["state"].items():
        assert torch.equal(state["exp_avg"], moments[index]["exp_avg"])


def test_mask_rates_follow_the_truncated_normal() -> None:
    task = MARTask(stripes(), CONFIG, seed=0)
    rates = torch.tensor([task._masked_count(1000) / 1000 for _ in range(4000)])
    assert float(rates.min()) >= 0.7
    assert float(rates.max()) <= 1
    # Half normal of scale 0.25 cut at 0.3: mean distance from 1.
    assert float(1 - rates.mean()) == pytest.approx(0.133, abs=0.005)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"batch_size": 0}, "batch_size"),
        ({"mask_rate_min": 0.0}, "mask_rate_min"),
        ({"model": "drift_ar_mar_tiny"}, "model"),
        ({"model": "nothing"}, "name"),
    ],
)
def test_bad_settings_are_named(change: dict[str, object], name: str) -> None:
    with pytest.raises((ValueError, TypeError), match=name):
        MARTask(stripes(), replace(CONFIG, **change), seed=0)  # type: ignore[arg-type]


def test_bad_seeds_and_images_are_named() -> None:
    with pytest.raises(ValueError, match="seed"):
        MARTask(stripes(), CONFIG, seed=-1)
    small = ImageDataset("small", torch.zeros(4, 1, 4, 4), torch.tensor([0, 0, 1, 1]), 2)
    with pytest.raises(ValueError, match="latents"):
        MARTask(small, CONFIG, seed=0)
