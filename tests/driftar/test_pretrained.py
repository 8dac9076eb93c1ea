from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard, ModelHubMixin
from torch import nn

import driftar
from driftar import pretrained
from driftar.pipeline import Pipeline
from driftar.prompts import ByteTokenizer
from driftar.training.checkpoint import ArchitectureError, CheckpointError
from driftar.training.model_file import save_model


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    directory = tmp_path / "pipeline"
    Pipeline(driftar.build_model("drift_ar_mar_tiny")).save_pretrained(directory)
    return directory


def images(pipeline: Pipeline) -> torch.Tensor:
    result: torch.Tensor = pipeline([1, 2], seed=0, output_type="latent", progress=False).images
    return result


def test_a_pipeline_returns_as_it_was(tmp_path: Path) -> None:
    model = driftar.build_model("nextstep_1_tiny", num_hidden_layers=1).to(torch.bfloat16)
    pipeline = Pipeline(model, tokenizer=ByteTokenizer(), latent_scale=0.5, latent_shift=0.25)
    pipeline.save_pretrained(tmp_path / "new" / "place")
    loaded = Pipeline.from_pretrained(tmp_path / "new" / "place")
    assert loaded.model.config == model.config and not loaded.model.training
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[name], value)
    assert (loaded.latent_scale, loaded.latent_shift) == (0.5, 0.25)
    assert isinstance(loaded.tokenizer, ByteTokenizer)
    assert sorted(os.listdir(tmp_path / "new" / "place")) == [
        "README.md",
        "config.json",
        "manifest.json",
        "model.safetensors",
    ]


def test_saving_again_replaces_the_old_one(saved: Path) -> None:
    other = Pipeline(driftar.build_model("mar_tiny"))
    other.save_pretrained(saved)
    assert Pipeline.from_pretrained(saved).model.name == "mar_tiny"


def test_a_model_that_training_left_is_taken(tmp_path: Path) -> None:
    model = driftar.build_model("drift_ar_mar_tiny").eval()
    save_model(tmp_path / "model", model)
    assert torch.equal(
        images(Pipeline.from_pretrained(tmp_path / "model")), images(Pipeline(model))
    )


class Upsampling(nn.Module):
    """Stands for an autoencoder of ours: a name, a config, weights."""

    name = "upsampling"

    def __init__(self, factor: int = 2) -> None:
        super().__init__()
        self.config = {"factor": factor}
        self.gain = nn.Parameter(torch.tensor(0.5))

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        factor = self.config["factor"]
        return self.gain * latents.repeat_interleave(factor, 2).repeat_interleave(factor, 3)


def test_an_autoencoder_of_ours_is_stored_with_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = driftar.build_model
    monkeypatch.setattr(
        driftar,
        "build_model",
        lambda name, **config: (
            Upsampling(**config) if name == "upsampling" else build(name, **config)
        ),
        raising=False,
    )
    vae = Upsampling(3)
    nn.init.constant_(vae.gain, 0.25)
    Pipeline(build("drift_ar_mar_tiny"), vae=vae).save_pretrained(tmp_path)
    loaded = Pipeline.from_pretrained(tmp_path)
    assert isinstance(loaded.vae, Upsampling) and loaded.vae.config == {"factor": 3}
    assert float(loaded.vae.gain.detach()) == 0.25
    # Another save's autoencoder in its place is noticed.
    other = tmp_path / "other"
    Pipeline(build("drift_ar_mar_tiny"), vae=Upsampling(3)).save_pretrained(other)
    shutil.rmtree(tmp_path / "vae")
    shutil.move(other / "vae", tmp_path / "vae")
    with pytest.raises(CheckpointError, match="another save"):
        Pipeline.from_pretrained(tmp_path)


