from __future__ import annotations

import copy
import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch

import driftar
from driftar.data import ImageDataset
from driftar.models.mar import MAR
from driftar.training.config import (
    PUBLISHED_TEMPERATURES,
    DriftTrainingConfig,
    default_temperatures,
)
from driftar.training.drift_task import DriftARTask
from tests.driftar.training.test_mar_task import stripes

# The runs of these tests are too short for varied images.
pytestmark = pytest.mark.filterwarnings("ignore:.*the classes collapse:RuntimeWarning")

CONFIG = DriftTrainingConfig(
    num_steps=10,
    generated_per_class=6,
    positives_per_class=6,
    positive_bank=8,
    bank_feed=4,
    temperatures=(0.3,),
    warmup_steps=2,
    check_every=2,
)


@pytest.fixture(scope="module")
def backbone() -> MAR:
    torch.manual_seed(0)
    model: MAR = driftar.build_model("mar_tiny", class_num=3)
    return model


@pytest.fixture
def task(backbone: MAR) -> DriftARTask:
    return DriftARTask(stripes(), backbone, CONFIG, seed=0)


def snapshot(task: DriftARTask) -> dict[str, dict[str, torch.Tensor]]:
    return {name: copy.deepcopy(module.state_dict()) for name, module in task.modules.items()}


