from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import driftar
from driftar.models import rectified_flow
from driftar.models.transdiff import TransDiff
from tests.driftar import golden
from tests.driftar.models.training import assert_learns, randomise, replay


@pytest.fixture(scope="module")
def published() -> TransDiff:
    """The official weights, loaded strictly."""
    config = golden.metadata("D_transdiff_state_dict", "config")
    state = golden.tensors("D_transdiff_state_dict")
    model: TransDiff = driftar.load_official("transdiff", state, config)
    return model


@pytest.fixture(scope="module")
def numbers() -> dict[str, Tensor]:
    return golden.tensors("D_transdiff_forward")


@pytest.fixture
def tiny() -> TransDiff:
    model: TransDiff = driftar.build_model("transdiff_tiny").eval()
    return randomise(model)


@torch.no_grad()
def test_features_match_published_numbers(published: TransDiff, numbers: dict[str, Tensor]) -> None:
    condition = published.condition(numbers["labels"])
    assert torch.equal(condition, numbers["class_embedding"])
    golden.assert_near(published.features(condition), numbers["z"], 1e-5)
    unconditional = published.condition(torch.tensor([-1]))
    golden.assert_near(published.features(unconditional), numbers["z_uncond"], 1e-5)


@torch.no_grad()
def test_velocity_matches_published_numbers(
    published: TransDiff, numbers: dict[str, Tensor]
) -> None:
    out = published.velocity(numbers["net_x"], numbers["net_c"], numbers["net_t"])
    golden.assert_near(out, numbers["net_out_fp32"], 1e-5)
    embedding, modulation = published.diffdecoder["net"].time_embed(numbers["net_t"])  # type: ignore[operator]
    golden.assert_near(embedding, numbers["net_temb_fp32"], 1e-5)
    golden.assert_near(modulation.flatten(1), numbers["net_timestep_proj_fp32"], 1e-5)


@pytest.mark.parametrize("case", ["nocfg", "cfg"])
def test_whole_sampling_replays_the_published_run(published: TransDiff, case: str) -> None:
    run = golden.below(golden.tensors("D_transdiff_sampling"), f"{case}_")
    steps = int(run["num_steps"])
    torch.testing.assert_close(
        torch.tensor(rectified_flow.sampling_times(steps)), run["t_steps"], rtol=1e-6, atol=0
    )
    cfg, scale_mean, scale_noise = run["cfg_scale0_scale1"].tolist()
    noise = replay(run["init_noise"], *run["step_noise"])
    result = published.generate_with_stats(
        run["labels"],
        num_steps=steps,
        cfg=cfg,
        scale_mean=scale_mean,
        scale_noise=scale_noise,
        noise=noise,
    )
    golden.assert_near(result.latents, run["out_latent"], 1e-5)
    assert noise.exhausted
    assert result.stats.decoder_nfe == steps


@torch.no_grad()
def test_training_loss_matches_published_numbers(published: TransDiff) -> None:
    run = golden.tensors("D_transdiff_sampling")
    loss = rectified_flow.velocity_loss(
        lambda x, tau: published.velocity(x, run["train_z"], tau),
        run["train_target"],
        1000 * run["train_u01"],
        run["train_noise"],
    )
    golden.assert_near(loss, run["train_loss"], 1e-5)


def test_drift_of_the_reverse_process_follows_the_published_score() -> None:
    run = golden.tensors("D_transdiff_sampling")
    for v, x, score, t in zip(
        run["score_v"], run["score_x"], run["score_out"], run["score_t"].tolist(), strict=True
    ):
        golden.assert_near(rectified_flow.reverse_drift(v, x, t), v - t * score, 1e-5)


@pytest.mark.parametrize("size", ["base", "large", "huge"])
def test_published_sizes_have_the_official_parameters(size: str) -> None:
    with torch.device("meta"):
        model = driftar.build_model(f"transdiff_{size}")
        large_images = driftar.build_model(f"transdiff_{size}", img_size=512)
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    assert shapes == golden.parameters(f"transdiff_{size}")
    positions = "diffdecoder.net.diffusion_pos_embed_learned"
    for key, value in large_images.state_dict().items():
        assert tuple(value.shape) == ((1, 1024, model.width) if key == positions else shapes[key])


