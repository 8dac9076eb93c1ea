from __future__ import annotations

import pytest
import torch

from driftar.decoding.early_stopping import EntropyTracker
from tests.driftar import golden


def test_statistics_and_thresholds_follow_the_published_trace() -> None:
    run = golden.tensors("F_driftar_sampling")
    trace = run["tracker_mean_var_count_ema_tauG_tauC"]
    tracker = EntropyTracker()
    for batch, expected in zip(run["tracker_in"], trace, strict=True):
        tracker.update(batch)
        actual = torch.tensor(
            [
                tracker.mean,
                tracker.variance,
                tracker.count,
                tracker.average,
                tracker.tau_global,
                tracker.tau_context,
            ]
        )
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-7)


def test_stops_below_both_thresholds() -> None:
    tracker = EntropyTracker()
    tracker.update(torch.tensor([0.2, 0.4]))
    tracker.update(torch.tensor([0.8, 0.9]))
    lowest = min(tracker.tau_global, tracker.tau_context)
    assert tracker.stops(lowest - 1e-6)
    assert not tracker.stops(lowest)


def test_bad_arguments_are_named() -> None:
    for gamma in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="gamma"):
            EntropyTracker(gamma=gamma)
    with pytest.raises(ValueError, match="decay"):
        EntropyTracker(decay=1.0)
    with pytest.raises(ValueError, match="entropy"):
        EntropyTracker().update(torch.zeros(1))
