from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import driftar
from driftar.models.drift_ar import DriftAR
from driftar.models.weights import WeightsError
from driftar.training.losses import DriftARLosses, drift_ar_losses
from tests.driftar import golden
from tests.driftar.models.training import randomise, replay, train


@pytest.fixture(scope="module")
def config() -> dict[str, Any]:
    return golden.metadata("F_driftar_state_dict", "config")


@pytest.fixture
def published(config: dict[str, Any]) -> DriftAR:
    """The official weights, loaded strictly."""
    state = golden.tensors("F_driftar_state_dict")
    model: DriftAR = driftar.load_official("drift_ar", state, config)
    return model


@pytest.fixture(scope="module")
def numbers() -> dict[str, Tensor]:
    return golden.tensors("F_driftar_forward")


@pytest.fixture
def tiny() -> DriftAR:
    model: DriftAR = driftar.build_model("drift_ar_tiny").eval()
    return randomise(model)


@torch.no_grad()
def test_features_and_entropy_match_published_numbers(
    published: DriftAR, numbers: dict[str, Tensor]
) -> None:
    for labels, suffix in ((numbers["labels"], ""), (torch.tensor([-1] * 3), "_uncond")):
        z, entropy = published.features(published.condition(labels))
        golden.assert_near(z, numbers[f"z_AR{suffix}"], 1e-5)
        expected = numbers["entropy_map" if suffix == "" else "entropy_uncond"]
        golden.assert_near(entropy, expected, 1e-5)


@torch.no_grad()
def test_prior_decoder_and_phi_match_published_numbers(
    published: DriftAR, numbers: dict[str, Tensor]
) -> None:
    z, entropy = numbers["z_AR"], numbers["entropy_map"]
    x0 = published.prior(z, entropy, numbers["noise"])
    golden.assert_near(x0, numbers["x0"], 1e-5)
    golden.assert_near(published.decode(x0, z, entropy), numbers["x_hat"], 1e-5)
    golden.assert_near(published.phi(numbers["phi_tokens_in"]), numbers["phi_out"], 1e-5)


@torch.no_grad()
@pytest.mark.parametrize(("eps", "key"), [(1e-6, "draft_out"), (1e-5, "draft_out_eps1e-5")])
def test_draft_matches_published_numbers(
    config: dict[str, Any], numbers: dict[str, Tensor], eps: float, key: str
) -> None:
    state = golden.tensors("F_driftar_state_dict")
    model: DriftAR = driftar.load_official("drift_ar", state, {**config, "draft_eps": eps})
    golden.assert_near(model.draft(numbers["draft_in"]), numbers[key], 1e-5)


@pytest.mark.parametrize("case", ["nocfg", "cfg"])
def test_generation_matches_the_published_run(published: DriftAR, case: str) -> None:
    run = golden.below(golden.tensors("F_driftar_sampling"), f"{case}_")
    noise = replay(run["noise"])
    result = published.generate_with_stats(run["labels"], cfg=float(run["cfg"]), noise=noise)
    golden.assert_near(result.latents, run["out_latent"], 1e-5)
    assert noise.exhausted
    assert result.stats.decoder_nfe == 1


@pytest.mark.parametrize("case", ["phase1", "phase2", "noneg"])
def test_losses_and_all_gradients_match_the_published_step(published: DriftAR, case: str) -> None:
    numbers = golden.tensors("F_driftar_train")
    run = golden.below(numbers, f"{case}_")
    losses = drift_ar_losses(
        published,
        published.condition(numbers["labels"]),
        run["noise"],
        numbers["pos_features"],
        None if case == "noneg" else numbers["neg_features"],
        detach=case == "phase2",
    )
    for actual, name in zip(losses, ("drift", "reg", "entropy"), strict=True):
        golden.assert_near(actual.detach(), run[f"loss_{name}"], 1e-5)
    total = losses.total(0.0 if case == "phase2" else 0.4)
    golden.assert_near(total.detach(), run["total_alpha0.4"], 1e-5)

    total.backward()
    gradients = {name: p.grad for name, p in published.named_parameters() if p.requires_grad}
    names: Any = golden.metadata("F_driftar_train", "grad_norm_names")
    assert gradients.keys() == set(names)
    for name, expected in zip(names, run["grad_norms"].tolist(), strict=True):
        gradient = gradients[name]
        norm = 0.0 if gradient is None else float(gradient.norm())
        # Shifting all keys changes no softmax: what is left of that gradient is rounding.
        assert norm == pytest.approx(expected, rel=1e-4, abs=1e-7), name
    for name, key in (
        ("token_to_enc_proj.weight", "token_to_enc_proj"),
        ("drift_decoder.net.final_layer.linear.weight", "final_linear"),
        ("drift_decoder.net.input_proj.weight", "input_proj"),
    ):
        gradient = gradients[name]
        assert gradient is not None
        golden.assert_near(gradient, run[f"grad_{key}"], 1e-5)


