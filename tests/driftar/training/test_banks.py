from __future__ import annotations

import pytest
import torch

from driftar.training.banks import ClassBank
from tests.driftar import golden


def test_ring_matches_published_numbers() -> None:
    numbers = golden.tensors("F_driftar_schedule_bank")
    bank = ClassBank(4, 3, 5)
    for vectors, labels in zip(numbers["bank_samples"], numbers["bank_labels"], strict=True):
        # The published bank drops labels it does not know; here only -1 may be dropped.
        bank.push(vectors, labels.masked_fill(labels >= 4, -1))
    assert torch.equal(bank.samples, numbers["bank_state"])
    assert torch.equal(bank.counts, numbers["bank_count"].long())
    assert torch.equal(bank.pointers, numbers["bank_ptr"].long())


def test_one_push_beyond_the_capacity_equals_many() -> None:
    vectors = torch.arange(7.0)[:, None]
    whole, single = ClassBank(1, 3, 1), ClassBank(1, 3, 1)
    whole.push(vectors, torch.zeros(7).long())
    for vector in vectors:
        single.push(vector[None], torch.zeros(1).long())
    assert torch.equal(whole.samples, single.samples)
    assert torch.equal(whole.pointers, single.pointers)


def test_draws_come_from_the_class_and_do_not_repeat_while_they_last() -> None:
    bank = ClassBank(2, 4, 1)
    bank.push(torch.arange(6.0)[:, None], torch.tensor([0, 0, 0, 1, 1, 1]))
    drawn = bank.draw(torch.tensor([1, 0, -1]), 3, torch.Generator().manual_seed(0))[..., 0]
    assert sorted(drawn[0].tolist()) == [3, 4, 5]
    assert sorted(drawn[1].tolist()) == [0, 1, 2]
    assert len(set(drawn[2].tolist())) == 3
    more = bank.draw(torch.tensor([1]), 50, torch.Generator().manual_seed(0))
    assert set(more.flatten().tolist()) == {3.0, 4.0, 5.0}


def test_state_dict_restores_the_bank() -> None:
    bank, other = ClassBank(2, 4, 3), ClassBank(2, 4, 3)
    bank.push(torch.randn(5, 3), torch.tensor([0, 1, 1, 0, 1]))
    other.load_state_dict(bank.state_dict())
    for b in (bank, other):
        b.push(torch.ones(1, 3), torch.tensor([1]))
    assert torch.equal(bank.samples, other.samples)


def test_bad_arguments_are_named_and_change_nothing() -> None:
    bank = ClassBank(2, 4, 3)
    generator = torch.Generator()
    cases = [
        (torch.zeros(1, 2), torch.tensor([0]), "vectors"),
        (torch.zeros(2, 3), torch.tensor([0]), "labels"),
        (torch.zeros(2, 3), torch.tensor([0, 2]), "labels"),
        (torch.zeros(1, 3), torch.tensor([-2]), "labels"),
        (torch.full((1, 3), torch.nan), torch.tensor([0]), "vectors"),
    ]
    for vectors, labels, name in cases:
        with pytest.raises(ValueError, match=name):
            bank.push(vectors, labels)
    assert int(bank.counts.sum()) == 0
    with pytest.raises(ValueError, match="no sample of class 1"):
        bank.draw(torch.tensor([1]), 1, generator)
    with pytest.raises(ValueError, match="labels"):
        bank.draw(torch.tensor([2]), 1, generator)
    with pytest.raises(ValueError, match="capacity"):
        ClassBank(1, 0, 3)
