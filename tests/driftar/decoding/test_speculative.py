from __future__ import annotations

import pytest
import torch
from torch import Tensor

import driftar
from driftar.decoding.early_stopping import EntropyTracker
from driftar.decoding.speculative import speculative_generate
from driftar.models.drift_ar import DriftAR
from tests.driftar import golden


@pytest.fixture(scope="module")
def published() -> DriftAR:
    config = golden.metadata("F_driftar_state_dict", "config")
    state = golden.tensors("F_driftar_state_dict")
    model: DriftAR = driftar.load_official("drift_ar", state, config)
    return model


def between_distances(threshold: Tensor, distance: Tensor) -> float:
    """A threshold that decides alike. The published one may equal a distance, which a rounding then
    puts on either side.
    """
    near, far = distance[distance < threshold], distance[distance >= threshold]
    return float(threshold) if near.numel() == 0 else float((near.max() + far.min()) / 2)


@pytest.mark.parametrize("case", ["spec0", "spec1", "spec2"])
def test_one_round_matches_the_published_run(published: DriftAR, case: str) -> None:
    numbers = golden.tensors("F_driftar_sampling")
    run = golden.below(numbers, f"{case}_")
    tracker = EntropyTracker(gamma=float(run["gamma"]))
    result = speculative_generate(
        published,
        numbers["cfg_labels"],
        threshold=between_distances(run["threshold"], run["distance"]),
        cfg=float(run["cfg"]),
        tracker=tracker,
        noise=lambda shape: run["noise"],
    )
    golden.assert_near(result.latents, run["out_latent"], 1e-5)
    golden.assert_near(result.distance, run["distance"], 1e-5)
    assert torch.equal(result.accepted_lengths, run["accepted_lengths"])
    golden.assert_near(result.draft_entropy.mean(), run["draft_entropy_mean"], 1e-5)
    assert tracker.tau_global == pytest.approx(float(run["tau_global"]), rel=1e-5)
    assert tracker.tau_context == pytest.approx(float(run["tau_context"]), rel=1e-5)
    assert result.early_stop == bool(run["early_stopped"])


def test_nothing_accepted_is_plain_generation(published: DriftAR) -> None:
    labels, noise = torch.tensor([1, 5]), torch.randn(2, 16, 4)
    result = speculative_generate(
        published, labels, threshold=0.0, cfg=1.4, noise=lambda shape: noise
    )
    expected = published.generate(labels, cfg=1.4, noise=lambda shape: noise)
    torch.testing.assert_close(result.latents, expected, rtol=1e-4, atol=1e-4)
    assert not bool(result.accepted.any())


def test_works_on_the_masked_backbone_and_names_bad_arguments() -> None:
    model = driftar.build_model("drift_ar_mar_tiny").eval()
    result = speculative_generate(model, torch.tensor([0, -1]), threshold=1e9)
    assert result.latents.shape == (2, 1, 8, 8)
    assert result.accepted_lengths.tolist() == [16, 16]
    with pytest.raises(ValueError, match="threshold"):
        speculative_generate(model, torch.tensor([0]), threshold=float("nan"))