def test_loss_is_the_mean_over_images_and_repeats(tiny: TransDiff) -> None:
    latents, condition = torch.randn(2, 1, 8, 8), tiny.condition(torch.tensor([3, -1]))
    tau, noise = torch.randint(1000, (3, 2)), torch.randn(3, 2, 64, 1)
    rows = [
        tiny.loss(
            latents[i : i + 1], condition[i : i + 1], tau[r, i, None, None], noise[r, i][None, None]
        )
        for r in range(3)
        for i in range(2)
    ]
    torch.testing.assert_close(tiny.loss(latents, condition, tau, noise), torch.stack(rows).mean())


def test_training_learns_and_reaches_every_used_parameter() -> None:
    model: TransDiff = driftar.build_model("transdiff_tiny")
    latents, labels = torch.randn(4, 1, 8, 8), torch.tensor([0, 1, 2, -1])
    tau, noise = torch.randint(1000, (2, 4)), torch.randn(2, 4, 64, 1)
    # What the encoder's tokens would hold has no influence on TransDiff.
    assert_learns(
        model,
        lambda: model.loss(latents, model.condition(labels), tau, noise),
        unused={"z_proj.weight", "z_proj.bias"},
    )


def test_guidance_is_off_at_one_and_pure_at_zero(tiny: TransDiff) -> None:
    start, steps = torch.randn(1, 64, 1), torch.randn(3, 1, 64, 1)

    def generate(label: int, cfg: float) -> Tensor:
        noise = replay(start, *steps)
        return tiny.generate(torch.tensor([label]), num_steps=4, cfg=cfg, noise=noise)

    torch.testing.assert_close(generate(5, 0.0), generate(-1, 1.0), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(generate(5, 2.0), generate(5, 1.0), atol=1e-3)


def test_a_seed_fixes_the_images(tiny: TransDiff) -> None:
    def images(seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return tiny.generate(torch.tensor([1, -1]), num_steps=2, generator=generator)

    assert torch.equal(images(0), images(0))
    assert not torch.equal(images(0), images(1))
    assert images(0).shape == (2, 1, 8, 8)
    assert tiny.generate(torch.zeros(0, dtype=torch.long), num_steps=1).shape == (0, 1, 8, 8)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"num_steps": 0}, "num_steps"),
        ({"cfg": float("nan")}, "cfg"),
        ({"scale_mean": float("inf")}, "scale_mean"),
        ({"scale_noise": None}, "scale_noise"),
        ({"noise": lambda shape: torch.zeros(1)}, "noise"),
    ],
)
def test_generate_names_a_bad_option(tiny: TransDiff, options: dict[str, Any], name: str) -> None:
    with pytest.raises(ValueError, match=name):
        tiny.generate(torch.tensor([0]), **{"num_steps": 2, **options})


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda m: m.generate(torch.tensor([10])), "class_labels"),
        (lambda m: m.features(torch.zeros(2, 63)), "condition"),
        (lambda m: m.velocity(torch.zeros(1, 64, 2), torch.zeros(1, 16, 64), torch.zeros(1)), "x"),
        (lambda m: m.velocity(torch.zeros(1, 64, 1), torch.zeros(2, 16, 64), torch.zeros(1)), "z"),
        (
            lambda m: m.velocity(torch.zeros(1, 64, 1), torch.zeros(1, 16, 64), torch.zeros(2)),
            "tau",
        ),
        (lambda m: m.patchify(torch.zeros(1, 1, 4, 4)), "latents"),
        (lambda m: driftar.build_model("transdiff_tiny", patch_size=2), "patch_size"),
        (lambda m: driftar.build_model("transdiff_base", img_size=250), "img_size"),
    ],
)
def test_bad_arguments_are_named(
    tiny: TransDiff, call: Callable[[TransDiff], Any], name: str
) -> None:
    with pytest.raises(ValueError, match=f"^{name} must"):
        call(tiny)


@pytest.mark.parametrize(
    ("tau", "noise", "name"),
    [((2,), (2, 2, 64, 1), "tau"), ((2, 3), (2, 3, 64, 1), "tau"), ((2, 2), (2, 2, 64), "noise")],
)
def test_bad_draws_are_named(
    tiny: TransDiff, tau: tuple[int, ...], noise: tuple[int, ...], name: str
) -> None:
    latents, condition = torch.zeros(2, 1, 8, 8), torch.zeros(2, 64)
    with pytest.raises(ValueError, match=f"^{name} must"):
        tiny.loss(latents, condition, torch.zeros(tau), torch.zeros(noise))
