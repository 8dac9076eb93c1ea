from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from driftar.models.layers import TransformerBlock
from driftar.models.stack import block_causal_mask, run_blocks

CPU = torch.device("cpu")


def test_groups_of_one_are_causal_behind_the_buffer() -> None:
    visible = block_causal_mask(2, 3, 1, CPU).int().tolist()
    assert visible == [
        [1, 1, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 1, 1, 0],
        [1, 1, 1, 1, 1],
    ]


def _explicit_entropy(block: TransformerBlock, x: Tensor, visible: Tensor, start: int) -> Tensor:
    """Normalised entropy of the head-averaged map over keys from ``start`` on."""
    heads = block.attn.num_heads
    query, key, _ = block.attn.qkv(block.norm1(x)).unflatten(-1, (3, heads, -1)).unbind(2)
    scores = torch.einsum("bihd,bjhd->bhij", query, key) / query.shape[-1] ** 0.5
    seen = visible.clone()
    seen[:, :start] = False
    average = scores.masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num().mean(1)
    entropy = -torch.special.xlogy(average, average).sum(-1)
    return (entropy / seen.sum(1).clamp(min=2).log())[:, start:]


@torch.no_grad()
def test_entropies_of_chosen_layers_come_with_the_same_output() -> None:
    blocks = nn.ModuleList(TransformerBlock(16, 2) for _ in range(4))
    x, causal = torch.randn(2, 7, 16), block_causal_mask(2, 5, 1, CPU)
    everything = torch.ones_like(causal)
    out, (last_but_one, first) = run_blocks(
        blocks, x, layer_masks={2: causal}, entropy_layers=(-2, 0), entropy_from=2
    )
    inputs = [x]
    for index, block in enumerate(blocks):
        inputs.append(block(inputs[-1], causal if index == 2 else None))
    torch.testing.assert_close(out, inputs[-1])
    torch.testing.assert_close(first, _explicit_entropy(blocks[0], x, everything, 2))  # type: ignore[arg-type]
    expected = _explicit_entropy(blocks[2], inputs[2], causal, 2)  # type: ignore[arg-type]
    torch.testing.assert_close(last_but_one, expected)


@pytest.mark.parametrize("layer", [3, -4])
def test_layers_that_do_not_exist_are_named(layer: int) -> None:
    blocks = nn.ModuleList(TransformerBlock(8, 1) for _ in range(3))
    with pytest.raises(ValueError, match="entropy_layers"):
        run_blocks(blocks, torch.zeros(1, 2, 8), entropy_layers=(layer,))
