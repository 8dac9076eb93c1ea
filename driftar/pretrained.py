"""A pipeline as a directory, on the disk or on the Hugging Face hub.

``config.json`` (architecture and scaling), ``model.safetensors``, ``vae/`` and ``tokenizer/`` where
there are such parts, and, written last, manifests with the size and SHA-256 of every file. A reader
sees the old pipeline, the new one, or an error; never a mixture.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from torch import nn

from driftar.files import fsync_directory, sha256_file, write_json
from driftar.optional import require
from driftar.prompts import ByteTokenizer, Tokenizer, load_tokenizer
from driftar.training.checkpoint import describe_module, raise_differences
from driftar.training.manifest import (
    MANIFEST_NAME,
    CheckpointError,
    read_manifest,
    write_manifest,
)
from driftar.training.model_file import load_model
from driftar.training.state_codec import read_tensors, tensor_differences, write_tensors

__all__ = [
    "MODEL_CARD_TEMPLATE",
    "PipelineParts",
    "locate",
    "read_parts",
    "replacing",
    "write_parts",
]

_KIND = "pipeline"
_CONFIG = "config.json"
_WEIGHTS = "model.safetensors"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_HUB_FILES = [_CONFIG, _WEIGHTS, MANIFEST_NAME, "vae/*", "tokenizer/*"]
_MODEL_CARD = "README.md"
# A Jinja template, filled in by `huggingface_hub`.
MODEL_CARD_TEMPLATE = """\
---
{{ card_data }}
---

```python
import driftar

pipeline = driftar.Pipeline.from_pretrained("{{ repo_id }}")
```

