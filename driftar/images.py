"""From what a model generates to what a caller wants: latents, tensors, arrays or pictures."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from driftar.optional import require

__all__ = ["OUTPUT_TYPES", "check_pixels", "convert_images", "decode_latents", "latent_scaling"]

OUTPUT_TYPES = ("pil", "np", "pt", "latent")
_PIXEL_CHANNELS = (1, 3)


def latent_scaling(model: Any, vae: nn.Module | None) -> tuple[float, float]:
    """Scale and shift of :func:`decode_latents`: the VAE's own, else the model's configuration."""
    config: Any = getattr(vae, "config", None)
    scale = getattr(config, "scaling_factor", None)
    if scale is None:
        return float(_latent_config(model).get("latent_scale", 1.0)), 0.0
    # diffusers stores None for "no shift".
    return float(scale), float(getattr(config, "shift_factor", None) or 0.0)


def check_pixels(model: Any) -> None:
    """ValueError unless the latents of a model are pixels, which need no VAE."""
    config = _latent_config(model)
    channels = config.get("vae_embed_dim", config.get("latent_channels"))
    if channels not in _PIXEL_CHANNELS:
        raise ValueError(
            f"{model.name} makes latents of {channels} channels and the pipeline has no VAE to "
            'decode them: give Pipeline(..., vae=...) one, or ask for output_type="latent"'
        )


def _latent_config(model: Any) -> dict[str, Any]:
    """The part of a configuration that describes the latents."""
    config: dict[str, Any] = model.config
    return config.get("backbone", config)


def decode_latents(latents: Tensor, vae: nn.Module | None, scale: float, shift: float) -> Tensor:
    """Images ``[B, C, H, W]``, nominally in [-1, 1], of latents ``[B, c, h, w]``.

    The VAE decodes ``latents / scale + shift``; without one the latents are the images.
    """
    if vae is None:
        return latents
    weight = next(vae.parameters())
    decode: Any = vae.decode
    result = decode((latents / scale + shift).to(weight.device, weight.dtype))
    # diffusers wraps the tensor.
    images: Tensor = getattr(result, "sample", result)
    return images


def convert_images(images: Tensor, output_type: str) -> Any:
    """Images in [-1, 1] ``[B, C, H, W]`` as diffusers' pipelines return them, on the CPU.

    "pt": fp32 ``[B, C, H, W]`` in [0, 1]; "np": the same as an array ``[B, H, W, C]``; "pil": a
    list of pictures. ValueError for images that are not finite.
    """
    if not bool(images.isfinite().all()):
        raise ValueError("the images are not finite: the model diverged in training or sampling")
    unit = ((images.float() + 1) / 2).clamp(0, 1).cpu()
    if output_type == "pt":
        return unit
    last = unit.permute(0, 2, 3, 1).contiguous()
    if output_type == "np":
        return last.numpy()
    pictures = require("PIL.Image", "train", 'output_type="pil"')
    pixels = (last * 255).round().to(torch.uint8).numpy()
    grey = pixels.shape[-1] == 1
    return [pictures.fromarray(image[..., 0] if grey else image) for image in pixels]
