"""NextStep-1 replays the numbers of the published code."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import driftar
from driftar.models import flow
from driftar.models.nextstep import NextStep
from tests.driftar import golden

RUNS = ("nocfg", "cfg2", "cfg3_shift", "noise_repeat")


@pytest.fixture(scope="module")
def published() -> NextStep:
    """The official weights, loaded strictly."""
    model = NextStep(**golden.metadata("E_nextstep_state_dict", "config")).eval()
    model.load_state_dict(golden.tensors("E_nextstep_state_dict"), strict=True)
    return model


@pytest.fixture(scope="module")
def numbers() -> dict[str, Tensor]:
    return golden.tensors("E_nextstep_forward")


@pytest.fixture(scope="module")
def runs() -> dict[str, Tensor]:
    return golden.tensors("E_nextstep_sampling")


@torch.no_grad()
def test_hidden_states_match_published_numbers(
    published: NextStep, numbers: dict[str, Tensor]
) -> None:
    embeds = published.embed(numbers["input_ids"])
    golden.assert_near(embeds, numbers["inputs_embeds"], 1e-6)
    hidden = published.hidden(embeds)
    golden.assert_near(hidden, numbers["hidden_nomask"], 1e-5)
    golden.assert_near(published.lm_head(hidden), numbers["lm_logits"], 1e-5)


@torch.no_grad()
@pytest.mark.parametrize("chunks", [[12], [8, 1, 1, 1, 1], [3, 5, 4]])
def test_padded_and_cached_hidden_states_match_published_numbers(
    published: NextStep, numbers: dict[str, Tensor], chunks: list[int]
) -> None:
    embeds, mask = numbers["inputs_embeds"], numbers["attention_mask"]
    cache = published.new_cache(2, 12)
    parts, end = [], 0
    for count in chunks:
        end += count
        parts.append(published.hidden(embeds[:, end - count : end], mask[:, :end], cache))
    hidden, seen = torch.cat(parts, dim=1), mask.bool()
    golden.assert_near(hidden[seen], numbers["hidden_leftpad"][seen], 1e-5)
    golden.assert_near(hidden[seen], numbers["hidden_leftpad_kv_static"][seen], 1e-5)
    assert bool(hidden.isfinite().all())
    assert cache.length == 12


@torch.no_grad()
def test_cache_holds_the_published_keys(published: NextStep, numbers: dict[str, Tensor]) -> None:
    cache = published.new_cache(2, 12)
    published.hidden(numbers["inputs_embeds"], None, cache)
    keys, values = cache.seen(0)
    golden.assert_near(keys, numbers["kv_layer0_key"], 1e-5)
    golden.assert_near(values, numbers["kv_layer0_value"], 1e-5)


@torch.no_grad()
def test_projections_and_patches_match_published_numbers(
    published: NextStep, numbers: dict[str, Tensor]
) -> None:
    into = published.image_in_projector(numbers["in_proj_x"])
    golden.assert_near(into, numbers["in_proj_out"], 1e-5)
    out = published.image_out_projector(numbers["out_proj_x"])
    golden.assert_near(out, numbers["out_proj_out"], 1e-5)
    assert torch.equal(published.patchify(numbers["patchify_in"]), numbers["patchify_out"])
    assert torch.equal(published.unpatchify(numbers["patchify_out"]), numbers["unpatchify"])
    mixed = published.embed(numbers["mixed_ids"], numbers["mixed_latents"])
    golden.assert_near(mixed, numbers["mixed_embeds"], 1e-5)


@torch.no_grad()
def test_flow_head_matches_published_numbers(
    published: NextStep, numbers: dict[str, Tensor]
) -> None:
    out = published.velocity(numbers["head_x"], numbers["head_t"], numbers["head_c"])
    golden.assert_near(out, numbers["head_out"], 1e-5)
    score = flow.score_of_velocity(
        numbers["score_v"], numbers["score_x"], numbers["score_t"][:, None]
    )
    golden.assert_near(score, numbers["score_out"], 1e-5)


@torch.no_grad()
def test_flow_loss_matches_published_numbers(
    published: NextStep, numbers: dict[str, Tensor]
) -> None:
    loss = flow.flow_matching_loss(
        lambda x, t: published.velocity(x, t, numbers["train_c"]),
        numbers["train_target"],
        numbers["train_u_normal"].sigmoid(),
        numbers["train_noise"],
        numbers["train_mask"],
    )
    golden.assert_near(loss, numbers["train_loss"], 1e-5)


@pytest.mark.parametrize("run", RUNS)
def test_token_sampling_replays_the_published_run(
    published: NextStep, runs: dict[str, Tensor], run: str
) -> None:
    cfg, cfg_img, shift, steps, last, repeat = runs[
        f"{run}_cfg_cfg2_shift_steps_last_repeat"
    ].tolist()
    times = flow.shifted_times(int(steps), shift, last)
    golden.assert_near(times, runs[f"{run}_timesteps"], 1e-6)
    replay = iter(runs[f"{run}_noise"])
    sampled = published.sample_token(
        runs[f"{run}_c"],
        cfg=cfg,
        cfg_img=cfg_img,
        num_steps=int(steps),
        shift=shift,
        noise_repeat=int(repeat),
        last_step_size=last,
        noise=lambda shape: next(replay),
    )
    golden.assert_near(sampled, runs[f"{run}_out"], 1e-4)
    assert next(replay, None) is None


@pytest.mark.parametrize(
    ("run", "options"),
    [
        ("dec_nocfg", {}),
        ("dec_cfg_norm", {"cfg_schedule": "linear", "use_norm": True}),
        ("dec_cfg_img", {"use_norm": True, "num_images_per_caption": 2}),
    ],
)
def test_whole_decoding_replays_the_published_run(
    published: NextStep, runs: dict[str, Tensor], run: str, options: dict[str, Any]
) -> None:
    cfg, cfg_img, steps = runs[f"{run}_cfg_cfgimg_steps"].tolist()
    replay = iter(runs[f"{run}_noise"].flatten(0, 1))
    result = published.generate_with_stats(
        runs[f"{run}_input_ids"],
        runs[f"{run}_attention_mask"],
        grid_size=(2, 3),
        cfg=cfg,
        cfg_img=cfg_img,
        num_steps=int(steps),
        noise=lambda shape: next(replay),
        entropy_layer=-2,
        **options,
    )
    golden.assert_near(published.patchify(result.latents), runs[f"{run}_tokens"], 1e-4)
    assert next(replay, None) is None
    assert result.stats.decoder_nfe == 6 * steps
    assert result.entropy is not None and result.entropy.shape == (2, 6)


@pytest.mark.parametrize(
    ("file", "config"),
    [
        ("nextstep_repo_defaults", {}),
        (
            "nextstep_large_qwen2p5_14b_ASSUMED",
            {
                "model_type": "nextstep",
                "torch_dtype": "bfloat16",
                "rope_scaling": None,
                "use_sliding_window": False,
                "vocab_size": 152064,
                "hidden_size": 5120,
                "intermediate_size": 13824,
                "num_hidden_layers": 48,
                "num_attention_heads": 40,
                "num_key_value_heads": 8,
                "max_position_embeddings": 131072,
                "rope_theta": 1000000.0,
                "attention_bias": True,
                "o_attention_bias": False,
            },
        ),
    ],
)
def test_published_sizes_have_the_official_parameters(file: str, config: dict[str, Any]) -> None:
    with torch.device("meta"):
        model = driftar.build_model("nextstep_1", **NextStep.config_of(config))
    expected = golden.parameters(file)
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    assert {name: tuple(value.shape) for name, value in tensors.items()} == expected
    # What a checkpoint may hold beyond the parameters are constants, which loading leaves out.
    state = {name: torch.empty(shape, device="meta") for name, shape in expected.items()}
    assert set(NextStep.parameters_of(state)) == set(model.state_dict())
    model.load_state_dict(state, strict=True, assign=True)


def test_official_checkpoints_load(published: NextStep) -> None:
    config = golden.metadata("E_nextstep_state_dict", "config")
    state = golden.tensors("E_nextstep_state_dict")
    model = driftar.load_official("nextstep_1", state | {"gen_pos_embed": torch.zeros(1)}, config)
    assert model.name == "nextstep_1" and model.config == published.config
    for name, value in published.state_dict().items():
        assert torch.equal(model.state_dict()[name], value)


@torch.no_grad()
def test_bfloat16_stays_near_fp32(published: NextStep, numbers: dict[str, Tensor]) -> None:
    model = NextStep(**published.config).eval()
    model.load_state_dict(published.state_dict())
    model.to(torch.bfloat16)
    hidden = model.hidden(model.embed(numbers["input_ids"]))
    assert hidden.dtype == torch.bfloat16
    golden.assert_near(hidden.float(), numbers["hidden_nomask"], 0.03)
    ids = torch.tensor([[1, 2, 90]])
    latents = model.generate(ids, num_steps=3, grid_size=(2, 2))
    assert latents.dtype == torch.bfloat16 and bool(latents.isfinite().all())


def test_grids_beyond_the_position_table_are_named(published: NextStep) -> None:
    with pytest.raises(ValueError, match="at most 1024 tokens"):
        published.generate(torch.tensor([[90]]), grid_size=(33, 32))
    with pytest.raises(ValueError, match="tokens must be"):
        published.unpatchify(torch.zeros(1, 5, 16), (2, 3))
