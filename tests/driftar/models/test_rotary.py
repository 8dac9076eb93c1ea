from __future__ import annotations

import pytest
import torch

from driftar.models.rotary import RotaryEmbedding, position_table, rotate
from tests.driftar import golden


def test_angles_match_published_numbers() -> None:
    numbers = golden.tensors("E_nextstep_forward")
    rotary = RotaryEmbedding(16, 10000.0)
    assert torch.equal(rotary.inv_freq, numbers["rope_inv_freq"])
    cos, sin = rotary(0, 6)
    golden.assert_near(cos.repeat(1, 2)[None], numbers["rope_cos_pos0_5"], 1e-6)
    golden.assert_near(sin.repeat(1, 2)[None], numbers["rope_sin_pos0_5"], 1e-6)


def test_scores_depend_on_the_distance_only() -> None:
    rotary = RotaryEmbedding(8, 10000.0)
    query, key = torch.randn(1, 8), torch.randn(1, 8)

    def score(i: int, j: int) -> float:
        return float((rotate(query, rotary(i, 1)) * rotate(key, rotary(j, 1))).sum())

    assert score(7, 3) == pytest.approx(score(104, 100), abs=1e-4)
    assert score(7, 3) != pytest.approx(score(7, 5), abs=1e-3)


def test_a_cast_keeps_exact_frequencies() -> None:
    expected = RotaryEmbedding(16, 1e6).inv_freq
    cast = RotaryEmbedding(16, 1e6).to(torch.bfloat16)
    assert torch.equal(cast.inv_freq, expected)
    assert rotate(torch.zeros(3, 16, dtype=torch.bfloat16), cast(0, 3)).dtype == torch.bfloat16


def test_position_table_matches_published_numbers() -> None:
    numbers = golden.tensors("E_nextstep_forward")
    table = position_table(64, 32)
    golden.assert_near(table[None, :64], numbers["gen_pos_embed_first64"], 1e-6)
    golden.assert_near(table[[1023, 512]][None], numbers["gen_pos_embed_rows_1023_512"], 1e-6)
    golden.assert_near(table.double().sum().float(), numbers["gen_pos_embed_sum"], 1e-5)


def test_widths_that_do_not_fit_are_named() -> None:
    with pytest.raises(ValueError, match="head_dim"):
        RotaryEmbedding(7, 10000.0)
    with pytest.raises(ValueError, match="width"):
        position_table(6, 4)
