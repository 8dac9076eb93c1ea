from __future__ import annotations

import pytest
import torch

from driftar.models.cross_attention import CrossAttention
from driftar.models.layers import Attention, patchify, sinusoid, unpatchify
from tests.driftar import golden


@pytest.mark.parametrize(("patch_size", "channels"), [(1, 3), (2, 1), (4, 2)])
def test_unpatchify_inverts_patchify(patch_size: int, channels: int) -> None:
    latents = torch.randn(2, channels, 8, 8)
    assert torch.equal(unpatchify(patchify(latents, patch_size), patch_size), latents)


def test_patchify_orders_rows_then_channel_then_offsets() -> None:
    latents = torch.arange(2 * 4 * 4.0).reshape(1, 2, 4, 4)
    token = patchify(latents, 2)[0, 1]
    assert token.tolist() == [2, 3, 6, 7, 18, 19, 22, 23]


def test_patchify_matches_published_numbers() -> None:
    numbers = golden.tensors("C_mar_forward")
    assert torch.equal(patchify(numbers["patchify_in"], 1), numbers["patchify_out"])


@pytest.mark.parametrize("shape", [(2, 1, 7, 8), (1, 8, 8)])
def test_patchify_names_a_bad_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="latents"):
        patchify(torch.zeros(shape), 2)


@pytest.mark.parametrize("shape", [(1, 3, 4), (1, 4, 3)])
def test_unpatchify_names_a_bad_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="tokens"):
        unpatchify(torch.zeros(shape), 2)


def test_sinusoid_matches_published_numbers() -> None:
    numbers = golden.tensors("C_mar_forward")
    features = sinusoid(numbers["head_t"], 256)
    # Processors round the exponential behind a frequency differently, and time multiplies that.
    rounding = float(numbers["head_t"].max()) * torch.finfo(torch.float32).eps
    golden.assert_near(features, numbers["head_timestep_sinusoid"], rounding)


def test_attention_equals_pytorch() -> None:
    own = Attention(16, 4)
    other = torch.nn.MultiheadAttention(16, 4, batch_first=True)
    with torch.no_grad():
        other.in_proj_weight.copy_(own.qkv.weight)
        other.in_proj_bias.copy_(own.qkv.bias)
        other.out_proj.weight.copy_(own.proj.weight)
        other.out_proj.bias.copy_(own.proj.bias)
    x = torch.randn(2, 5, 16)
    blocked = torch.ones(5, 5).triu(1).bool()
    expected = other(x, x, x, attn_mask=blocked)[0]
    torch.testing.assert_close(own(x, is_causal=True), expected)
    torch.testing.assert_close(own(x, ~blocked), expected)


def test_cross_attention_reaches_the_context() -> None:
    module = CrossAttention(16, 2)
    x, context = torch.randn(2, 5, 16), torch.randn(2, 3, 16, requires_grad=True)
    out = module(x, module.keys_values(context))
    (gradient,) = torch.autograd.grad(out.square().sum(), context)
    assert out.shape == x.shape
    assert float(gradient.abs().min(-1).values.min()) > 0


def test_heads_must_divide_the_width() -> None:
    with pytest.raises(ValueError, match="num_heads"):
        Attention(16, 3)
