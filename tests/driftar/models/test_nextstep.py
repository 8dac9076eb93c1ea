from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import driftar
from driftar.models import flow
from driftar.models.nextstep import NextStep
from driftar.models.rotary import rotate
from tests.driftar import golden


@pytest.fixture
def tiny() -> NextStep:
    """A small model all of whose parts matter: fresh ones have zero outputs."""
    model: NextStep = driftar.build_model("nextstep_1_tiny").eval()
    for name, parameter in model.named_parameters():
        is_norm = name.endswith(("norm.weight", "_ln.weight"))
        torch.nn.init.normal_(parameter, mean=float(is_norm), std=0.15)
    return model


def prompts(batch: int, length: int = 7) -> Tensor:
    ids = torch.randint(0, 256, (batch, length))
    ids[:, -1] = 258
    return ids


@pytest.mark.parametrize(
    ("stored", "name"),
    [
        ({"model_type": "llama"}, "model_type"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_scaling"),
        ({"use_sliding_window": True}, "use_sliding_window"),
    ],
)
def test_unsupported_checkpoints_are_named(stored: dict[str, Any], name: str) -> None:
    with pytest.raises(ValueError, match=name):
        NextStep.config_of(stored)


@pytest.mark.parametrize(
    ("override", "name"),
    [
        ({"num_attention_heads": 5}, "num_attention_heads"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"latent_size": 9}, "latent_patch_size"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"hidden_size": 20, "num_attention_heads": 4}, "head_dim"),
    ],
)
def test_sizes_that_do_not_fit_are_named(override: dict[str, Any], name: str) -> None:
    with pytest.raises(ValueError, match=name):
        driftar.build_model("nextstep_1_tiny", **override)


