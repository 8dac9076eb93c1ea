from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import driftar
from driftar.models.vae import AutoencoderKL, Downsample, SpatialAttention
from tests.driftar import golden
from tests.driftar.models.training import assert_learns, replay


@pytest.fixture(scope="module")
def tiny() -> AutoencoderKL:
    model: AutoencoderKL = driftar.build_model("kl16_tiny").eval()
    return model


def test_published_size_has_the_official_parameters() -> None:
    with torch.device("meta"):
        model = driftar.build_model("kl16")
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    assert shapes == golden.parameters("vae_kl16")
    assert model.stride == 16


def test_official_checkpoints_may_carry_the_networks_of_the_loss(tiny: AutoencoderKL) -> None:
    state = {**tiny.state_dict(), "loss.discriminator.weight": torch.zeros(3)}
    model = driftar.load_official("kl16_tiny", {"model": state})
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key])


@torch.no_grad()
def test_attention_is_a_softmax_over_the_pixels() -> None:
    module = SpatialAttention(8, 4)
    x = torch.randn(2, 8, 3, 5)
    normed = functional.group_norm(x, 4, eps=1e-6)
    flat = [part(normed).reshape(2, 8, 15) for part in (module.q, module.k, module.v)]
    weights = torch.einsum("bci,bcj->bij", flat[0], flat[1]).mul(8**-0.5).softmax(-1)
    out = torch.einsum("bij,bcj->bci", weights, flat[2]).reshape(x.shape)
    torch.testing.assert_close(module(x), x + module.proj_out(out))


@torch.no_grad()
def test_downsampling_sees_one_pixel_to_the_right_and_below() -> None:
    module = Downsample(1)
    torch.nn.init.ones_(module.conv.weight)
    torch.nn.init.zeros_(module.conv.bias)  # type: ignore[arg-type]
    out = module(torch.arange(16.0).reshape(1, 1, 4, 4))
    assert out.tolist() == [[[[45.0, 39.0], [66.0, 50.0]]]]


@torch.no_grad()
@pytest.mark.parametrize("size", [(8, 8), (12, 4)])
def test_images_of_any_shape_give_latents_and_back(
    tiny: AutoencoderKL, size: tuple[int, int]
) -> None:
    images = torch.randn(2, 3, *size)
    posterior = tiny.encode(images)
    assert posterior.mean.shape == posterior.std.shape == (2, 4, size[0] // 4, size[1] // 4)
    assert float(posterior.std.min()) > 0
    assert tiny.decode(posterior.mode()).shape == images.shape
    half = driftar.build_model("kl16_tiny").bfloat16()
    assert half.decode(half.encode(images.bfloat16()).mean).dtype is torch.bfloat16


@torch.no_grad()
def test_samples_are_mean_plus_deviation_times_noise(tiny: AutoencoderKL) -> None:
    posterior = tiny.encode(torch.randn(1, 3, 8, 8))
    noise = torch.randn(1, 4, 2, 2)
    expected = posterior.mean + posterior.std * noise
    assert torch.equal(posterior.sample(noise=replay(noise)), expected)
    draws = [posterior.sample(generator=torch.Generator().manual_seed(0)) for _ in range(2)]
    assert torch.equal(*draws)


@torch.no_grad()
def test_deviation_is_bounded_as_published() -> None:
    model: AutoencoderKL = driftar.build_model("kl16_tiny")
    moments = torch.tensor([0.0] * 4 + [-100.0, -30.0, 20.0, 100.0])
    torch.nn.init.zeros_(model.quant_conv.weight)
    model.quant_conv.bias.copy_(moments)  # type: ignore[union-attr]
    std = model.encode(torch.randn(1, 3, 4, 4)).std.flatten()
    torch.testing.assert_close(std.log(), torch.tensor([-15.0, -15.0, 10.0, 10.0]))


def test_training_learns_and_reaches_every_parameter() -> None:
    model: AutoencoderKL = driftar.build_model("kl16_tiny", decoder_attention=(2,))
    images = torch.rand(4, 3, 8, 8)

    def loss() -> Tensor:
        posterior = model.encode(images)
        return (model.decode(posterior.mean) - images).square().mean() + posterior.std.mean()

    assert_learns(model, loss)


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda m: m.encode(torch.zeros(1, 1, 8, 8)), "images"),
        (lambda m: m.encode(torch.zeros(1, 3, 8, 9)), "images"),
        (lambda m: m.decode(torch.zeros(1, 3, 8, 8)), "latents"),
        (lambda m: driftar.build_model("kl16_tiny", ch=6), "ch"),
        (lambda m: driftar.build_model("kl16_tiny", encoder_attention=(3,)), "attention"),
    ],
)
def test_bad_arguments_are_named(
    tiny: AutoencoderKL, call: Callable[[AutoencoderKL], Any], name: str
) -> None:
    with pytest.raises(ValueError, match=rf"^{name}\b.* must"):
        call(tiny)
