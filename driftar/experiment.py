"""An experiment in one directory: train both methods, sample them, find everything again.

``config.json``; ``mar/`` and ``drift_ar/`` with the training checkpoints, ``log.jsonl`` and the
trained ``model/``; ``samples/``; the report's files beside them.
"""

from __future__ import annotations

import json
import logging
import random
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from driftar.data import DatasetSplits, load_dataset
from driftar.files import write_json
from driftar.settings import differing_settings, from_mapping, to_mapping
from driftar.training.checkpoint import CheckpointStore
from driftar.training.config import ExperimentConfig, SamplingConfig
from driftar.training.lock import DirectoryLock
from driftar.training.loop import run_training
from driftar.training.manifest import CheckpointError, read_manifest
from driftar.training.model_file import load_model, save_model
from driftar.training.signals import StopSignals
from driftar.training.task import TrainingTask

__all__ = ["METHODS", "STAGES", "Experiment", "Samples", "generation_call"]

_log = logging.getLogger(__name__)
METHODS = {"mar": "MAR, diffusion head", "drift_ar": "Drift-AR, one step"}
STAGES = ("mar", "drift_ar")
_LARGEST_SEED = 2**63


@dataclass(frozen=True)
class Samples:
    """Generated images ``[N, C, H, W]``, the classes asked for ``[N]`` and, for Drift-AR, the
    attention entropy ``[N, L]``."""

    images: Tensor
    labels: Tensor
    entropy: Tensor | None


