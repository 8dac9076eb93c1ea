from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import driftar
from driftar.models import rectified_flow
from driftar.models.stack import block_causal_mask
from driftar.models.transdiff_mrar import TransDiffMRAR
from tests.driftar import golden
from tests.driftar.models.training import assert_learns, randomise, replay


@pytest.fixture(scope="module")
def published() -> TransDiffMRAR:
    """The official weights, loaded strictly."""
    config = golden.metadata("D_mrar_state_dict", "config")
    state = golden.tensors("D_mrar_state_dict")
    model: TransDiffMRAR = driftar.load_official("transdiff_mrar", state, config)
    return model


@pytest.fixture(scope="module")
def numbers() -> dict[str, Tensor]:
    return golden.tensors("D_mrar_forward")


@pytest.fixture
def tiny() -> TransDiffMRAR:
    model: TransDiffMRAR = driftar.build_model("transdiff_mrar_tiny").eval()
    return randomise(model)


@torch.no_grad()
@pytest.mark.parametrize("length", [64, 128, 192, 256])
def test_prefixes_match_published_numbers(
    published: TransDiffMRAR, numbers: dict[str, Tensor], length: int
) -> None:
    condition = published.condition(numbers["labels"])
    z = published.features(numbers["tokens"][:, :length], condition)
    golden.assert_near(z, numbers[f"z_len{length}"], 1e-5)
    golden.assert_near(z, numbers["z_trainpath_len256"][:, :length], 1e-5)


@torch.no_grad()
def test_velocity_with_a_longer_context_matches_published_numbers(
    published: TransDiffMRAR, numbers: dict[str, Tensor]
) -> None:
    out = published.velocity(numbers["net_x"], numbers["net_c"], numbers["net_t"])
    golden.assert_near(out, numbers["net_out_fp32"], 1e-5)


def test_mask_and_patches_match_published_numbers(
    published: TransDiffMRAR, numbers: dict[str, Tensor]
) -> None:
    visible = block_causal_mask(8, 256, 64, torch.device("cpu"))
    assert torch.equal(~visible, numbers["attention_mask_blocked"].bool())
    assert torch.equal(published.patchify(numbers["patchify_in"]), numbers["patchify_p1"])
    assert torch.equal(published.group_tokens(numbers["patchify_in"]), numbers["patchify_p2"])


@pytest.mark.parametrize("case", ["nocfg", "cfg"])
def test_whole_sampling_replays_the_published_run(published: TransDiffMRAR, case: str) -> None:
    """The published code encodes the whole prefix again for every image; this one does not."""
    run = golden.below(golden.tensors("D_mrar_sampling"), f"{case}_")
    scale_mean, scale_noise = run["scale0_scale1"].tolist()
    noise = replay(run["init_noise"], *run["step_noise"].flatten(0, 1))
    result = published.generate_with_stats(
        run["labels"],
        num_steps=int(run["num_steps"]),
        cfg=run["cfg_list"].tolist(),
        scale_mean=scale_mean,
        scale_noise=scale_noise,
        noise=noise,
    )
    golden.assert_near(result.latents, run["out_latent"], 1e-5)
    assert noise.exhausted
    assert result.stats.decoder_nfe == 4 * int(run["num_steps"])


