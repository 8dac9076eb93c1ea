from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import driftar
from driftar.models import diffusion
from driftar.models.mar import MAR
from driftar.models.mar_backbone import MARBackbone
from tests.driftar import golden
from tests.driftar.models.training import assert_learns, replay


@pytest.fixture(scope="module")
def published() -> MAR:
    """The official weights, loaded strictly."""
    config = golden.metadata("C_mar_state_dict", "config")
    model: MAR = driftar.load_official("mar", golden.tensors("C_mar_state_dict"), config)
    return model


@pytest.fixture(scope="module")
def numbers() -> dict[str, Tensor]:
    return golden.tensors("C_mar_forward")


@pytest.fixture
def tiny() -> MAR:
    model: MAR = driftar.build_model("mar_tiny").eval()
    return model


@torch.no_grad()
def test_transformer_matches_published_numbers(published: MAR, numbers: dict[str, Tensor]) -> None:
    tokens, mask = numbers["tokens"], numbers["mask"]
    condition = published.condition(numbers["labels"])
    assert torch.equal(condition, numbers["class_embedding"])
    golden.assert_near(published.encode(tokens, mask, condition), numbers["enc_out"], 1e-5)
    golden.assert_near(published.features(tokens, mask, condition), numbers["z"], 1e-5)
    few = published.features(tokens, numbers["fewmask_mask"], condition)
    golden.assert_near(few, numbers["fewmask_z"], 1e-5)
    unconditional = published.condition(torch.full((3,), -1))
    blank = published.features(tokens, torch.ones_like(mask), unconditional)
    golden.assert_near(blank, numbers["allmask_uncond_z"], 1e-5)


@torch.no_grad()
def test_head_matches_published_numbers(published: MAR, numbers: dict[str, Tensor]) -> None:
    out = published.head(numbers["head_x"], numbers["head_t"], numbers["head_c"])
    golden.assert_near(out, numbers["head_out"], 1e-5)


@torch.no_grad()
def test_training_loss_matches_published_numbers(
    published: MAR, numbers: dict[str, Tensor]
) -> None:
    squared, variational = diffusion.training_losses(
        diffusion.DiffusionSchedule.build(),
        lambda x, t: published.head(x, t, numbers["train_z"]),
        numbers["train_target"],
        numbers["train_t"],
        numbers["train_noise"],
    )
    golden.assert_near(squared, numbers["train_mse_per_item"], 1e-5)
    golden.assert_near(variational, numbers["train_vb_per_item"], 1e-5)
    mask = numbers["train_mask"]
    loss = ((squared + variational) * mask).sum() / mask.sum()
    golden.assert_near(loss, numbers["train_loss"], 1e-5)


@torch.no_grad()
@pytest.mark.parametrize("case", ["nocfg", "cfg"])
def test_head_sampling_matches_published_numbers(
    published: MAR, numbers: dict[str, Tensor], case: str
) -> None:
    prefix = f"headsample_{case}"
    start = numbers[f"{prefix}_init_noise"]
    draws = iter([start, *numbers[f"{prefix}_step_noise"]])
    sampled = diffusion.sample(
        diffusion.DiffusionSchedule.build("10"),
        lambda x, t: published.head(x, t, numbers[f"{prefix}_z"]),
        lambda shape: next(draws),
        rows=len(start),
        channels=4,
        guidance=float(numbers[f"{prefix}_cfg"]) if case == "cfg" else None,
        temperature=float(numbers[f"{prefix}_temperature"]),
    )
    golden.assert_near(sampled, numbers[f"{prefix}_out"][: len(start)], 1e-4)


@pytest.mark.parametrize("case", [0, 1, 2, 3])
def test_whole_sampling_replays_the_published_run(published: MAR, case: int) -> None:
    """Case 3 keeps the less noisy half of the steps, so that errors of late steps are visible."""
    run = golden.tensors(f"C_mar_sample_{case}")
    settings = golden.metadata(f"C_mar_sample_{case}", "sampling")
    draws = []
    for step in range(settings["num_iter"]):
        draws += [run[f"step{step:02d}_init_noise"], *run[f"step{step:02d}_step_noise"]]
    noise = replay(*draws)
    result = published.generate_with_stats(
        run["labels"],
        num_iter=settings["num_iter"],
        cfg=settings["cfg"],
        cfg_schedule=settings["cfg_schedule"],
        temperature=settings["temperature"],
        num_sampling_steps=settings.get("respacing", "10"),
        orders=run["orders"],
        noise=noise,
    )
    golden.assert_near(result.latents, run["out_latent"], 1e-4)
    assert noise.exhausted
    assert result.stats.decoder_nfe == settings["num_iter"] * len(run["timestep_map"])
    assert result.entropy is None


@pytest.mark.parametrize("name", ["mar_base", "mar_large", "mar_huge"])
def test_published_sizes_have_the_official_parameters(name: str) -> None:
    with torch.device("meta"):
        model = driftar.build_model(name)
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    assert shapes == golden.parameters(name)


def test_masked_values_and_order_of_positions_do_not_leak(tiny: MAR) -> None:
    tokens = torch.randn(2, 16, 4)
    mask = torch.zeros(2, 16)
    mask[0, :5], mask[1, 11:] = 1, 1
    condition = tiny.condition(torch.tensor([3, 4]))
    changed = torch.where(mask.bool()[..., None], torch.full_like(tokens, torch.nan), tokens)
    expected = tiny.features(tokens, mask, condition)
    assert torch.equal(tiny.features(changed.nan_to_num(7.0), mask, condition), expected)
    alone = tiny.features(tokens[1:], mask[1:], condition[1:])
    torch.testing.assert_close(alone, expected[1:])


