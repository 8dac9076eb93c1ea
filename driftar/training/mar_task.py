"""Training of MAR: masked tokens predicted by the diffusion head (arXiv 2406.11838)."""

from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from driftar.models.mar import MAR
from driftar.models.registry import build_model, model_class

from . import schedule
from .config import MARTrainingConfig
from .optimisation import clipped_backward, global_seed, parameter_groups, seeded_generator

if TYPE_CHECKING:
    from driftar.data import ImageDataset

DIFFUSION_STEPS = 1000


class MARTask:
    """One run of MAR training; follows the training loop's task protocol.

    Args:
        dataset: images ``[N, C, H, W]`` in [-1, 1] that fit the model.
        config: settings.
        seed: of initialisation and every random draw.

    Raises:
        TypeError, ValueError: settings that do not fit, or a model that is no MAR.
    """

    name = "mar"

    def __init__(self, dataset: ImageDataset, config: MARTrainingConfig, seed: int) -> None:
        if config.num_steps < 1 or config.batch_size < 1 or config.diffusion_batch_mul < 1:
            raise ValueError(
                "num_steps, batch_size and diffusion_batch_mul must be at least 1, got "
                f"{config.num_steps}, {config.batch_size}, {config.diffusion_batch_mul}"
            )
        if not 0 < config.mask_rate_min <= 1 or config.mask_rate_std <= 0:
            raise ValueError(
                "mask_rate_min must lie in (0, 1] and mask_rate_std be > 0, got "
                f"{config.mask_rate_min} and {config.mask_rate_std}"
            )
        if model_class(config.model) is not MAR:
            raise ValueError(f"model must name a MAR, got {config.model!r}")
        self.config, self.num_steps = config, config.num_steps
        generator = seeded_generator(seed)
        with global_seed(generator):
            model: MAR = build_model(config.model, class_num=dataset.num_classes)
        self.model = model
        self.average = copy.deepcopy(model).requires_grad_(False).eval()
        self._tokens = model.patchify(dataset.images)
        self._labels = dataset.labels
        optimizer = torch.optim.AdamW(
            parameter_groups([(model, 1.0)], config.weight_decay),
            lr=config.learning_rate,
            betas=(0.9, 0.95),
        )
        self.modules: dict[str, nn.Module] = {"model": model, "ema": self.average}
        self.optimizers: dict[str, torch.optim.Optimizer] = {"model": optimizer}
        self.generators: dict[str, torch.Generator] = {"training": generator}

    def step(self, step: int) -> dict[str, float]:
        """One optimisation step; returns the scalars to log."""
        config, optimizer = self.config, self.optimizers["model"]
        rate = schedule.follow(optimizer, config, step)
        loss = self._loss()
        norm = clipped_backward(loss, optimizer, config.gradient_clip)
        if norm is None:
            return {"loss": float(loss.detach()), "learning_rate": rate, "skipped": 1.0}
        optimizer.step()
        schedule.update_average(self.average, self.model, step, decay=config.ema_decay)
        return {"loss": float(loss.detach()), "grad_norm": norm, "learning_rate": rate}

    def extra_state(self) -> dict[str, Any]:
        """Nothing beside modules, optimisers and generators."""
        return {}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        """Counterpart of :meth:`extra_state`."""
        if state:
            raise ValueError(f"state must be empty for MAR, got keys {sorted(state)}")

    def _loss(self) -> Tensor:
        config, generator = self.config, self.generators["training"]
        batch = config.batch_size
        chosen = torch.randint(len(self._labels), (batch,), generator=generator)
        dropped = torch.rand(batch, generator=generator) < config.label_drop
        labels = self._labels[chosen].masked_fill(dropped, -1)
        length, channels = self._tokens.shape[1:]
        count = self._masked_count(length)
        ranks = torch.rand(batch, length, generator=generator).argsort(1)
        mask = ranks < count
        shape = (config.diffusion_batch_mul, batch * count)
        t = torch.randint(DIFFUSION_STEPS, shape, generator=generator)
        noise = torch.randn(*shape, channels, generator=generator)
        self.model.train()
        with global_seed(generator):
            condition = self.model.condition(labels)
            return self.model.loss(self._tokens[chosen], mask, condition, t, noise)

    def _masked_count(self, length: int) -> int:
        """Tokens to mask: the mask rate is normal around 1, truncated to [mask_rate_min, 1]."""
        config = self.config
        lowest = (config.mask_rate_min - 1) / config.mask_rate_std
        floor = 0.5 * (1 + math.erf(lowest / math.sqrt(2)))
        uniform = torch.rand((), generator=self.generators["training"], dtype=torch.float64)
        quantile = torch.special.ndtri(floor + (0.5 - floor) * uniform)
        rate = min(1.0, 1 + config.mask_rate_std * float(quantile))
        return max(1, math.ceil(length * rate))
