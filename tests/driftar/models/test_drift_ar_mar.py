from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import driftar
from driftar.models.drift_ar_mar import DriftARMAR
from driftar.models.drift_stage import FeatureEncoder
from driftar.models.layers import TransformerBlock
from driftar.models.mar_backbone import MARBackbone
from tests.driftar import golden


@pytest.fixture
def tiny() -> DriftARMAR:
    model: DriftARMAR = driftar.build_model("drift_ar_mar_tiny").eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)  # zero-initialised outputs hide everything
    return model


@torch.no_grad()
def test_feature_map_matches_published_numbers() -> None:
    numbers = golden.tensors("F_driftar_forward")
    state = golden.tensors("F_driftar_state_dict")
    encoder = FeatureEncoder(TransformerBlock(64, 4))
    encoder.load_state_dict(golden.below(state, "feature_encoder."), strict=True)
    projection = golden.below(state, "token_to_enc_proj.")
    tokens = torch.nn.functional.linear(
        numbers["phi_tokens_in"], projection["weight"], projection["bias"]
    )
    golden.assert_near(encoder(tokens), numbers["phi_out"], 1e-5)


@torch.no_grad()
def test_prior_matches_published_numbers() -> None:
    numbers = golden.tensors("F_driftar_forward")
    state = golden.tensors("F_driftar_state_dict")
    model = driftar.build_model("drift_ar_mar_tiny")
    model.enc_to_token_proj.load_state_dict(golden.below(state, "enc_to_token_proj."))
    x0 = model.prior(numbers["z_AR"], numbers["entropy_map"], numbers["noise"])
    golden.assert_near(x0, numbers["x0"], 1e-5)


@torch.no_grad()
def test_feature_encoder_never_drops_out() -> None:
    model = driftar.build_model("drift_ar_mar_tiny", backbone={"dropout": 0.5}).train()
    tokens = torch.randn(2, 16, 4)
    assert model.backbone.penultimate_block.training
    assert torch.equal(model.phi(tokens), model.phi(tokens))
    assert not any(p.requires_grad for p in model.feature_encoder.parameters())


@torch.no_grad()
def test_entropy_is_that_of_the_buffered_causal_map(tiny: DriftARMAR) -> None:
    """Compare with the explicit softmax of the penultimate block (Eq. 4, head mean first)."""
    backbone: MARBackbone = tiny.backbone
    condition = tiny.condition(torch.tensor([2, -1]))
    z, entropy = tiny.features(condition)

    mask = torch.ones(2, 16, dtype=torch.bool)
    x = backbone.decoder_input(backbone.encode(torch.zeros(2, 16, 4), mask, condition), mask)
    x = backbone.decoder_blocks[0](x)
    block = backbone.penultimate_block
    query, key, _ = block.attn.qkv(block.norm1(x)).unflatten(-1, (3, 4, 16)).unbind(2)
    scores = torch.einsum("bihd,bjhd->bhij", query, key) / 4
    content = scores[:, :, 4:, 4:].masked_fill(torch.ones(16, 16).triu(1).bool(), -torch.inf)
    average = content.softmax(-1).mean(1)
    rows = -(average * average.clamp(min=1e-30).log()).sum(-1)
    expected = rows[:, 1:] / torch.arange(2, 17).log()
    torch.testing.assert_close(entropy[:, 1:], expected, rtol=1e-4, atol=1e-5)
    assert float(entropy[:, 0].abs().max()) == 0
    assert z.shape == (2, 16, 64)


def test_entropy_carries_gradients_to_the_condition(tiny: DriftARMAR) -> None:
    condition = tiny.condition(torch.tensor([1])).detach().requires_grad_()
    entropy = tiny.features(condition)[1]
    (gradient,) = torch.autograd.grad(entropy.sum(), condition)
    assert float(gradient.abs().max()) > 0


@torch.no_grad()
def test_generate_is_features_prior_and_one_decode(tiny: DriftARMAR) -> None:
    labels, noise = torch.tensor([7, 0, 7]), torch.randn(3, 16, 4)
    result = tiny.generate_with_stats(labels, noise=lambda shape: noise)
    z, entropy = tiny.features(tiny.condition(labels))
    tokens = tiny.decode(tiny.prior(z, entropy, noise), z, entropy)
    torch.testing.assert_close(result.latents, tiny.unpatchify(tokens))
    assert result.entropy is not None
    torch.testing.assert_close(result.entropy, entropy)
    assert result.stats.decoder_nfe == 1
    assert result.stats.total_seconds == pytest.approx(
        result.stats.ar_seconds + result.stats.decoder_seconds
    )
    assert not torch.equal(result.latents[0], result.latents[2])


@torch.no_grad()
def test_guidance_extrapolates_branches_that_share_noise(tiny: DriftARMAR) -> None:
    labels, noise = torch.tensor([4]), torch.randn(1, 16, 4)

    def generate(classes: Tensor, cfg: float) -> Tensor:
        return tiny.generate(classes, cfg=cfg, noise=lambda shape: noise)

    conditional, unconditional = generate(labels, 1.0), generate(torch.tensor([-1]), 1.0)
    expected = unconditional + 2.5 * (conditional - unconditional)
    torch.testing.assert_close(generate(labels, 2.5), expected, rtol=1e-4, atol=1e-4)


def test_generation_needs_a_finite_weight_and_good_noise(tiny: DriftARMAR) -> None:
    labels = torch.tensor([0])
    with pytest.raises(ValueError, match="cfg"):
        tiny.generate(labels, cfg=math.nan)
    with pytest.raises(ValueError, match="noise"):
        tiny.generate(labels, noise=lambda shape: torch.zeros(2, 16, 4))
    with pytest.raises(ValueError, match="class_labels"):
        tiny.generate(torch.tensor([10]))
    assert tiny.generate(torch.zeros(0, dtype=torch.long)).shape == (0, 1, 8, 8)


def test_copies_follow_the_loaded_backbone() -> None:
    backbone = driftar.build_model("mar_tiny")
    model = driftar.build_model("drift_ar_mar_tiny")
    state = backbone.state_dict()
    model.backbone.load_state_dict({key: state[key] for key in model.backbone.state_dict()})
    model.initialise_copies()
    phi = model.feature_encoder.block.state_dict()
    for name, value in backbone.decoder_blocks[1].state_dict().items():
        assert torch.equal(phi[name], value)
    first = model.draft_model.blocks[0].state_dict()
    for name, value in backbone.decoder_blocks[0].state_dict().items():
        assert torch.equal(first[name], value)


def test_token_projection_keeps_distances() -> None:
    model = driftar.build_model("drift_ar_mar_tiny")
    a, b = torch.randn(5, 4), torch.randn(5, 4)
    projected = model.token_to_enc_proj(a) - model.token_to_enc_proj(b)
    torch.testing.assert_close(projected.norm(dim=1), 4 * (a - b).norm(dim=1))


def test_backbone_without_a_penultimate_block_is_refused() -> None:
    with pytest.raises(ValueError, match="decoder_depth"):
        driftar.build_model("drift_ar_mar_tiny", backbone={"decoder_depth": 1})