def test_loss_is_the_mean_over_masked_tokens_only(tiny: MAR) -> None:
    tokens, mask = torch.randn(2, 16, 4), torch.zeros(2, 16)
    mask[:, :3] = 1
    condition = tiny.condition(torch.tensor([0, 1]))
    t, noise = torch.randint(1, 1000, (2, 6)), torch.randn(2, 6, 4)
    loss = tiny.loss(tokens, mask, condition, t, noise)
    z = tiny.features(tokens, mask, condition)[mask.bool()]
    rows = [
        sum(
            diffusion.training_losses(
                diffusion.DiffusionSchedule.build(),
                lambda x, steps: tiny.head(x, steps, z),
                tokens[mask.bool()],
                t[repeat],
                noise[repeat],
            )
        )
        for repeat in range(2)
    ]
    torch.testing.assert_close(loss, torch.cat(rows).mean())


def test_training_learns_and_reaches_every_parameter() -> None:
    model: MAR = driftar.build_model("mar_tiny")
    tokens, labels = torch.randn(3, 16, 4), torch.tensor([0, 5, -1])
    mask = torch.rand(3, 16).argsort(1) < 12
    t, noise = torch.randint(1000, (2, 36)), torch.randn(2, 36, 4)
    assert_learns(model, lambda: model.loss(tokens, mask, model.condition(labels), t, noise))


@torch.no_grad()
def test_entropies_of_layers_come_with_the_features(tiny: MAR) -> None:
    tokens, condition = torch.randn(2, 16, 4), tiny.condition(torch.tensor([0, -1]))
    mask = torch.rand(2, 16).argsort(1) < 7
    z, (shallow, last) = tiny.features_with_entropies(tokens, mask, condition, (0, -1))
    torch.testing.assert_close(z, tiny.features(tokens, mask, condition))
    assert shallow.shape == last.shape == (2, 16)
    assert not torch.allclose(shallow, last)
    assert 0 <= float(torch.stack([shallow, last]).min()) <= float(shallow.max()) <= 1


def test_a_seed_fixes_the_images_and_steps_beyond_the_schedule_are_harmless(tiny: MAR) -> None:
    labels = torch.tensor([1, -1])

    def images(seed: int, num_iter: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return tiny.generate(labels, num_iter=num_iter, num_sampling_steps="4", generator=generator)

    assert torch.equal(images(0, 3), images(0, 3))
    assert not torch.equal(images(0, 3), images(1, 3))
    assert images(0, 20).shape == (2, 1, 8, 8)
    assert float(images(0, 20).abs().max()) <= 1


def test_empty_batch_gives_no_images(tiny: MAR) -> None:
    labels = torch.zeros(0, dtype=torch.long)
    assert tiny.generate(labels, num_iter=2, num_sampling_steps="2").shape == (0, 1, 8, 8)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"num_iter": 0}, "num_iter"),
        ({"num_iter": True}, "num_iter"),
        ({"cfg": float("nan")}, "cfg"),
        ({"cfg": float("inf")}, "cfg"),
        ({"temperature": -1.0}, "temperature"),
        ({"cfg_schedule": "cosine"}, "cfg_schedule"),
        ({"num_sampling_steps": "0"}, "num_sampling_steps"),
        ({"orders": torch.zeros(1, 16, dtype=torch.long)}, "orders"),
        ({"orders": torch.arange(15)[None]}, "orders"),
        ({"noise": lambda shape: torch.zeros(1)}, "noise"),
    ],
)
def test_generate_names_a_bad_option(tiny: MAR, options: dict[str, Any], name: str) -> None:
    with pytest.raises(ValueError, match=name):
        tiny.generate(torch.tensor([0]), **options)


@pytest.mark.parametrize("labels", [[10], [-2], [[0]]])
def test_labels_out_of_range_are_named(tiny: MAR, labels: list[Any]) -> None:
    with pytest.raises(ValueError, match="class_labels"):
        tiny.generate(torch.tensor(labels))


def test_labels_of_a_wrong_type_are_named(tiny: MAR) -> None:
    with pytest.raises(TypeError, match="class_labels"):
        tiny.condition(torch.tensor([0.5]))
    with pytest.raises(TypeError, match="class_labels"):
        tiny.condition([0])  # type: ignore[arg-type]


def test_bad_masks_and_tokens_are_named(tiny: MAR) -> None:
    tokens, condition = torch.zeros(2, 16, 4), tiny.condition(torch.tensor([0, 1]))
    uneven = torch.zeros(2, 16)
    uneven[0, 0] = 1
    with pytest.raises(ValueError, match="mask"):
        tiny.features(tokens, uneven, condition)
    with pytest.raises(ValueError, match="mask"):
        tiny.features(tokens, torch.zeros(2, 15), condition)
    with pytest.raises(ValueError, match="tokens"):
        tiny.features(torch.zeros(2, 16, 3), torch.zeros(2, 16), condition)
    with pytest.raises(ValueError, match="latents"):
        tiny.patchify(torch.zeros(2, 1, 16, 16))


def test_sizes_that_do_not_fit_are_named() -> None:
    with pytest.raises(ValueError, match="img_size"):
        MARBackbone(img_size=9, vae_stride=1, patch_size=2)
    with pytest.raises(ValueError, match="decoder_embed_dim"):
        MARBackbone(encoder_embed_dim=64, decoder_embed_dim=32)
