"""How a pipeline asks each kind of model for a batch of images: by class label or by prompt."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from driftar.decoding.speculative import speculative_generate
from driftar.models.diffusion import DiffusionSchedule
from driftar.models.drift_stage import DriftStage
from driftar.models.generation import Generation, GenerationStats, check_count, check_labels
from driftar.models.nextstep import NextStep
from driftar.prompts import Tokenizer, encode_prompts
from driftar.seeding import ImageNoise, Source, reveal_orders

__all__ = ["LabelCall", "ModelCall", "PromptCall", "SpeculativeCall", "SpeculativeStats", "call_of"]

Labels = int | Sequence[int] | Tensor
Prompts = str | Sequence[str]

# Arguments of the models' generate that the pipeline gives itself.
_OWN_ARGUMENTS = {
    *("class_labels", "input_ids", "attention_mask", "latents", "cfg", "cfg_img", "num_steps"),
    *("num_sampling_steps", "num_images_per_caption", "noise", "orders", "generator", "progress"),
}


class ModelCall:
    """Calls of one model's ``generate``, whose own arguments decide what is possible."""

    def __init__(self, model: Any, generate: Callable[..., Any] | None = None) -> None:
        self.model = model
        self._generate = model.generate_with_stats if generate is None else generate
        self._parameters = inspect.signature(self._generate).parameters

    def conditions(self, class_labels: Labels | None, prompt: Prompts | None) -> list[Any]:
        """What is asked for, one entry for each; TypeError or ValueError for a wrong kind."""
        raise NotImplementedError

    def ticks(self, options: Mapping[str, Any]) -> int:
        """Steps of the progress bar for one batch."""
        raise NotImplementedError

    def run(
        self, conditions: list[Any], options: Mapping[str, Any], update: Callable[[], Any]
    ) -> Generation:
        """Generate an image for each condition; ``update`` is called once per tick."""
        raise NotImplementedError

    def check_options(self, options: Mapping[str, Any]) -> None:
        """TypeError, listing what the model takes, for an option that it does not have."""
        known = sorted(set(self._parameters) - _OWN_ARGUMENTS)
        unknown = [name for name in options if name not in known]
        if unknown:
            raise TypeError(
                f"unknown argument {', '.join(unknown)}; besides the pipeline's own, "
                f"{self.model.name} takes: {', '.join(known) or 'none'}"
            )

    def step_options(self, steps: int | None) -> dict[str, Any]:
        """``num_inference_steps`` under the model's name for it; ValueError if it has none."""
        if steps is None:
            return {}
        check_count("num_inference_steps", steps)
        if "num_steps" in self._parameters:
            return {"num_steps": steps}
        if "num_sampling_steps" in self._parameters:
            return {"num_sampling_steps": str(steps)}
        raise ValueError(
            f"{self.model.name} decodes in one evaluation: num_inference_steps does not apply"
        )

    def random_options(
        self, source: Source, start: int, count: int, options: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Arguments that carry the randomness of the images ``start`` to ``start + count``."""
        if isinstance(source, torch.Generator):
            return {"generator": source}
        generators = source[start : start + count]
        drawn: dict[str, Any] = {}
        if "orders" in self._parameters:
            drawn["orders"] = reveal_orders(generators, self.model.seq_len)
        steps = self._parameters.get("num_sampling_steps")
        if steps is None or options["cfg"] == 1:
            return drawn | {"noise": ImageNoise(generators)}
        # MAR's sampler draws a start per pair of branches, then a doubled tensor per step.
        kept = len(DiffusionSchedule.build(options.get("num_sampling_steps", steps.default)))
        return drawn | {"noise": ImageNoise(generators, lambda index: index % (kept + 1) > 0)}


class LabelCall(ModelCall):
    """Models conditioned on classes."""

    def conditions(self, class_labels: Labels | None, prompt: Prompts | None) -> list[Any]:
        if class_labels is None or prompt is not None:
            raise ValueError(f"{self.model.name} takes class_labels, not prompt")
        try:
            labels = torch.as_tensor(class_labels)
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(f"class_labels must be ints, got {class_labels!r}") from error
        labels = labels[None] if labels.dim() == 0 else labels
        if labels.numel() == 0:
            return []
        checked: list[Any] = check_labels(labels, self.model.num_classes).tolist()
        return checked

    def ticks(self, options: Mapping[str, Any]) -> int:
        return 1

    def run(
        self, conditions: list[Any], options: Mapping[str, Any], update: Callable[[], Any]
    ) -> Generation:
        made: Generation = self._generate(torch.tensor(conditions), **options)
        update()
        return made


@dataclass
class SpeculativeStats(GenerationStats):
    """Cost of a speculative call and, per image, the length of the accepted prefix ``[B]``."""

    accepted_lengths: Tensor = field(default_factory=lambda: torch.zeros(0))


class SpeculativeCall(LabelCall):
    """Drift-AR with drafted features where the target agrees, as published."""

    def __init__(self, model: DriftStage) -> None:
        super().__init__(model, partial(speculative_generate, model))

    def run(
        self, conditions: list[Any], options: Mapping[str, Any], update: Callable[[], Any]
    ) -> Generation:
        made = self._generate(torch.tensor(conditions), **options)
        update()
        stats = SpeculativeStats(decoder_nfe=1, accepted_lengths=made.accepted_lengths)
        return Generation(made.latents, made.draft_entropy, stats)


class PromptCall(ModelCall):
    """NextStep-1: text in, tokens one by one.

    Args:
        model: to be called.
        tokenizer: of the prompts.
        negative_prompt: of the unconditional branch.
    """

    def __init__(self, model: NextStep, tokenizer: Tokenizer, negative_prompt: str) -> None:
        super().__init__(model)
        self._tokenizer, self._negative_prompt = tokenizer, negative_prompt

    def conditions(self, class_labels: Labels | None, prompt: Prompts | None) -> list[Any]:
        if prompt is None or class_labels is not None:
            raise ValueError(f"{self.model.name} takes prompt, not class_labels")
        texts = [prompt] if isinstance(prompt, str) else list(prompt)
        for text in texts:
            if not isinstance(text, str):
                raise TypeError(f"prompt must be text or texts, got {type(text).__name__}")
        return texts

    def ticks(self, options: Mapping[str, Any]) -> int:
        return math.prod(self._grid(options))

    def run(
        self, conditions: list[Any], options: Mapping[str, Any], update: Callable[[], Any]
    ) -> Generation:
        ids, mask = encode_prompts(
            self._tokenizer,
            conditions,
            boi=self.model.settings.boi,
            grid_size=self._grid(options),
            negative_prompt=None if options["cfg"] == 1 else self._negative_prompt,
        )
        device = self.model.embed_tokens.weight.device
        # As many images as rows "per caption": every image gets noise of its own.
        made: Generation = self._generate(
            ids.to(device),
            mask.to(device),
            num_images_per_caption=len(conditions),
            progress=update,
            **options,
        )
        return made

    def _grid(self, options: Mapping[str, Any]) -> tuple[int, int]:
        grid: tuple[int, int] | None = options.get("grid_size")
        side = math.isqrt(self.model.seq_len)
        return (side, side) if grid is None else grid


def call_of(
    model: Any, tokenizer: Tokenizer | None, negative_prompt: str, speculative: bool
) -> ModelCall:
    """How to call a model; ValueError for a prompt model without a tokeniser, or no draft."""
    if speculative:
        if not isinstance(model, DriftStage):
            raise ValueError(f"{model.name} has no draft to decode speculatively with")
        return SpeculativeCall(model)
    if not isinstance(model, NextStep):
        return LabelCall(model)
    if tokenizer is None:
        raise ValueError(f"{model.name} needs a tokeniser: Pipeline(..., tokenizer=...)")
    return PromptCall(model, tokenizer, negative_prompt)