@pytest.mark.parametrize("size", ["base", "large", "huge"])
def test_published_sizes_have_the_official_parameters(size: str) -> None:
    with torch.device("meta"):
        model = driftar.build_model(f"drift_ar_{size}")
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    assert shapes == golden.parameters(f"drift_ar_{size}")


def test_checkpoints_without_the_feature_map_get_its_copy(
    published: DriftAR, config: dict[str, Any]
) -> None:
    state = golden.tensors("F_driftar_state_dict")
    without = {key: value for key, value in state.items() if "feature_encoder" not in key}
    model = driftar.load_official("drift_ar", without, config)
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key])
    del state["feature_encoder.block.norm1.bias"]
    with pytest.raises(WeightsError, match=r"missing: feature_encoder\.block\.norm1\.bias"):
        driftar.load_official("drift_ar", state, config)


def test_training_learns_and_reaches_every_used_parameter() -> None:
    """The drift loss itself stays flat: what it trains is the way from samples to data."""
    model: DriftAR = driftar.build_model("drift_ar_tiny")
    labels, noise = torch.tensor([0, 1, -1]), torch.randn(3, 16, 4)
    data = 2 + 0.1 * torch.randn(9, 16, 4)

    def losses() -> DriftARLosses:
        with torch.no_grad():
            positives = model.phi(data).reshape(3, 48, 64)
        condition = model.condition(labels)
        return drift_ar_losses(model, condition, noise, positives, temperatures=(0.5,))

    def distance() -> float:
        tokens = model.patchify(model.generate(labels, noise=lambda shape: noise))
        return float((tokens.mean((0, 1)) - data.mean((0, 1))).norm())

    first, away = losses().draft.item(), distance()
    # What the encoder's tokens would hold has no influence.
    assert train(model, lambda: losses().total(0.5)) == {"z_proj.weight", "z_proj.bias"}
    assert losses().draft.item() < 0.9 * first
    assert distance() < 0.9 * away


@torch.no_grad()
def test_entropies_of_other_layers_come_in_the_same_pass(tiny: DriftAR) -> None:
    condition = tiny.condition(torch.tensor([1, -1]))
    z, (shallow, penultimate) = tiny.features_with_entropies(condition, (0, -2))
    expected_z, expected_entropy = tiny.features(condition)
    torch.testing.assert_close(z, expected_z)
    torch.testing.assert_close(penultimate, expected_entropy)
    assert float(penultimate[:, 0].abs().max()) == 0 < float(shallow[:, 0].min())


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda m: driftar.build_model("drift_ar_tiny", encoder_depth=0), "encoder_depth"),
        (lambda m: driftar.build_model("drift_ar_tiny", img_size=9), "img_size"),
        (lambda m: driftar.build_model("drift_ar_tiny", draft_depth=5), "blocks"),
        (lambda m: m.patchify(torch.zeros(1, 1, 16, 16)), "latents"),
        (lambda m: m.generate(torch.tensor([10])), "class_labels"),
        (lambda m: m.generate(torch.tensor([0]), cfg=float("inf")), "cfg"),
        (lambda m: m.features(torch.zeros(64)), "condition"),
    ],
)
def test_bad_arguments_are_named(tiny: DriftAR, call: Callable[[DriftAR], Any], name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name} must"):
        call(tiny)