Architecture: `{{ name }}`. Method: {{ paper_url }}.
"""


@dataclass
class PipelineParts:
    """What a pipeline is made of; latents are ``(images' latents - shift) * scale``."""

    model: Any
    vae: nn.Module | None = None
    tokenizer: Tokenizer | None = None
    latent_scale: float = 1.0
    latent_shift: float = 0.0


def locate(source: Path | str, **hub_options: Any) -> Path:
    """The directory `source`, or a local copy of the hub repository "owner/name".

    Only the latter reaches for the network, with the options of
    ``huggingface_hub.snapshot_download``. ValueError if `source` is neither; the hub's own errors
    pass.
    """
    path = Path(source)
    if path.is_dir():
        return path
    # A name below an existing directory is a path with a mistake in it, not a repository.
    if not _HUB_ID.fullmatch(str(source)) or path.parent.is_dir() or path.exists():
        raise ValueError(f"{source} is neither a directory nor the id of a hub repository")
    return Path(snapshot_download(str(source), allow_patterns=_HUB_FILES, **hub_options))


@contextmanager
def replacing(directory: Path) -> Iterator[Path]:
    """A new directory to write a pipeline to, which then takes the place of that in `directory`.

    Everything lies on the disk beside its destination before the first file is replaced. A model
    card that `directory` has stays. Raises CheckpointError if the disk refuses; what was there is
    then as it was.
    """
    staging = directory / f".staging-{os.getpid()}"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir()
        yield staging
        if (directory / _MODEL_CARD).exists():
            (staging / _MODEL_CARD).unlink(missing_ok=True)
        files = sorted(path.relative_to(staging) for path in staging.rglob("*") if path.is_file())
        # The top manifest vouches for the rest, so it comes last.
        for file in sorted(files, key=lambda file: file == Path(MANIFEST_NAME)):
            (directory / file).parent.mkdir(exist_ok=True)
            os.replace(staging / file, directory / file)
        fsync_directory(directory)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(directory, f"cannot be written: {error}") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def write_parts(directory: Path, parts: PipelineParts) -> None:
    """Write a pipeline into an empty directory; TypeError for a part that cannot be stored."""
    config: dict[str, Any] = {
        **_write_model(directory, "model", parts.model),
        "latent_scale": parts.latent_scale,
        "latent_shift": parts.latent_shift,
        "byte_tokenizer": isinstance(parts.tokenizer, ByteTokenizer),
        "folders": {},
    }
    for name, part in (("vae", parts.vae), ("tokenizer", parts.tokenizer)):
        if part is not None and not isinstance(part, ByteTokenizer):
            config["folders"][name] = _fill_folder(directory / name, name, part)
    write_json(directory / _CONFIG, config)
    write_manifest(directory, _KIND, [_CONFIG, _WEIGHTS], {})


def _write_model(directory: Path, role: str, model: nn.Module) -> dict[str, Any]:
    """Store the weights of a model that `driftar.build_model` knows; how to build it again."""
    description = describe_module(model)
    if description["name"] is None or description["config"] is None:
        raise TypeError(f"{role} must have a name (str) and a config (dict) to be rebuilt from")
    tensors = model.state_dict()
    dtypes = {str(tensor.dtype) for tensor in tensors.values() if tensor.is_floating_point()}
    if len(dtypes) != 1:
        raise TypeError(f"{role} must have one floating dtype to be stored, has {sorted(dtypes)}")
    write_tensors(directory / _WEIGHTS, tensors)
    dtype = dtypes.pop().removeprefix("torch.")
    return {"name": description["name"], "config": description["config"], "dtype": dtype}


def _fill_folder(folder: Path, name: str, part: Any) -> dict[str, Any]:
    """Store a part by its own means or as a model of ours; how to read it, and its manifest."""
    if hasattr(part, "save_pretrained"):
        part.save_pretrained(folder)
        entry = {"class": type(part).__name__}
    else:
        folder.mkdir()
        entry = _write_model(folder, f"{name} of class {type(part).__name__}", part)
    files = [path.name for path in folder.iterdir() if path.is_file()]
    write_manifest(folder, name, files, {})
    return {**entry, "manifest": sha256_file(folder / MANIFEST_NAME)}


def read_parts(directory: Path) -> PipelineParts:
    """Rebuild the pipeline in `directory`, or one around a model that training stored there.

    Raises CheckpointError for a damaged or foreign directory and ArchitectureError, with the
    differing keys, when weights and configuration do not fit each other.
    """
    if not (directory / _CONFIG).is_file():
        return PipelineParts(load_model(directory))
    if not (directory / MANIFEST_NAME).is_file():
        raise CheckpointError(
            directory,
            "holds no driftar pipeline; official checkpoints are read by driftar.load_official",
        )
    read_manifest(directory, _KIND, follow_links=True)
    try:
        config = json.loads((directory / _CONFIG).read_text(encoding="utf-8"))
        parts = PipelineParts(
            _read_model(directory, config),
            latent_scale=float(config["latent_scale"]),
            latent_shift=float(config["latent_shift"]),
        )
        folders = dict(config["folders"])
        for name, entry in folders.items():
            _check_folder(directory / name, name, entry["manifest"])
        if "vae" in folders:
            parts.vae = _read_vae(directory / "vae", folders["vae"])
        if "tokenizer" in folders:
            parts.tokenizer = load_tokenizer(directory / "tokenizer")
        elif config["byte_tokenizer"]:
            parts.tokenizer = ByteTokenizer()
    except (KeyError, TypeError, ValueError, OSError) as error:
        raise CheckpointError(directory, f"its configuration does not fit: {error}") from error
    return parts


def _read_model(directory: Path, config: dict[str, Any]) -> nn.Module:
    import driftar

    dtype = getattr(torch, str(config["dtype"]), None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"unknown dtype {config['dtype']!r}")
    model: nn.Module = driftar.build_model(config["name"], **config["config"]).to(dtype)
    tensors = read_tensors(directory / _WEIGHTS)
    raise_differences(directory, tensor_differences(model.state_dict(), tensors))
    model.load_state_dict(tensors, strict=True)
    return model.eval()


def _check_folder(folder: Path, name: str, digest: str) -> None:
    if name not in ("vae", "tokenizer"):
        raise ValueError(f"unknown folder {name!r}")
    read_manifest(folder, name, follow_links=True)
    if sha256_file(folder / MANIFEST_NAME) != digest:
        raise CheckpointError(folder, "belongs to another save of the pipeline")


def _read_vae(folder: Path, entry: dict[str, Any]) -> nn.Module:
    if "name" in entry:
        return _read_model(folder, entry)
    diffusers = require("diffusers", "vae", "the VAE of this pipeline")
    class_name = str(entry["class"])
    if not class_name.startswith("Autoencoder") or not hasattr(diffusers, class_name):
        raise ValueError(f"unknown VAE class {class_name!r}")
    vae: nn.Module = getattr(diffusers, class_name).from_pretrained(folder, local_files_only=True)
    return vae.eval()