def changed(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    return {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}


def test_model_starts_from_the_backbone(task: DriftARTask, backbone: MAR) -> None:
    state = backbone.state_dict()
    for name, value in task.model.backbone.state_dict().items():
        assert torch.equal(value, state[name])
    phi = task.model.feature_encoder.block.state_dict()
    for name, value in backbone.decoder_blocks[1].state_dict().items():
        assert torch.equal(phi[name], value)


def test_phases_train_what_they_should(task: DriftARTask) -> None:
    start = snapshot(task)["model"]
    logs = [task.step(step) for step in range(9)]
    assert [log["phase"] for log in logs] == [1.0] * 9
    assert logs[0]["alpha"] == pytest.approx(0.95)
    assert logs[8]["alpha"] == pytest.approx(0, abs=1e-6)
    trained = {"backbone", "drift_decoder", "draft_model", "enc_to_token_proj"}
    assert changed(start, task.model.state_dict()) == trained
    middle = snapshot(task)["model"]
    last = task.step(9)
    assert last["phase"] == 2.0
    assert "draft_loss" not in last and last["loss"] == last["drift_loss"]
    assert changed(middle, task.model.state_dict()) == {"drift_decoder"}


def test_samples_move_towards_the_data(backbone: MAR) -> None:
    settings = replace(CONFIG, num_steps=100, ema_decay=0.8, label_drop=0.0)
    task = DriftARTask(stripes(), backbone, settings, seed=0)
    for step in range(100):
        task.step(step)
    images = task.average.generate(torch.arange(3).repeat_interleave(8))
    rows = images[:, 0].mean(2).unflatten(0, (3, 8)).mean(1)
    for label in range(3):
        bright = rows[label, 2 * label : 2 * label + 2].mean()
        assert float(bright) > float(rows[label].mean()) + 0.15


def test_a_seed_fixes_the_run(backbone: MAR) -> None:
    def run(seed: int, global_seed: int) -> dict[str, float]:
        torch.manual_seed(global_seed)
        task = DriftARTask(stripes(), backbone, replace(CONFIG, negatives_per_class=4), seed)
        return [task.step(step) for step in range(3)][-1]

    assert run(0, 0) == run(0, 7)
    assert run(0, 0) != run(1, 0)


def test_state_continues_a_run_bitwise(backbone: MAR) -> None:
    settings = replace(CONFIG, negatives_per_class=4, negative_bank=20)
    task = DriftARTask(stripes(), backbone, settings, seed=0)
    for step in range(4):
        task.step(step)
    resumed = DriftARTask(stripes(), backbone, settings, seed=0)
    assert set(resumed.modules) == {"model", "ema", "positives", "negatives"}
    for name, module in task.modules.items():
        resumed.modules[name].load_state_dict(module.state_dict())
    for name, optimizer in task.optimizers.items():
        resumed.optimizers[name].load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for name, generator in task.generators.items():
        resumed.generators[name].set_state(generator.get_state())
    resumed.load_extra_state(task.extra_state())
    for step in range(4, 10):
        assert task.step(step) == resumed.step(step)


def test_a_step_that_is_not_finite_changes_nothing(backbone: MAR) -> None:
    task = DriftARTask(stripes(), backbone, replace(CONFIG, negatives_per_class=4), seed=0)
    task.step(0)
    with torch.no_grad():
        task.model.draft_model.out_proj.bias.fill_(torch.nan)
    before = snapshot(task)
    log = task.step(1)
    assert log["skipped"] == 1.0
    for name, state in before.items():
        for key, value in task.modules[name].state_dict().items():
            assert torch.equal(value.nan_to_num(), state[key].nan_to_num()), (name, key)
    assert task.optimizers["model"].state_dict()["state"][0]["step"] == 1


@pytest.mark.parametrize("kind", ["tokens", "flattened", "location", "pooled", "positions"])
def test_every_grouping_trains(backbone: MAR, kind: str) -> None:
    settings = replace(CONFIG, drift_groups=(kind,), generated_per_class=2, classes_per_step=2)
    task = DriftARTask(stripes(), backbone, settings, seed=0)
    log = task.step(0)
    assert log["grad_norm"] > 0
    assert log[f"drift_norm/{kind}/0.3"] > 0


def test_unconditional_groups_draw_from_all_classes(backbone: MAR) -> None:
    task = DriftARTask(stripes(), backbone, replace(CONFIG, label_drop=1.0), seed=0)
    assert task._draw_labels().tolist() == [-1, -1, -1]
    log = task.step(0)
    assert log["grad_norm"] > 0
    assert "variance_ratio" not in log


def test_collapse_is_reported_once(task: DriftARTask) -> None:
    point = torch.ones(3, 6, 16, 4)
    labels = torch.arange(3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        task._watch(0, labels, point, {})  # too early to judge
    with pytest.warns(RuntimeWarning, match="collapse"):
        log = task._watch(8, labels, point, {})
    assert log["variance_ratio"] == 0
    assert task.extra_state() == {"collapse_warned": True}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        task._watch(9, labels, point, {})


def test_variance_ratio_of_the_data_is_one(task: DriftARTask) -> None:
    dataset = stripes()
    tokens = torch.stack([task.model.patchify(dataset.of_class(k)) for k in range(3)])
    log = task._watch(9, torch.arange(3), tokens, {})
    assert log["variance_ratio"] == pytest.approx(1, abs=1e-5)


def test_temperatures_default_by_data_set(backbone: MAR) -> None:
    assert default_temperatures("stripes") == PUBLISHED_TEMPERATURES
    assert min(default_temperatures("digits")) > min(PUBLISHED_TEMPERATURES)
    task = DriftARTask(stripes(), backbone, replace(CONFIG, temperatures=None), seed=0)
    assert task.temperatures == PUBLISHED_TEMPERATURES


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"num_steps": 0}, "num_steps"),
        ({"positives_per_class": 0}, "positives_per_class"),
        ({"negatives_per_class": -1}, "negatives_per_class"),
        ({"classes_per_step": 4}, "classes_per_step"),
        ({"drift_groups": ()}, "drift_groups"),
        ({"drift_groups": ("channels",)}, "drift_groups"),
        ({"alpha_0": 1.5}, "alpha_0"),
        ({"freeze_fraction": 0.0}, "freeze_fraction"),
        ({"model": "mar_tiny"}, "model"),
    ],
)
def test_bad_settings_are_named(backbone: MAR, change: dict[str, Any], name: str) -> None:
    with pytest.raises((ValueError, TypeError), match=name):
        DriftARTask(stripes(), backbone, replace(CONFIG, **change), seed=0)


def test_a_class_without_images_is_named(backbone: MAR) -> None:
    images, labels = torch.zeros(4, 1, 8, 8), torch.tensor([0, 0, 1, 1])
    with pytest.raises(ValueError, match="class 2 has 0"):
        DriftARTask(ImageDataset("gap", images, labels, 3), backbone, CONFIG, seed=0)
