"""Constructor arguments of the published model sizes, and of tiny ones that train on a CPU."""

from __future__ import annotations

from typing import Any

_HEAD_OPTIONS = ("diffloss_d", "diffloss_w", "clip_denoised")

# 8x8 grey images in [-1, 1].
_TINY_IMAGES: dict[str, Any] = {
    "img_size": 8,
    "vae_stride": 1,
    "vae_embed_dim": 1,
    "class_num": 10,
    "buffer_size": 4,
    "dropout": 0.0,
    "latent_scale": 1.0,
}


def _transformer(width: int, depth: int, heads: int) -> dict[str, Any]:
    """Encoder and decoder of equal width, depth and heads."""
    return {
        f"{part}_{key}": value
        for part in ("encoder", "decoder")
        for key, value in (("embed_dim", width), ("depth", depth), ("num_heads", heads))
    }


_BASE, _LARGE, _HUGE = (768, 12, 12), (1024, 16, 16), (1280, 20, 16)


# 16 tokens of 2x2 pixels.
_MAR_TINY: dict[str, Any] = {
    **_TINY_IMAGES,
    **_transformer(64, 2, 4),
    "decoder_depth": 3,
    "patch_size": 2,
    "diffloss_d": 3,
    "diffloss_w": 96,
    "clip_denoised": 1.0,
}
MAR: dict[str, dict[str, Any]] = {
    "mar_tiny": _MAR_TINY,
    "mar_base": {**_transformer(*_BASE), "diffloss_d": 6, "diffloss_w": 1024},
    "mar_large": {**_transformer(*_LARGE), "diffloss_d": 8, "diffloss_w": 1280},
    "mar_huge": {**_transformer(*_HUGE), "diffloss_d": 12, "diffloss_w": 1536},
}


TRANSDIFF: dict[str, dict[str, Any]] = {
    "transdiff_tiny": {**_TINY_IMAGES, **_transformer(64, 2, 4), "seq_len": 16},
    "transdiff_base": _transformer(*_BASE),
    "transdiff_large": _transformer(*_LARGE),
    "transdiff_huge": _transformer(*_HUGE),
}
TRANSDIFF_MRAR: dict[str, dict[str, Any]] = {
    "transdiff_mrar_tiny": {**_TINY_IMAGES, **_transformer(64, 2, 4), "patch_size": 2},
    "transdiff_mrar_base": _transformer(*_BASE),
    "transdiff_mrar_large": _transformer(*_LARGE),
    "transdiff_mrar_huge": _transformer(*_HUGE),
}


DRIFT_AR: dict[str, dict[str, Any]] = {
    "drift_ar_tiny": {
        **_TINY_IMAGES,
        **_transformer(64, 2, 4),
        "patch_size": 2,
        "draft_depth": 2,
    },
    "drift_ar_base": _transformer(*_BASE),
    "drift_ar_large": _transformer(*_LARGE),
    "drift_ar_huge": _transformer(*_HUGE),
}


def backbone_config(config: dict[str, Any]) -> dict[str, Any]:
    """The part of a MAR's configuration that describes its backbone."""
    return {key: value for key, value in config.items() if key not in _HEAD_OPTIONS}


DRIFT_AR_MAR: dict[str, dict[str, Any]] = {
    "drift_ar_mar_tiny": {
        "backbone": backbone_config(_MAR_TINY),
        "drift_depth": 2,
        "drift_num_heads": 4,
        "draft_depth": 2,
        "draft_num_heads": 4,
        "dropout": 0.0,
    },
}

AUTOENCODER_KL: dict[str, dict[str, Any]] = {
    "kl16": {"embed_dim": 16},
    "kl16_tiny": {
        "embed_dim": 4,
        "ch": 8,
        "ch_mult": [1, 1, 2],
        "groups": 4,
        "encoder_attention": [2],
    },
}
