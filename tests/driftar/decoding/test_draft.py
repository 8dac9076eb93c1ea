from __future__ import annotations

import pytest
import torch

from driftar.decoding.draft import DraftModel
from driftar.models.layers import TransformerBlock
from tests.driftar import golden


@pytest.fixture(scope="module")
def published() -> DraftModel:
    config = golden.metadata("F_driftar_state_dict", "config")
    model = DraftModel(
        config["encoder_embed_dim"], config["encoder_num_heads"], config["draft_depth"]
    )
    state = golden.tensors("F_driftar_state_dict")
    model.load_state_dict(golden.below(state, "draft_model."), strict=True)
    return model.eval()


@torch.no_grad()
def test_draft_matches_published_numbers(published: DraftModel) -> None:
    numbers = golden.tensors("F_driftar_forward")
    golden.assert_near(published(numbers["draft_in"]), numbers["draft_out"], 1e-5)
    out, entropy = published.with_entropy(numbers["draft_in"])
    golden.assert_near(out, numbers["draft_out"], 1e-5)
    golden.assert_near(entropy, numbers["draft_entropy"], 1e-5)


@torch.no_grad()
def test_eps_of_the_published_training_script(published: DraftModel) -> None:
    numbers = golden.tensors("F_driftar_forward")
    other = DraftModel(64, 4, 2, eps=1e-5).eval()
    other.load_state_dict(published.state_dict())
    golden.assert_near(other(numbers["draft_in"]), numbers["draft_out_eps1e-5"], 1e-4)


@torch.no_grad()
def test_later_features_do_not_change_earlier_drafts(published: DraftModel) -> None:
    z = torch.randn(1, 16, 64)
    changed = z.clone()
    changed[:, 9:] += 1
    before, after = published(z), published(changed)
    torch.testing.assert_close(after[:, :9], before[:, :9])
    assert not torch.allclose(after[:, 9:], before[:, 9:])


def test_copy_takes_the_first_blocks_and_the_norm() -> None:
    blocks = [TransformerBlock(32, 4) for _ in range(3)]
    norm = torch.nn.LayerNorm(32)
    torch.nn.init.normal_(norm.weight)
    draft = DraftModel(32, 4, 2)
    projection = draft.out_proj.weight.clone()
    draft.copy_from(blocks, norm)
    for own, source in zip(draft.blocks, blocks, strict=False):
        for name, value in source.state_dict().items():
            assert torch.equal(own.state_dict()[name], value)
    assert torch.equal(draft.norm.weight, norm.weight)
    assert torch.equal(draft.out_proj.weight, projection)
    with torch.no_grad():
        blocks[0].norm1.weight.add_(1)
    first = draft.blocks[0]
    assert isinstance(first, TransformerBlock)
    assert not torch.equal(first.norm1.weight, blocks[0].norm1.weight)


def test_impossible_depths_are_named() -> None:
    with pytest.raises(ValueError, match="depth"):
        DraftModel(32, 4, 0)
    with pytest.raises(ValueError, match="blocks"):
        DraftModel(32, 4, 2).copy_from([TransformerBlock(32, 4)], torch.nn.LayerNorm(32))