def cut(path: Path, size: int) -> None:
    os.truncate(path, size)


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-3] ^= 4
    path.write_bytes(data)


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    **{f"cut to {n}": (lambda d, n=n: cut(d / "model.safetensors", n), "bytes") for n in (0, 60)},
    "flipped bit": (lambda d: flip(d / "model.safetensors"), "SHA-256"),
    "edited config": (lambda d: edit(d / "config.json", dtype="float16"), "config.json"),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), "cannot be read"),
    "no manifest": (lambda d: (d / "manifest.json").unlink(), "load_official"),
    "no config": (lambda d: (d / "config.json").unlink(), "describes a 'pipeline'"),
    "damaged manifest": (lambda d: cut(d / "manifest.json", 30), "not valid JSON"),
    "a linked-in config": (
        lambda d: edit(d / "manifest.json", files={"../config.json": {"size": 1, "sha256": ""}}),
        "plain file name",
    ),
}


@pytest.mark.parametrize("damage", list(DAMAGES))
def test_damage_is_one_clear_error(saved: Path, damage: str) -> None:
    break_it, text = DAMAGES[damage]
    break_it(saved)
    with pytest.raises(CheckpointError, match=text):
        Pipeline.from_pretrained(saved)


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"name": "mar_tiny"}, CheckpointError, "backbone"),
        ({"name": "nothing"}, CheckpointError, "must be one of"),
        ({"dtype": "int64"}, CheckpointError, "unknown dtype"),
        ({"dtype": "float16"}, ArchitectureError, "has dtype"),
        ({"folders": {"vae": {"class": "X", "manifest": ""}}}, CheckpointError, "vae"),
        ({"folders": {"../x": {"class": "X", "manifest": ""}}}, CheckpointError, "unknown folder"),
        ({"latent_scale": "much"}, CheckpointError, "does not fit"),
    ],
)
def test_a_foreign_configuration_is_one_clear_error(
    saved: Path, changes: dict[str, Any], error: type[Exception], text: str
) -> None:
    edit(saved / "config.json", **changes)
    pretrained.write_manifest(saved, "pipeline", ["config.json", "model.safetensors"], {})
    with pytest.raises(error, match=text):
        Pipeline.from_pretrained(saved)


