"""NextStep-1's configuration: the names of its checkpoints' config.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any


@dataclass(frozen=True)
class NextStepConfig:
    """Architecture of a NextStep-1 model; defaults are the official configuration class's.

    Attributes:
        hidden_size, intermediate_size, num_hidden_layers, num_attention_heads: the transformer.
        num_key_value_heads: key heads; ``num_attention_heads`` if None.
        head_dim: width of a head; ``hidden_size / num_attention_heads`` if None.
        max_position_embeddings: longest sequence, prompt and image together.
        attention_bias, o_attention_bias: biases of q, k, v and of the output projection (as q, k,
            v if None).
        latent_size, latent_channels, latent_patch_size: latents are ``[channels, size, size]`` by
            default, cut into patches.
        boi, image_placeholder_id: token ids that begin an image and stand for a patch of one.
        fm_head_dim, fm_head_layers: width and blocks of the flow head.
        fm_head_batch_mul: noises per token in training.
        lm_loss_weight, im_loss_weight: of the text and the image loss.
        use_gen_pos_embed: add a fixed 2D position table to the conditions of the flow head.

    Raises:
        ValueError: sizes that do not fit each other, or a variant that is not supported.
    """

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    attention_bias: bool = False
    o_attention_bias: bool | None = None
    mlp_bias: bool = False
    hidden_act: str = "silu"
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False
    pad_token_id: int | None = None
    pad_token_id_added: int | None = None
    latent_size: int = 32
    latent_patch_size: int = 2
    latent_channels: int = 16
    boi: int | None = None
    eoi: int | None = None
    image_placeholder_id: int | None = None
    fm_head_dim: int = 1536
    fm_head_layers: int = 12
    fm_head_batch_mul: int = 4
    lm_loss_weight: float = 0.01
    im_loss_weight: float = 1.0
    use_gen_pos_embed: bool = False
    vae_name_or_path: str | None = None

    def __post_init__(self) -> None:
        sizes = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
        for name in (*sizes, "latent_size", "latent_patch_size", "latent_channels"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
        if self.head_dim is None and self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"num_attention_heads must divide hidden_size {self.hidden_size}, "
                f"got {self.num_attention_heads}"
            )
        if self.key_value_heads < 1 or self.num_attention_heads % self.key_value_heads:
            raise ValueError(
                f"num_key_value_heads must divide num_attention_heads {self.num_attention_heads}, "
                f"got {self.num_key_value_heads}"
            )
        if self.latent_size % self.latent_patch_size:
            raise ValueError(
                f"latent_patch_size must divide latent_size {self.latent_size}, "
                f"got {self.latent_patch_size}"
            )
        if self.hidden_act != "silu":
            raise ValueError(f"hidden_act must be 'silu', got {self.hidden_act!r}")

    @property
    def key_value_heads(self) -> int:
        """Number of key heads."""
        heads = self.num_key_value_heads
        return self.num_attention_heads if heads is None else heads

    @property
    def head_width(self) -> int:
        """Width of an attention head."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def token_channels(self) -> int:
        """Width of an image token: a patch of latents."""
        return self.latent_channels * self.latent_patch_size**2


def config_from_checkpoint(stored: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of :class:`NextStepConfig` from a checkpoint's config.json.

    Entries that do not shape the network (dtype, versions, generation settings) are left out.

    Raises:
        ValueError: the configuration of another kind of model, or of a variant that is not
            supported: scaled rotary embeddings or sliding windows.
    """
    kind = stored.get("model_type", "nextstep")
    if kind != "nextstep":
        raise ValueError(f"model_type must be 'nextstep', got {kind!r}")
    values = dict(stored)
    rope = values.get("rope_scaling") or values.get("rope_parameters") or {}
    variant = rope.get("rope_type", rope.get("type", "default"))
    if variant != "default":
        raise ValueError(f"rope_scaling of type {variant!r} is not supported")
    if "rope_theta" in rope:
        values["rope_theta"] = rope["rope_theta"]
    if values.get("use_sliding_window"):
        raise ValueError("use_sliding_window is not supported")
    known = {field.name for field in fields(NextStepConfig)}
    return {name: value for name, value in values.items() if name in known}


# 8x8 grey images in [-1, 1] as 16 tokens of 2x2 pixels, drawn from byte-level prompts.
NEXTSTEP_TINY: dict[str, Any] = {
    "vocab_size": 264,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "attention_bias": True,
    "o_attention_bias": False,
    "pad_token_id": 256,
    "boi": 258,
    "eoi": 259,
    "image_placeholder_id": 260,
    "latent_size": 8,
    "latent_channels": 1,
    "fm_head_dim": 96,
    "fm_head_layers": 3,
}
