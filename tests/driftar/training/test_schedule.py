from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import nn

from driftar.training import schedule
from tests.driftar import golden


@pytest.mark.parametrize(
    ("name", "total", "alpha_0", "freeze"),
    [("alpha_total100_a0_0p95_f0p8", 100, 0.95, 0.8), ("alpha_total37_a0_0p9_f0p5", 37, 0.9, 0.5)],
)
def test_annealing_matches_published_numbers(
    name: str, total: int, alpha_0: float, freeze: float
) -> None:
    expected = golden.tensors("F_driftar_schedule_bank")[name]
    actual = [
        schedule.annealing_weight(epoch, total, alpha_0=alpha_0, freeze_fraction=freeze)
        for epoch in range(total + 1)
    ]
    torch.testing.assert_close(torch.tensor(actual), expected, rtol=1e-6, atol=1e-7)


def test_second_phase_matches_published_numbers() -> None:
    numbers = golden.tensors("F_driftar_schedule_bank")
    actual = [
        schedule.in_phase_two(epoch, 100, freeze_fraction=0.8)
        for epoch in numbers["epochs"].tolist()
    ]
    assert actual == numbers["phase2_total100"].bool().tolist()


def test_learning_rate_warms_up_holds_and_decays() -> None:
    rates = [
        schedule.learning_rate(step, 100, peak=2.0, warmup=10, decay_from=0.5, final=0.1)
        for step in range(101)
    ]
    assert rates[0] == pytest.approx(0.2)
    assert rates[10:51] == [2.0] * 41
    assert rates[75] == pytest.approx(1.1)
    assert rates[100] == pytest.approx(0.2)
    assert all(a >= b for a, b in pairwise(rates[50:]))


def test_learning_rate_reaches_groups_by_their_scale() -> None:
    weights = [nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))]
    groups = [{"params": weights[:1], "scale": 0.5}, {"params": weights[1:]}]
    optimizer = torch.optim.SGD(groups, lr=1.0)
    schedule.set_learning_rate(optimizer, 0.3)
    assert [group["lr"] for group in optimizer.param_groups] == [0.15, 0.3]


def test_average_follows_quickly_first_and_slowly_later() -> None:
    model, average = nn.BatchNorm1d(2), nn.BatchNorm1d(2)
    with torch.no_grad():
        model.weight.fill_(3.0)
    model.num_batches_tracked.fill_(7)
    schedule.update_average(average, model, 0, decay=0.99)
    torch.testing.assert_close(average.weight.detach(), torch.full((2,), 1 + 2 * 0.9))
    assert int(average.num_batches_tracked) == 7
    before = average.weight.clone()
    schedule.update_average(average, model, 10**6, decay=0.99)
    torch.testing.assert_close(average.weight, before + 0.01 * (3 - before))
