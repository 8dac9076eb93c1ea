from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import driftar
from driftar.models.weights import WeightsError
from tests.driftar import golden


@pytest.fixture(scope="module")
def config() -> dict[str, Any]:
    return golden.metadata("C_mar_state_dict", "config")


@pytest.fixture
def state() -> dict[str, Tensor]:
    return golden.tensors("C_mar_state_dict")


def test_golden_weights_load_from_a_file(
    tmp_path: Path, config: dict[str, Any], state: dict[str, Tensor]
) -> None:
    path = tmp_path / "checkpoint-last.pth"
    torch.save({"model": {}, "model_ema": state, "epoch": 1}, path)
    model = driftar.load_official("mar", path, config)
    assert not model.training
    assert model.name == "mar"
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key])
    again = driftar.build_model(model.name, **model.config)
    assert again.state_dict().keys() == state.keys()


def test_config_beside_the_weights_is_used(
    tmp_path: Path, config: dict[str, Any], state: dict[str, Tensor]
) -> None:
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="config"):
        driftar.load_official("mar", tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert driftar.load_official("mar", tmp_path).config["diffloss_w"] == 64


def test_half_precision_weights_are_widened(
    config: dict[str, Any], state: dict[str, Tensor]
) -> None:
    model = driftar.load_official(
        "mar", {key: value.half() for key, value in state.items()}, config
    )
    assert {value.dtype for value in model.state_dict().values()} == {torch.float32}
    assert torch.equal(model.fake_latent, state["fake_latent"].half().float())


def test_every_mismatch_is_listed(config: dict[str, Any], state: dict[str, Tensor]) -> None:
    del state["mask_token"], state["z_proj.bias"]
    state["surplus"] = torch.zeros(3)
    state["fake_latent"] = torch.zeros(2, 64)
    state["z_proj.weight"] = torch.zeros(64, 4, dtype=torch.int8)
    with pytest.raises(WeightsError) as caught:
        driftar.load_official("mar", state, config)
    assert [line.strip() for line in str(caught.value).splitlines()] == [
        "state_dict: does not fit mar:",
        "missing: mask_token [1, 1, 64]",
        "missing: z_proj.bias [64]",
        "shape: fake_latent is [2, 64], not [1, 64]",
        "dtype: z_proj.weight is torch.int8, not floating point",
        "unexpected: surplus [3]",
    ]


def test_weights_of_another_size_are_recognised(tmp_path: Path) -> None:
    path = tmp_path / "tiny.pth"
    torch.save(driftar.build_model("mar_tiny").state_dict(), path)
    with pytest.raises(
        WeightsError, match=r"tiny\.pth: does not fit mar_base but looks like mar_tiny"
    ):
        driftar.load_official("mar_base", path)


def test_config_overrides_a_size() -> None:
    state = driftar.build_model("mar_tiny", class_num=3).state_dict()
    assert driftar.load_official("mar_tiny", state, {"class_num": 3}).num_classes == 3


def test_bad_arguments_are_named(config: dict[str, Any], state: dict[str, Tensor]) -> None:
    with pytest.raises(ValueError, match="name"):
        driftar.load_official("mar_giant", state)
    with pytest.raises(ValueError, match="official"):
        driftar.load_official("drift_ar_mar_tiny", state)
    with pytest.raises(ValueError, match="config must be given"):
        driftar.load_official("mar", state)
    with pytest.raises(ValueError, match=r"config builds no mar.*no_such"):
        driftar.load_official("mar", state, {**config, "no_such": 1})
    with pytest.raises(ValueError, match=r"config builds no mar.*num_heads"):
        driftar.load_official("mar", state, {**config, "encoder_num_heads": 7})
    with pytest.raises(TypeError, match="config"):
        driftar.load_official("mar", state, "config.json")  # type: ignore[arg-type]
