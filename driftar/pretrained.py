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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from driftar.files import fsync_directory, sha256_file, write_json, write_text
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

__all__ = ["PipelineParts", "locate", "read_parts", "upload", "write_parts"]

_KIND = "pipeline"
_CONFIG = "config.json"
_WEIGHTS = "model.safetensors"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_HUB_FILES = [_CONFIG, _WEIGHTS, MANIFEST_NAME, "vae/*", "tokenizer/*"]
_MODEL_CARD = """\
---
library_name: driftar
pipeline_tag: {task}
tags: [driftar, image-generation]
---

```python
import driftar

pipeline = driftar.Pipeline.from_pretrained("{repo_id}")
```

Architecture: `{name}`.
"""


@dataclass
class PipelineParts:
    """What a pipeline is made of; latents are ``(images' latents - shift) * scale``."""

    model: Any
    vae: nn.Module | None = None
    tokenizer: Tokenizer | None = None
    latent_scale: float = 1.0
    latent_shift: float = 0.0


def locate(
    source: Path | str,
    *,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: Path | str | None = None,
    local_files_only: bool = False,
) -> Path:
    """The directory `source`, or a local copy of the hub repository "owner/name".

    Only the latter reaches for the network. ValueError if `source` is neither, ImportError
    without `huggingface_hub`; the hub's own errors pass.
    """
    path = Path(source)
    if path.is_dir():
        return path
    # A name below an existing directory is a path with a mistake in it, not a repository.
    if not _HUB_ID.fullmatch(str(source)) or path.parent.is_dir() or path.exists():
        raise ValueError(f"{source} is neither a directory nor the id of a hub repository")
    hub = require("huggingface_hub", "hub", f"loading {source} from the hub")
    copy = hub.snapshot_download(
        str(source),
        revision=revision,
        token=token,
        cache_dir=cache_dir,
        local_files_only=local_files_only,
        allow_patterns=_HUB_FILES,
    )
    return Path(copy)


def upload(parts: PipelineParts, folder: Path, repo_id: str, **options: Any) -> str:
    """Send a written pipeline and a model card to the hub; the address of the commit.

    options: ``private`` and ``token`` and those of ``huggingface_hub.HfApi.upload_folder``.
    """
    hub = require("huggingface_hub", "hub", "push_to_hub")
    api = hub.HfApi(token=options.pop("token", None))
    name = api.create_repo(repo_id, private=options.pop("private", None), exist_ok=True).repo_id
    task = "unconditional-image-generation" if parts.tokenizer is None else "text-to-image"
    card = _MODEL_CARD.format(task=task, repo_id=name, name=parts.model.name)
    write_text(folder / "README.md", card)
    return str(api.upload_folder(repo_id=name, folder_path=folder, **options))


def write_parts(directory: Path, parts: PipelineParts) -> None:
    """Write a pipeline into `directory`, over an earlier one if there is one.

    Everything is written and forced to the disk beside its destination before the first file is
    replaced. Raises TypeError for a part that cannot be stored, CheckpointError if the disk
    refuses; what was there is then as it was.
    """
    staging = directory / f".staging-{os.getpid()}"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir()
        _fill(staging, parts)
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


def _fill(directory: Path, parts: PipelineParts) -> None:
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
