from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import driftar
from driftar.models.nextstep import NextStep
from driftar.pipeline import Pipeline
from driftar.prompts import ByteTokenizer

DOCS = Path(__file__).resolve().parents[2] / "docs" / "pipeline.md"
EXAMPLES = re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.S)
QUICK: dict[str, dict[str, Any]] = {
    "mar_tiny": {"num_iter": 3, "num_inference_steps": 3},
    "transdiff_tiny": {"num_inference_steps": 3},
    "transdiff_mrar_tiny": {"num_inference_steps": 2},
    "drift_ar_tiny": {},
    "drift_ar_mar_tiny": {},
    "nextstep_1_tiny": {"num_inference_steps": 2, "grid_size": (2, 2)},
}


def make(name: str, **overrides: Any) -> Pipeline:
    """A pipeline all of whose weights matter: fresh models have zero outputs."""
    model = driftar.build_model(name, **overrides)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return Pipeline(model, tokenizer=ByteTokenizer() if isinstance(model, NextStep) else None)


def asked(pipeline: Pipeline, count: int) -> dict[str, Any]:
    """Arguments that ask for ``count`` different images."""
    if pipeline.takes_prompts:
        return {"prompt": [f"digit {i}" for i in range(count)]}
    return {"class_labels": list(range(count))}


def call(pipeline: Pipeline, count: int = 2, **options: Any) -> Any:
    quick = QUICK[pipeline.model.name] | asked(pipeline, count) | {"progress": False, "seed": 0}
    return pipeline(**(quick | options))


@pytest.fixture(params=list(QUICK))
def pipeline(request: pytest.FixtureRequest) -> Pipeline:
    return make(request.param)


def test_images_come_in_every_form(pipeline: Pipeline) -> None:
    latents = call(pipeline, output_type="latent").images
    unit = call(pipeline, output_type="pt").images
    array = call(pipeline, output_type="np").images
    pictures = call(pipeline).images
    assert latents.dim() == 4 and len(latents) == 2
    torch.testing.assert_close(unit, ((latents + 1) / 2).clamp(0, 1))
    assert np.array_equal(array, unit.permute(0, 2, 3, 1).numpy())
    assert [picture.mode for picture in pictures] == ["L", "L"]
    assert np.array_equal(np.asarray(pictures[1]), np.rint(array[1, ..., 0] * 255).astype(np.uint8))


@pytest.mark.parametrize("guidance_scale", [1.0, 2.5])
def test_an_image_depends_on_its_own_seed_alone(pipeline: Pipeline, guidance_scale: float) -> None:
    options = {"output_type": "latent", "guidance_scale": guidance_scale}
    whole = call(pipeline, 3, seed=7, **options).images
    assert not torch.allclose(whole[0], whole[1])
    assert torch.equal(call(pipeline, 3, seed=7, **options).images, whole)
    parts = call(pipeline, 3, seed=7, batch_size=2, **options).images
    torch.testing.assert_close(parts, whole, rtol=1e-3, atol=1e-4)
    last = {key: value[2:] for key, value in asked(pipeline, 3).items()}
    alone = call(pipeline, 3, seed=9, **last, **options).images
    torch.testing.assert_close(alone, whole[2:], rtol=1e-3, atol=1e-4)


def test_generators_replace_the_seed(pipeline: Pipeline) -> None:
    expected = call(pipeline, seed=4, output_type="latent").images
    generators = [torch.Generator().manual_seed(seed) for seed in (4, 5)]
    output = call(pipeline, seed=None, generator=generators, output_type="latent")
    assert torch.equal(output.images, expected)
    assert output.stats.seed is None

    def one() -> Tensor:
        generator = torch.Generator().manual_seed(1)
        images: Tensor = call(pipeline, seed=None, generator=generator, output_type="latent").images
        return images

    assert torch.equal(one(), one())


def test_a_drawn_seed_is_reported_and_reproduces(pipeline: Pipeline) -> None:
    first = call(pipeline, seed=None, output_type="latent")
    again = call(pipeline, seed=first.stats.seed, output_type="latent")
    assert torch.equal(first.images, again.images)
    assert call(pipeline, seed=None).stats.seed != first.stats.seed


def test_several_images_of_each_condition_are_neighbours(pipeline: Pipeline) -> None:
    pairs = call(pipeline, 2, num_images=2, output_type="latent").images
    spelt = {key: [v for v in value for _ in "ab"] for key, value in asked(pipeline, 2).items()}
    assert torch.equal(pairs, call(pipeline, **spelt, output_type="latent").images)