@torch.no_grad()
def test_cached_groups_equal_an_encoding_of_the_whole_prefix(tiny: TransDiffMRAR) -> None:
    condition = tiny.condition(torch.tensor([3, -1]))
    images = [torch.randn(2, 1, 8, 8) for _ in range(3)]
    cache = tiny._new_cache(2)
    rows = [
        tiny._encode_next(image, condition, 16 * index, cache)
        for index, image in enumerate([None, *images])
    ]
    tokens = torch.cat([tiny.group_tokens(image) for image in (images[0], *images)], dim=1)
    expected = tiny.features(tokens, condition) + tiny.diffusion_pos_embed_learned
    torch.testing.assert_close(torch.cat(rows, dim=1), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", ["base", "large", "huge"])
def test_published_sizes_have_the_official_parameters(size: str) -> None:
    with torch.device("meta"):
        model = driftar.build_model(f"transdiff_mrar_{size}")
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    assert shapes == golden.parameters(f"transdiff_{size}_mrar")


@torch.no_grad()
def test_loss_is_that_of_four_images_in_their_contexts(tiny: TransDiffMRAR) -> None:
    latents, condition = torch.randn(2, 4, 1, 8, 8), tiny.condition(torch.tensor([1, 2]))
    tau, noise = torch.randint(1000, (4, 2)), torch.randn(4, 2, 64, 1)
    blank = torch.zeros(2, 1, 8, 8)
    losses = []
    for index in range(4):
        references = [blank, *latents.unbind(1)[:index]]
        tokens = torch.cat([tiny.group_tokens(image) for image in references], dim=1)
        length = tokens.shape[1]
        z = tiny.features(tokens, condition) + tiny.diffusion_pos_embed_learned[:, :length]
        losses.append(
            rectified_flow.velocity_loss(
                lambda x, t, z=z: tiny.velocity(x, z, t),
                tiny.patchify(latents[:, index]),
                tau[index],
                noise[index],
            )
        )
    expected = torch.stack(losses).mean()
    torch.testing.assert_close(tiny.loss(latents, condition, tau, noise), expected)


def test_training_learns_and_reaches_every_parameter() -> None:
    model: TransDiffMRAR = driftar.build_model("transdiff_mrar_tiny")
    latents, labels = torch.randn(3, 4, 1, 8, 8), torch.tensor([0, 1, -1])
    tau, noise = torch.randint(1000, (4, 3)), torch.randn(4, 3, 64, 1)
    assert_learns(model, lambda: model.loss(latents, model.condition(labels), tau, noise))


def test_one_weight_guides_all_images(tiny: TransDiffMRAR) -> None:
    draws = [torch.randn(1, 64, 1) for _ in range(5)]

    def generate(cfg: Any) -> Tensor:
        return tiny.generate(torch.tensor([1]), num_steps=2, cfg=cfg, noise=replay(*draws))

    torch.testing.assert_close(generate(1.5), generate([1.5] * 4))
    assert not torch.allclose(generate([1.0, 1.0, 1.0, 1.5]), generate(1.0), atol=1e-2)
    assert not torch.equal(generate([1.0, 1.0, 1.5, 1.0]), generate(1.0))


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda m: m.generate(torch.tensor([0]), cfg=[1.0, 2.0]), "cfg"),
        (lambda m: m.generate(torch.tensor([0]), cfg=[1.0, 2.0, None, 1.0]), "cfg"),
        (lambda m: m.generate(torch.tensor([0]), cfg="3.0"), "cfg"),
        (lambda m: m.generate(torch.tensor([0]), num_steps=0), "num_steps"),
        (lambda m: m.generate(torch.tensor([-2])), "class_labels"),
        (lambda m: m.features(torch.zeros(1, 24, 4), torch.zeros(1, 64)), "tokens"),
        (lambda m: m.features(torch.zeros(1, 80, 4), torch.zeros(1, 64)), "tokens"),
        (lambda m: m.features(torch.zeros(1, 0, 4), torch.zeros(1, 64)), "tokens"),
        (lambda m: m.features(torch.zeros(2, 16, 4), torch.zeros(1, 64)), "tokens"),
        (lambda m: m.features(torch.zeros(1, 16, 3), torch.zeros(1, 64)), "tokens"),
        (
            lambda m: m.loss(
                torch.zeros(1, 3, 1, 8, 8), torch.zeros(1, 64), torch.zeros(4, 1), torch.zeros(4)
            ),
            "latents",
        ),
        (
            lambda m: m.loss(
                torch.zeros(1, 4, 1, 8, 8),
                torch.zeros(1, 64),
                torch.zeros(3, 1),
                torch.zeros(3, 1, 64, 1),
            ),
            "tau",
        ),
    ],
)
def test_bad_arguments_are_named(
    tiny: TransDiffMRAR, call: Callable[[TransDiffMRAR], Any], name: str
) -> None:
    with pytest.raises(ValueError, match=f"^{name} must"):
        call(tiny)
