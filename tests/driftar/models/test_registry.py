from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

import driftar
from driftar.models.registry import find_family, known_models


@pytest.mark.parametrize("name", [name for name in known_models() if name.endswith("_tiny")])
def test_config_rebuilds_the_model(name: str) -> None:
    classes = {"class_num": 7} if "class_num" in find_family(name)[1] else {}
    model = driftar.build_model(name, **classes)
    config = json.loads(json.dumps(model.config))
    again = driftar.build_model(model.name, **config)
    assert again.config == model.config
    again.load_state_dict(model.state_dict(), strict=True)


def test_nested_overrides_merge() -> None:
    model = driftar.build_model("drift_ar_mar_tiny", backbone={"class_num": 3}, drift_depth=1)
    assert model.config["backbone"]["class_num"] == 3
    assert model.config["backbone"]["patch_size"] == 2
    assert model.condition(torch.tensor([2])).shape == (1, 64)
    assert driftar.build_model("drift_ar_mar_tiny").config["backbone"]["class_num"] == 10


def test_unknown_names_list_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"mar_tiny, mar_base.*drift_ar_mar_tiny.*; got 'nothing'"):
        driftar.build_model("nothing")
    with pytest.raises(TypeError, match="no_such_option"):
        driftar.build_model("mar_tiny", no_such_option=1)


def test_importing_the_package_does_not_load_torch() -> None:
    code = "import sys, driftar; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