def test_stats_tell_the_cost() -> None:
    mar = call(make("mar_tiny")).stats
    assert (mar.decoder_nfe, mar.entropy, mar.seed) == (9, None, 0)
    drift = call(make("drift_ar_mar_tiny"), batch_size=1).stats
    assert drift.decoder_nfe == 1 and drift.entropy.shape == (2, 16)
    text = call(make("nextstep_1_tiny"), entropy_layer=-2).stats
    assert text.decoder_nfe == 8 and text.entropy.shape == (2, 4)
    for stats in (mar, drift, text):
        assert 0 < stats.ar_seconds + stats.decoder_seconds <= stats.total_seconds
        assert stats.vae_seconds == 0 and stats.accepted_lengths is None


def test_the_progress_bar_reaches_its_end(
    pipeline: Pipeline, capsys: pytest.CaptureFixture[str]
) -> None:
    call(pipeline, 3, batch_size=2, progress=True)
    ticks = 8 if pipeline.takes_prompts else 2
    assert f"{ticks}/{ticks}" in capsys.readouterr().err


class Halving(nn.Module):
    """Stands for a VAE: three grey channels from the first latent channel, four times as large."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(0.5))

    def decode(self, latents: Tensor) -> Tensor:
        large = latents[:, :1].repeat_interleave(4, 2).repeat_interleave(4, 3)
        return (self.gain * large).expand(-1, 3, -1, -1)


LATENT = {"vae_embed_dim": 4, "vae_stride": 4, "img_size": 32, "latent_scale": 0.25}


def test_latents_are_scaled_and_decoded() -> None:
    model = driftar.build_model("mar_tiny", **LATENT)
    latents = call(Pipeline(model), output_type="latent").images
    assert latents.shape == (2, 4, 8, 8)
    output = call(Pipeline(model, vae=Halving()), output_type="pt")
    expected = (0.5 * latents[:, :1] / 0.25 + 1) / 2
    assert output.images.shape == (2, 3, 32, 32)
    torch.testing.assert_close(output.images[:, :1, ::4, ::4], expected.clamp(0, 1))
    assert output.stats.vae_seconds > 0
    shifted = Pipeline(model, vae=Halving(), latent_scale=1.0, latent_shift=0.5)
    found = call(shifted, output_type="pt").images[:, :1, ::4, ::4]
    torch.testing.assert_close(found, (0.5 * (latents[:, :1] + 0.5) / 2 + 0.5).clamp(0, 1))
    assert call(Pipeline(model, vae=Halving())).images[0].size == (32, 32)


def test_latents_without_a_vae_say_what_is_missing() -> None:
    pipeline = make("mar_tiny", **LATENT)
    with pytest.raises(ValueError, match=r"latents of 4 channels.*no VAE.*vae=.*latent"):
        call(pipeline)


def test_diffusers_autoencoders_fit(tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4, scaling_factor=0.5,
        shift_factor=0.1, down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    model = driftar.build_model("mar_tiny", **LATENT)
    pipeline = Pipeline(model, vae=vae)
    assert (pipeline.latent_scale, pipeline.latent_shift) == (0.5, 0.1)
    latents = call(pipeline, output_type="latent").images
    images = call(pipeline, output_type="pt").images
    with torch.no_grad():
        decoded = vae.decode(latents / 0.5 + 0.1).sample
    torch.testing.assert_close(images, ((decoded + 1) / 2).clamp(0, 1))
    pipeline.save_pretrained(tmp_path)
    loaded = Pipeline.from_pretrained(tmp_path)
    assert torch.equal(call(loaded, output_type="pt").images, images)


def test_images_that_are_not_finite_are_refused() -> None:
    pipeline = make("drift_ar_mar_tiny")
    nn.init.constant_(pipeline.model.enc_to_token_proj.bias, float("nan"))
    with pytest.raises(ValueError, match="not finite"):
        call(pipeline)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"seed": 2**64}, ValueError, r"seed must be an integer in \[0, 2\^64\)"),
        ({"seed": -1}, ValueError, "seed"),
        ({"guidance_scale": float("nan")}, ValueError, "guidance_scale"),
        ({"guidance_scale": float("inf")}, ValueError, "guidance_scale"),
        ({"num_inference_steps": 0}, ValueError, "num_inference_steps"),
        ({"num_images": 0}, ValueError, "num_images"),
        ({"batch_size": 0}, ValueError, "batch_size"),
        ({"output_type": "jpeg"}, ValueError, "output_type must be one of pil, np, pt, latent"),
        ({"decoder": "magic"}, ValueError, "decoder must be one of diffusion, drift"),
        ({"no_such_option": 1}, TypeError, "unknown argument no_such_option"),
        ({"noise": None}, TypeError, "unknown argument noise"),
        ({"generator": torch.Generator()}, ValueError, "seed and generator"),
        ({"generator": [torch.Generator()], "seed": None}, ValueError, "each of the 2 images"),
        ({"generator": "cpu", "seed": None}, TypeError, "generator"),
    ],
)
def test_bad_arguments_are_named(
    pipeline: Pipeline, options: dict[str, Any], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        call(pipeline, **options)


@pytest.mark.parametrize(
    ("labels", "error"),
    [
        (10, ValueError),
        ([0, -2], ValueError),
        ([], ValueError),
        ([[1]], ValueError),
        (0.5, TypeError),
        (["cat"], TypeError),
        ([2**70], TypeError),
    ],
)
def test_labels_out_of_range_are_named(labels: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="label"):
        call(make("drift_ar_mar_tiny"), class_labels=labels)


def test_labels_may_be_an_int_or_a_tensor() -> None:
    pipeline = make("drift_ar_mar_tiny")
    expected = call(pipeline, class_labels=[3], output_type="latent").images
    for labels in (3, torch.tensor(3), torch.tensor([3]), np.array([3])):
        assert torch.equal(
            call(pipeline, class_labels=labels, output_type="latent").images, expected
        )


def test_what_a_family_cannot_do_is_said() -> None:
    mar, drift, text = make("mar_tiny"), make("drift_ar_mar_tiny"), make("nextstep_1_tiny")
    for pipeline in (mar, text):
        with pytest.raises(ValueError, match="no draft to decode speculatively with"):
            call(pipeline, speculative=True)
    with pytest.raises(ValueError, match='mar_tiny has no decoder="drift", only "diffusion"'):
        call(mar, decoder="drift")
    with pytest.raises(ValueError, match='has no decoder="diffusion", only "drift"'):
        call(drift, decoder="diffusion")
    assert call(mar, decoder="diffusion") and call(drift, decoder="drift")
    with pytest.raises(ValueError, match="one evaluation: num_inference_steps"):
        call(drift, num_inference_steps=5)
    with pytest.raises(ValueError, match="takes class_labels, not prompt"):
        mar(prompt="a cat")
    with pytest.raises(ValueError, match="takes class_labels, not prompt"):
        mar()
    with pytest.raises(ValueError, match="takes prompt, not class_labels"):
        text([1])
    with pytest.raises(TypeError, match="prompt must be text"):
        text(prompt=[1])
    with pytest.raises(ValueError, match="context of 256"):
        call(text, prompt="x" * 250)
    text.tokenizer = None
    with pytest.raises(ValueError, match="needs a tokeniser"):
        call(text)
    with pytest.raises(TypeError, match="generate_with_stats"):
        Pipeline(nn.Linear(2, 2))


@pytest.mark.parametrize("name", ["drift_ar_tiny", "drift_ar_mar_tiny"])
def test_speculation_accepts_what_is_near(name: str) -> None:
    pipeline = make(name)
    options: dict[str, Any] = {"output_type": "latent", "batch_size": 2}
    plain = call(pipeline, 3, **options)
    length = pipeline.model.seq_len
    nothing = call(pipeline, 3, speculative=True, threshold=0.0, **options)
    torch.testing.assert_close(nothing.images, plain.images)
    assert nothing.stats.accepted_lengths.tolist() == [0, 0, 0]
    all_of_it = call(pipeline, 3, speculative=True, threshold=1e9, **options)
    assert not torch.allclose(all_of_it.images, plain.images)
    assert all_of_it.stats.accepted_lengths.tolist() == [length] * 3
    assert all_of_it.stats.entropy.shape == (3, length)
    assert plain.stats.accepted_lengths is None


def test_bfloat16_models_make_finite_images(pipeline: Pipeline) -> None:
    images = call(pipeline.to(torch.bfloat16), output_type="pt").images
    assert images.dtype == torch.float32 and bool(images.isfinite().all())


@pytest.mark.parametrize("code", EXAMPLES, ids=range(len(EXAMPLES)))
def test_documented_example(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(code, str(DOCS), "exec"), {})


def test_examples_are_found() -> None:
    assert len(EXAMPLES) >= 3