@torch.no_grad()
def test_entropies_come_from_the_same_pass(tiny: NextStep) -> None:
    ids = prompts(2)
    plain = tiny.hidden(tiny.embed(ids))
    hidden, entropies = tiny.hidden_with_entropy(tiny.embed(ids), layers=(0, -2))
    torch.testing.assert_close(hidden, plain)
    assert set(entropies) == {0, -2}
    assert all(rows.shape == (2, 7) for rows in entropies.values())
    # Layer 0 by hand: the head-averaged map of its rotated queries and keys.
    layer: Any = tiny.layers[0]
    cache = tiny.new_cache(2, 7)
    tiny.hidden(tiny.embed(ids), None, cache)
    x = layer.input_layernorm(tiny.embed(ids))
    query = layer.self_attn.q_proj(x).unflatten(-1, (4, 16)).transpose(1, 2)
    query = rotate(query, tiny.rotary_emb(0, 7))
    keys = cache.seen(0)[0].repeat_interleave(2, dim=1)
    scores = (query @ keys.mT / 4).masked_fill(~torch.ones(7, 7).tril().bool(), -torch.inf)
    average = scores.softmax(-1).mean(1)
    expected = -torch.special.xlogy(average, average).sum(-1) / torch.arange(1, 8).log()
    expected[:, 0] = 0
    torch.testing.assert_close(entropies[0], expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_generation_reports_the_entropy_of_the_conditional_branch(tiny: NextStep) -> None:
    ids = prompts(4)
    result = tiny.generate_with_stats(ids, cfg=2.0, num_steps=2, grid_size=(2, 2), entropy_layer=-2)
    _, entropies = tiny.hidden_with_entropy(tiny.embed(ids[:2]), layers=(-2,))
    assert result.entropy is not None and result.entropy.shape == (2, 4)
    torch.testing.assert_close(result.entropy[:, 0], entropies[-2][:, -1])
    assert tiny.generate_with_stats(ids, num_steps=2, grid_size=(1, 1)).entropy is None


@torch.no_grad()
def test_padding_changes_nothing_but_positions(tiny: NextStep) -> None:
    """Rotary positions are relative, so that a padded prompt gives the same states."""
    ids = prompts(1)
    padded = torch.cat([torch.full((1, 4), 256), ids], dim=1)
    mask = torch.tensor([[0] * 4 + [1] * 7])
    plain = tiny.hidden(tiny.embed(ids))
    torch.testing.assert_close(tiny.hidden(tiny.embed(padded), mask)[:, 4:], plain)


def test_a_seed_fixes_the_images_and_captions_share_their_noise(tiny: NextStep) -> None:
    ids = prompts(1).repeat(4, 1)

    def images(seed: int, **options: Any) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return tiny.generate(ids, num_steps=3, generator=generator, **options)

    shared = images(0)
    assert shared.shape == (4, 1, 8, 8)
    assert torch.equal(shared, images(0))
    assert not torch.equal(shared, images(1))
    torch.testing.assert_close(shared[:1].expand_as(shared), shared)
    pairs = images(0, num_images_per_caption=2)
    torch.testing.assert_close(pairs[:2], pairs[2:])
    assert not torch.allclose(pairs[0], pairs[1])
    assert images(0, grid_size=(1, 3)).shape == (4, 1, 2, 6)


def test_guidance_towards_the_same_prompt_changes_nothing(tiny: NextStep) -> None:
    ids = prompts(2)

    def images(branches: int, **options: Any) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return tiny.generate(
            ids.repeat(branches, 1), num_steps=3, grid_size=(2, 2), generator=generator, **options
        )

    expected = images(1)
    torch.testing.assert_close(images(2, cfg=3.0), expected, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(images(3, cfg=3.0, cfg_img=2.0), expected, rtol=1e-3, atol=1e-4)


def test_progress_is_told_of_every_token(tiny: NextStep) -> None:
    calls: list[None] = []
    tiny.generate(prompts(1), num_steps=2, grid_size=(3, 3), progress=lambda: calls.append(None))
    assert len(calls) == 9


@pytest.fixture
def training_batch() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    ids = torch.cat([prompts(4), torch.full((4, 16), 260), torch.full((4, 1), 259)], dim=1)
    return ids, torch.randn(4, 1, 8, 8), torch.rand(2, 64), torch.randn(2, 64, 4)


def test_tiny_model_trains(training_batch: tuple[Tensor, ...]) -> None:
    model = driftar.build_model("nextstep_1_tiny")
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(25):
        loss = model.loss(*training_batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.75 * losses[0]


def test_every_parameter_gets_a_gradient(
    tiny: NextStep, training_batch: tuple[Tensor, ...]
) -> None:
    tiny.loss(*training_batch).backward()
    for name, parameter in tiny.named_parameters():
        assert parameter.grad is not None and float(parameter.grad.abs().max()) > 0, name


def test_loss_is_the_weighted_sum_of_its_parts(
    tiny: NextStep, training_batch: tuple[Tensor, ...]
) -> None:
    ids, latents, t, noise = training_batch
    states = tiny.hidden(tiny.embed(ids, latents))
    c = tiny.image_out_projector(states[:, 6:22]).flatten(0, 1).repeat(2, 1)
    target = tiny.patchify(latents).flatten(0, 1).repeat(2, 1)
    image = flow.flow_matching_loss(
        lambda x, time: tiny.velocity(x, time, c), target, t.flatten(), noise.flatten(0, 1)
    )
    logits = tiny.lm_head(torch.cat([states[:, :6], states[:, 22:23]], dim=1)).flatten(0, 1)
    labels = torch.cat([ids[:, 1:7], ids[:, 23:24]], dim=1).flatten()
    text = torch.nn.functional.cross_entropy(logits, labels)
    torch.testing.assert_close(tiny.loss(*training_batch), image + 0.01 * text)


def test_loss_leaves_out_padding_and_bears_a_lack_of_text(
    tiny: NextStep, training_batch: tuple[Tensor, ...]
) -> None:
    ids, latents, t, noise = training_batch
    padding, mask = torch.full((4, 3), 256), torch.ones(4, 27)
    mask[:, :3] = 0
    padded = tiny.loss(torch.cat([padding, ids], 1), latents, t, noise, attention_mask=mask)
    torch.testing.assert_close(padded, tiny.loss(*training_batch))
    bare = torch.cat([torch.full((4, 1), 258), torch.full((4, 16), 260)], dim=1)
    assert bool(tiny.loss(bare, latents, t, noise).isfinite())


def test_empty_batch_gives_no_images(tiny: NextStep) -> None:
    ids = torch.zeros(0, 3, dtype=torch.long)
    assert tiny.generate(ids, num_steps=2, grid_size=(2, 2)).shape == (0, 1, 4, 4)


@torch.no_grad()
def test_compiles_without_a_break(tiny: NextStep) -> None:
    torch._dynamo.reset()
    embeds, mask = tiny.embed(prompts(2)), torch.ones(2, 7)
    embeds_and_mask = (embeds, mask)
    head_inputs = (torch.randn(3, 4), torch.rand(3), torch.randn(3, 64))
    for function, arguments in ((tiny.hidden, embeds_and_mask), (tiny.velocity, head_inputs)):
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(*arguments), function(*arguments))


@torch.no_grad()
def test_cached_steps_compile_without_a_break(tiny: NextStep) -> None:
    torch._dynamo.reset()
    embeds, cache = tiny.embed(prompts(2)), tiny.new_cache(2, 7)
    compiled = torch.compile(tiny.hidden, fullgraph=True, backend="aot_eager")
    parts = [compiled(embeds[:, :4], None, cache)]
    parts += [compiled(embeds[:, i : i + 1], None, cache) for i in range(4, 7)]
    torch.testing.assert_close(torch.cat(parts, dim=1), tiny.hidden(embeds))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_runs_on_a_gpu(tiny: NextStep) -> None:
    ids = prompts(1)
    generator = torch.Generator().manual_seed(0)
    expected = tiny.generate(ids, num_steps=3, grid_size=(2, 2), generator=generator)
    generator.manual_seed(0)
    found = tiny.cuda().generate(ids.cuda(), num_steps=3, grid_size=(2, 2), generator=generator)
    golden.assert_near(found.cpu(), expected, 1e-3)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"cfg": float("nan")}, "cfg"),
        ({"cfg": 0.5}, "cfg"),
        ({"cfg_img": 2.0}, "cfg_img"),
        ({"cfg": 2.0}, "guidance branches"),
        ({"num_steps": 1}, "num_steps"),
        ({"num_steps": 0}, "num_steps"),
        ({"shift": 0.0}, "shift"),
        ({"cfg_schedule": "cosine"}, "cfg_schedule"),
        ({"num_images_per_caption": 2}, "noise_repeat"),
        ({"num_images_per_caption": 0}, "noise_repeat"),
        ({"grid_size": (0, 4)}, "grid_size"),
        ({"grid_size": (16, 16)}, "context of 256"),
        ({"attention_mask": torch.ones(1, 3)}, "attention_mask"),
        ({"entropy_layer": 3}, "layers"),
        ({"noise": lambda shape: torch.zeros(2)}, "noise"),
        ({"latents": torch.zeros(1, 1, 4, 4)}, "placeholder"),
    ],
)
def test_generate_names_a_bad_option(tiny: NextStep, options: dict[str, Any], name: str) -> None:
    with pytest.raises(ValueError, match=name):
        tiny.generate(prompts(1), **options)


