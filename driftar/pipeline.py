"""Images in one call, from any model that ``driftar.build_model`` makes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from driftar.hub import PretrainedPipeline
from driftar.images import (
    OUTPUT_TYPES,
    check_pixels,
    convert_images,
    decode_latents,
    latent_scaling,
)
from driftar.model_call import Labels, Prompts, SpeculativeStats, call_of
from driftar.models.generation import GenerationStats, Stopwatch, check_count, check_finite
from driftar.models.nextstep import NextStep
from driftar.pretrained import PipelineParts
from driftar.prompts import Tokenizer
from driftar.seeding import Source, image_sources

__all__ = ["Pipeline", "PipelineOutput", "PipelineStats"]

DECODERS = ("diffusion", "drift")


@dataclass
class PipelineStats:
    """What a call did and what it cost.

    Attributes:
        seed: image i was made with seed ``seed + i``; None if the caller gave generators.
        decoder_nfe: evaluations of the decoder network in sequence, for one batch of images.
        accepted_lengths: draft tokens accepted per image ``[N]``, or None without speculation.
        entropy: normalised attention entropy ``[N, L]`` (the draft's with speculation), or None for
            models without one.
        ar_seconds, decoder_seconds, vae_seconds, total_seconds: wall times of all batches.
    """

    seed: int | None
    decoder_nfe: int = 0
    accepted_lengths: Tensor | None = None
    entropy: Tensor | None = None
    ar_seconds: float = 0.0
    decoder_seconds: float = 0.0
    vae_seconds: float = 0.0
    total_seconds: float = 0.0

    def add(self, cost: GenerationStats, vae_seconds: float, total_seconds: float) -> None:
        """Count one batch."""
        self.decoder_nfe = max(self.decoder_nfe, cost.decoder_nfe)
        self.ar_seconds += cost.ar_seconds
        self.decoder_seconds += cost.decoder_seconds
        self.vae_seconds += vae_seconds
        self.total_seconds += total_seconds


@dataclass
class PipelineOutput:
    """Result of a call: ``images`` in the asked form (a list of PIL images), and ``stats``."""

    images: Any
    stats: PipelineStats


class Pipeline(PretrainedPipeline):
    """A model with what it needs to take labels or prompts and give pictures.

    Args:
        model: made by ``driftar.build_model`` or ``driftar.load_official``.
        vae: decodes the model's latents: an autoencoder of `diffusers`, or any module with
            ``decode(latents)``. Models of 1 or 3 channels make pixels and need none.
        tokenizer: of `transformers`; for models that take prompts.
        latent_scale, latent_shift: latents are decoded as ``latents / scale + shift``; those of the
            VAE's, else the model's configuration by default.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        vae: nn.Module | None = None,
        tokenizer: Tokenizer | None = None,
        latent_scale: float | None = None,
        latent_shift: float | None = None,
    ) -> None:
        if not hasattr(model, "generate_with_stats"):
            raise TypeError(f"model must have generate_with_stats, {type(model).__name__} has not")
        self.model: Any = model.eval()
        self.vae = None if vae is None else vae.eval()
        self.tokenizer = tokenizer
        scale, shift = latent_scaling(model, vae)
        self.latent_scale = scale if latent_scale is None else latent_scale
        self.latent_shift = shift if latent_shift is None else latent_shift

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        device: torch.device = next(self.model.parameters()).device
        return device

    @property
    def decoder(self) -> str:
        """How the model makes tokens: "diffusion" (many evaluations) or "drift" (one)."""
        return "drift" if hasattr(self.model, "prior") else "diffusion"

    @property
    def takes_prompts(self) -> bool:
        """Whether the model is asked by prompt; otherwise by class label."""
        return isinstance(self.model, NextStep)

    def to(self, *arguments: Any, **options: Any) -> Pipeline:
        """Move or cast the model and the VAE, as ``nn.Module.to``."""
        self.model.to(*arguments, **options)
        if self.vae is not None:
            self.vae.to(*arguments, **options)
        return self

    def __call__(
        self,
        class_labels: Labels | None = None,
        *,
        prompt: Prompts | None = None,
        negative_prompt: str = "",
        num_images: int = 1,
        guidance_scale: float = 1.0,
        num_inference_steps: int | None = None,
        seed: int | None = None,
        generator: Source | None = None,
        decoder: str | None = None,
        speculative: bool = False,
        output_type: str = "pil",
        batch_size: int | None = None,
        progress: bool = True,
        **options: Any,
    ) -> PipelineOutput:
        """Generate images.

        Image i of a call with seed s is image 0 of a call with seed s + i (up to rounding):
        batches do not matter.

        Args:
            class_labels: int, ints or int tensor ``[K]``; -1 is unconditional.
            prompt: text or texts, for models that take prompts.
            negative_prompt: what guidance leads away from.
            num_images: images for each label or prompt, neighbours in the result.
            guidance_scale: classifier-free guidance; 1 is none.
            num_inference_steps: evaluations of a diffusion decoder per token or image.
            seed: in [0, 2^64); drawn from PyTorch's global generator (and reported) if neither it
                nor ``generator`` is given.
            generator: instead of a seed: one for each image, or one from which everything is drawn
                in order (then the batch does matter).
            decoder: "diffusion" or "drift"; the model's own by default.
            speculative: draft features and verify them, for models with a draft.
            output_type: "pil", "np" ``[N, H, W, C]`` and "pt" ``[N, C, H, W]`` in [0, 1], or
                "latent" for the model's own output.
            batch_size: images generated side by side; all by default.
            progress: show a progress bar.
            options: further arguments of the model's ``generate``.

        Raises:
            TypeError, ValueError: an argument of a wrong type or range, that the model does not
                have, or that its family cannot do; or images that are not finite.
        """
        self._check_request(decoder, output_type)
        call = call_of(self.model, self.tokenizer, negative_prompt, speculative)
        call.check_options(options)
        asked = call.conditions(class_labels, prompt)
        if not asked:
            raise ValueError("at least one label or prompt must be given, got none")
        check_count("num_images", num_images)
        conditions = [condition for condition in asked for _ in range(num_images)]
        count = len(conditions)
        options |= call.step_options(num_inference_steps)
        options["cfg"] = check_finite("guidance_scale", guidance_scale)
        seed, source = image_sources(seed, generator, count)
        size = count if batch_size is None else check_count("batch_size", batch_size)
        stats = PipelineStats(seed)
        results: list[Tensor] = []
        entropies: list[Tensor] = []
        lengths: list[Tensor] = []
        starts = range(0, count, size)
        ticks = len(starts) * call.ticks(options)
        with torch.no_grad(), tqdm(total=ticks, desc=self.model.name, disable=not progress) as bar:
            for start in starts:
                chunk = conditions[start : start + size]
                drawn = call.random_options(source, start, len(chunk), options)
                watch = Stopwatch(self.device)
                made = call.run(chunk, options | drawn, bar.update)
                generated = watch.lap()
                results.append(self._decode(made.latents, output_type))
                decoded = watch.lap()
                if made.entropy is not None:
                    entropies.append(made.entropy)
                if isinstance(made.stats, SpeculativeStats):
                    lengths += [made.stats.accepted_lengths]
                stats.add(made.stats, 0.0 if self.vae is None else decoded, generated + decoded)
        stats.entropy = torch.cat(entropies) if entropies else None
        stats.accepted_lengths = torch.cat(lengths) if lengths else None
        images = torch.cat(results)
        if output_type != "latent":
            images = convert_images(images, output_type)
        return PipelineOutput(images, stats)

    def _parts(self) -> PipelineParts:
        return PipelineParts(
            self.model, self.vae, self.tokenizer, self.latent_scale, self.latent_shift
        )

    def _check_request(self, decoder: str | None, output_type: str) -> None:
        name = self.model.name
        if decoder is not None and decoder not in DECODERS:
            raise ValueError(f"decoder must be one of {', '.join(DECODERS)}; got {decoder!r}")
        if decoder is not None and decoder != self.decoder:
            raise ValueError(f'{name} has no decoder="{decoder}", only "{self.decoder}"')
        if output_type not in OUTPUT_TYPES:
            raise ValueError(
                f"output_type must be one of {', '.join(OUTPUT_TYPES)}; got {output_type!r}"
            )
        # Before any work: generation may take minutes.
        if output_type != "latent" and self.vae is None:
            check_pixels(self.model)

    def _decode(self, latents: Tensor, output_type: str) -> Tensor:
        if output_type == "latent":
            return latents
        return decode_latents(latents, self.vae, self.latent_scale, self.latent_shift)