def test_parts_of_two_saves_are_not_mixed(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A save that is killed between two renames leaves an error behind, not a chimera."""
    replace, calls = os.replace, []

    def killed(source: Path, target: Path) -> None:
        if Path(target).parent == saved:
            calls.append(target)
            if len(calls) == 2:
                raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        Pipeline(driftar.build_model("mar_tiny")).save_pretrained(saved)
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match=r"config\.json"):
        Pipeline.from_pretrained(saved)


def test_a_failed_save_leaves_the_old_pipeline(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = images(Pipeline.from_pretrained(saved))

    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pretrained, "write_tensors", full)
    with pytest.raises(CheckpointError, match="No space left"):
        Pipeline(driftar.build_model("mar_tiny")).save_pretrained(saved)
    assert torch.equal(images(Pipeline.from_pretrained(saved)), before)
    assert not list(saved.glob(".staging*"))


def test_parts_that_cannot_be_stored_are_named(saved: Path) -> None:
    class Opaque(nn.Module):
        pass

    with pytest.raises(TypeError, match="vae of class Opaque must have a name"):
        Pipeline(driftar.build_model("mar_tiny"), vae=Opaque()).save_pretrained(saved)
    mixed = driftar.build_model("mar_tiny")
    mixed.z_proj.to(torch.bfloat16)
    with pytest.raises(TypeError, match="one floating dtype"):
        Pipeline(mixed).save_pretrained(saved)
    assert Pipeline.from_pretrained(saved).model.name == "drift_ar_mar_tiny"


class FakeHub:
    """Stands for the network behind `huggingface_hub`: repositories are directories of links, as
    in its cache."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.calls: list[dict[str, Any]] = []

    def create_repo(self, repo_id: str, private: bool | None, exist_ok: bool) -> SimpleNamespace:
        self.calls.append({"repo_id": repo_id, "private": private, "exist_ok": exist_ok})
        return SimpleNamespace(repo_id=repo_id)

    def upload_folder(self, repo_id: str, folder_path: Path, **options: Any) -> str:
        self.calls.append(options)
        shutil.copytree(folder_path, self.root / "blobs" / repo_id)
        return f"https://hub/{repo_id}"

    def snapshot_download(self, repo_id: str, **options: Any) -> str:
        self.calls.append(options)
        copy = self.root / "snapshots" / repo_id
        for path in (self.root / "blobs" / repo_id).iterdir():
            copy.mkdir(parents=True, exist_ok=True)
            (copy / path.name).symlink_to(path)
        return str(copy)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    fake = FakeHub(tmp_path / "hub")
    monkeypatch.setattr("huggingface_hub.hub_mixin.HfApi", lambda token: fake)
    monkeypatch.setattr(pretrained, "snapshot_download", fake.snapshot_download)
    return fake


def test_a_pipeline_goes_to_the_hub_and_back(saved: Path, hub: FakeHub) -> None:
    pipeline = Pipeline.from_pretrained(saved)
    assert isinstance(pipeline, ModelHubMixin)
    address = pipeline.push_to_hub("someone/digits", private=True, commit_message="First")
    assert address == "https://hub/someone/digits"
    assert hub.calls[0] == {"repo_id": "someone/digits", "private": True, "exist_ok": True}
    assert hub.calls[1]["commit_message"] == "First"
    again = Pipeline.from_pretrained("someone/digits", revision="main")
    assert hub.calls[2]["revision"] == "main"
    assert torch.equal(images(again), images(pipeline))


def test_saving_and_uploading_in_one_call(tmp_path: Path, hub: FakeHub) -> None:
    pipeline = Pipeline(driftar.build_model("mar_tiny"))
    assert pipeline.save_pretrained(tmp_path / "digits") is None
    assert hub.calls == []
    address = pipeline.save_pretrained(
        tmp_path / "digits", repo_id="someone/digits", push_to_hub=True, branch="fresh"
    )
    assert address == "https://hub/someone/digits"
    assert hub.calls[1]["revision"] == "fresh"


def test_the_model_card_says_how_to_load(saved: Path, hub: FakeHub) -> None:
    Pipeline.from_pretrained(saved).push_to_hub("someone/digits")
    card = ModelCard.load(hub.root / "blobs/someone/digits/README.md")
    assert card.data.library_name == "driftar"
    assert card.data["pipeline_tag"] == "unconditional-image-generation"
    assert 'from_pretrained("someone/digits")' in card.text
    assert "`drift_ar_mar_tiny`" in card.text
    assert 'from_pretrained("pipeline")' in ModelCard.load(saved / "README.md").text
    prompted = Pipeline(driftar.build_model("nextstep_1_tiny"), tokenizer=ByteTokenizer())
    assert prompted.generate_model_card(repo_id="a/b").data["pipeline_tag"] == "text-to-image"


def test_a_model_card_that_is_there_stays(saved: Path) -> None:
    (saved / "README.md").write_text("Mine.")
    Pipeline(driftar.build_model("mar_tiny")).save_pretrained(saved)
    assert (saved / "README.md").read_text() == "Mine."
    assert Pipeline.from_pretrained(saved).model.name == "mar_tiny"


def test_stored_parts_can_be_replaced(saved: Path) -> None:
    pipeline = Pipeline.from_pretrained(saved, latent_scale=0.5)
    assert (pipeline.latent_scale, pipeline.latent_shift) == (0.5, 0.0)
    with pytest.raises(TypeError, match="decoder"):
        Pipeline.from_pretrained(saved, decoder="drift")


def test_a_directory_never_reaches_for_the_hub(
    saved: Path, hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(saved.parent)
    Pipeline.from_pretrained(saved)
    Pipeline.from_pretrained("pipeline")
    # The last is a name below a directory that exists: a mistyped path.
    for source in (saved.parent / "nothing", "nothing", "./no/thing", "a/b/c", "pipeline/x"):
        with pytest.raises(ValueError, match="neither a directory nor the id"):
            Pipeline.from_pretrained(source)
    assert hub.calls == []