def test_bad_ids_and_states_are_named(tiny: NextStep) -> None:
    with pytest.raises(TypeError, match="input_ids"):
        tiny.embed(torch.zeros(1, 2))
    with pytest.raises(ValueError, match=r"input_ids must be \[B, L\]"):
        tiny.embed(torch.zeros(2, dtype=torch.long))
    with pytest.raises(ValueError, match=r"input_ids must lie in \[0, 264\)"):
        tiny.embed(torch.tensor([[264]]))
    with pytest.raises(ValueError, match="inputs_embeds"):
        tiny.hidden(torch.zeros(1, 2, 63))
    with pytest.raises(ValueError, match="context of 256"):
        tiny.hidden(torch.zeros(1, 257, 64))
    with pytest.raises(ValueError, match="no room"):
        tiny.hidden(torch.zeros(1, 5, 64), None, tiny.new_cache(1, 4))
    with pytest.raises(ValueError, match="cache holds 2 rows"):
        tiny.hidden(torch.zeros(1, 1, 64), None, tiny.new_cache(2, 4))
    with pytest.raises(ValueError, match="c must be"):
        tiny.sample_token(torch.zeros(3, 64), cfg=2.0)
    with pytest.raises(ValueError, match="last_step_size"):
        tiny.sample_token(torch.zeros(2, 64), last_step_size=1.0)


def test_bad_training_input_is_named(tiny: NextStep, training_batch: tuple[Tensor, ...]) -> None:
    ids, latents, t, noise = training_batch
    with pytest.raises(ValueError, match="t must be"):
        tiny.loss(ids, latents, t[:, 1:], noise)
    with pytest.raises(ValueError, match="placeholder"):
        tiny.loss(ids[:, :-3], latents, t, noise)
    with pytest.raises(ValueError, match="begin with an image placeholder"):
        tiny.loss(ids[:, 7:], latents, t, noise)