class Experiment:
    """The experiment in `directory`, with the settings stored there."""

    def __init__(self, directory: Path | str, config: ExperimentConfig) -> None:
        self.directory = Path(directory)
        self.config = config
        check_seed(config.seed)

    @classmethod
    def open(cls, directory: Path | str) -> Experiment:
        """An existing experiment; ValueError if `directory` holds none or its config is damaged."""
        config = stored_config(Path(directory))
        if config is None:
            raise ValueError(f"{directory} holds no experiment: run `driftar train` with it first")
        return cls(directory, config)

    def load_data(self) -> DatasetSplits:
        """The data set of the experiment."""
        return load_dataset(self.config.dataset)

    def log_path(self, stage: str) -> Path:
        """The step log of one stage."""
        return self.directory / stage / "log.jsonl"

    def load_model(self, stage: str) -> nn.Module:
        """The trained model of a stage; CheckpointError if it is not there or damaged."""
        path = self.directory / stage / "model"
        if not path.is_dir():
            raise CheckpointError(
                path, f"is not there: train the stage {stage} of this experiment first"
            )
        return load_model(path)

    def train(
        self,
        stages: Iterable[str] = STAGES,
        *,
        save_every: int = 200,
        fresh: bool = False,
        change_config: bool = False,
        progress: bool = True,
        stop: StopSignals | None = None,
    ) -> None:
        """Train the stages in order; an interrupted one continues, a finished one is kept.

        fresh: discard what the directory holds of an earlier run; change_config: continue it under
        other settings. Raises ValueError for an unknown stage or, without either, for settings
        that differ from the stored ones (listed), and what `run_training` raises.
        """
        stages = tuple(stages)
        for stage in stages:
            if stage not in STAGES:
                raise ValueError(f"stage must be one of {', '.join(STAGES)}; got {stage!r}")
        splits = self.load_data()
        with DirectoryLock(self.directory):
            if fresh:
                for stage in STAGES:
                    if (self.directory / stage).is_dir():
                        shutil.rmtree(self.directory / stage)
            elif not change_config:
                self._refuse_other_config()
            write_json(self.directory / "config.json", to_mapping(self.config))
            for stage in stages:
                self._train_stage(stage, splits, save_every, progress, stop)

    def sample(
        self,
        stage: str,
        labels: Tensor,
        *,
        seed: int,
        progress: bool = True,
        poll: Callable[[], None] | None = None,
    ) -> Samples:
        """Generate one image for each label, int64 ``[N]``, with the trained model of a stage.

        Raises ValueError for a seed out of range or samples that are not finite.
        """
        check_seed(seed)
        model = self.load_model(stage)
        generator = torch.Generator().manual_seed(seed)
        sampling = self.config.sampling
        images, entropies = [], []
        chunks = labels.split(sampling.batch_size)
        for chunk in tqdm(chunks, desc=f"sample {stage}", unit="batch", disable=not progress):
            if poll is not None:
                poll()
            result = generation_call(model, stage, sampling)(chunk, generator)
            images.append(result.latents)
            if result.entropy is not None:
                entropies.append(result.entropy)
        samples = torch.cat(images)
        if not bool(samples.isfinite().all()):
            raise ValueError(f"the samples of {stage} are not finite: its training diverged")
        return Samples(samples, labels, torch.cat(entropies) if entropies else None)

    def _refuse_other_config(self) -> None:
        stored = stored_config(self.directory)
        if stored is None:
            return
        lines = differing_settings(to_mapping(stored), to_mapping(self.config))
        if lines:
            raise ValueError(
                f"{self.directory} holds a run with other settings ({'; '.join(lines)}); give "
                "--fresh to discard it, --change-config to continue it, or another --output"
            )

    def _refuse_other_backbone(self) -> None:
        """ValueError if Drift-AR began on another baseline than the one that is there now."""
        record = self.directory / "drift_ar" / "backbone.json"
        current = read_manifest(self.directory / "mar" / "model", "model")["files"]
        if record.is_file() and json.loads(record.read_text(encoding="utf-8")) != current:
            raise ValueError(
                f"{self.directory} holds a Drift-AR trained on another baseline than its present "
                "one; give --fresh to discard both, or remove its folder drift_ar"
            )
        record.parent.mkdir(parents=True, exist_ok=True)
        write_json(record, current)

    def _train_stage(
        self,
        stage: str,
        splits: DatasetSplits,
        save_every: int,
        progress: bool,
        stop: StopSignals | None,
    ) -> None:
        directory = self.directory / stage
        _seed_global_generators(self.config.seed)
        task = self._build_task(stage, splits)
        run_training(
            task,
            CheckpointStore(directory),
            save_every=save_every,
            log_path=self.log_path(stage),
            progress=progress,
            stop=stop,
        )
        notes = {"step": task.num_steps, "seed": self.config.seed, "dataset": self.config.dataset}
        save_model(directory / "model", task.modules["ema"], **notes)
        _log.info("%s: model written to %s", stage, directory / "model")

    def _build_task(self, stage: str, splits: DatasetSplits) -> TrainingTask:
        config = self.config
        if stage == "mar":
            from driftar.training.mar_task import MARTask

            return MARTask(splits.train, config.mar, config.seed)
        from driftar.models.mar import MAR
        from driftar.training.drift_task import DriftARTask

        backbone = self.load_model("mar")
        if not isinstance(backbone, MAR):
            raise CheckpointError(self.directory / "mar" / "model", "is not a MAR model")
        self._refuse_other_backbone()
        return DriftARTask(splits.train, backbone, config.drift, config.seed)


def stored_config(directory: Path) -> ExperimentConfig | None:
    """The settings stored in an experiment's directory, None if there are none."""
    path = directory / "config.json"
    if not path.is_file():
        return None
    try:
        return from_mapping(ExperimentConfig, json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise ValueError(f"{path} is damaged or of another version: {error}") from error


def generation_call(
    model: nn.Module, stage: str, sampling: SamplingConfig
) -> Callable[[Tensor, torch.Generator], Any]:
    """``call(labels, generator) -> Generation`` under the sampling settings of a method."""
    generate: Any = model.generate_with_stats
    if stage == "mar":
        options: dict[str, Any] = {
            "num_iter": sampling.num_iter,
            "num_sampling_steps": sampling.num_sampling_steps,
            "temperature": sampling.temperature,
            "cfg": sampling.mar_cfg,
        }
    else:
        options = {"cfg": sampling.drift_cfg}
    return lambda labels, generator: generate(labels, generator=generator, **options)


def _seed_global_generators(seed: int) -> None:
    # Tasks draw from their own generators, but layers such as dropout use PyTorch's global one.
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def check_seed(seed: int) -> None:
    """ValueError unless `seed` is one that every generator takes."""
    if not 0 <= seed < _LARGEST_SEED:
        raise ValueError(f"seed must lie in [0, 2^63), got {seed}")
