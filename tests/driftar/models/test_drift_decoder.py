from __future__ import annotations

import pytest
import torch

from driftar.models.drift_decoder import DriftDecoder
from tests.driftar import golden


@pytest.fixture(scope="module")
def published() -> DriftDecoder:
    decoder = DriftDecoder(
        seq_len=16, token_channels=4, context_width=64, width=64, num_heads=4, depth=2
    )
    state = golden.tensors("F_driftar_state_dict")
    decoder.load_state_dict(golden.below(state, "drift_decoder."), strict=True)
    return decoder.eval()


@torch.no_grad()
def test_decoder_matches_published_numbers(published: DriftDecoder) -> None:
    numbers = golden.tensors("F_driftar_forward")
    x, z, entropy = numbers["dec_x"], numbers["dec_z"], numbers["dec_entropy"]
    golden.assert_near(published(x, z, entropy), numbers["dec_out"], 1e-5)
    golden.assert_near(published(x, z), numbers["dec_out_no_entropy"], 1e-5)
    image, scale, shift = published.net.entropy_adaln(entropy)
    modulation = image + published.net.level_embed
    golden.assert_near(modulation, numbers["dec_global_mod"] + published.net.level_embed, 1e-5)
    golden.assert_near(scale, numbers["dec_spatial_scale"], 1e-5)
    golden.assert_near(shift, numbers["dec_spatial_shift"], 1e-5)


def test_new_decoder_ignores_entropy_and_returns_zero() -> None:
    decoder = DriftDecoder(
        seq_len=4, token_channels=2, context_width=8, width=16, num_heads=2, depth=1
    )
    x, z = torch.randn(3, 4, 2), torch.randn(3, 5, 8)
    assert torch.equal(decoder(x, z, torch.rand(3, 4)), torch.zeros(3, 4, 2))
    torch.nn.init.normal_(decoder.net.final_layer.linear.weight)
    torch.testing.assert_close(decoder(x, z, torch.rand(3, 4)), decoder(x, z, None))


@pytest.mark.parametrize(
    ("x", "z", "entropy", "name"),
    [
        ((2, 15, 4), (2, 16, 64), (2, 16), "x0"),
        ((2, 16, 3), (2, 16, 64), (2, 16), "x0"),
        ((2, 16, 4), (3, 16, 64), (2, 16), "z"),
        ((2, 16, 4), (2, 16, 32), (2, 16), "z"),
        ((2, 16, 4), (2, 16, 64), (2, 15), "entropy"),
    ],
)
def test_bad_shapes_are_named(
    published: DriftDecoder,
    x: tuple[int, ...],
    z: tuple[int, ...],
    entropy: tuple[int, ...],
    name: str,
) -> None:
    with pytest.raises(ValueError, match=f"^{name} "):
        published(torch.zeros(x), torch.zeros(z), torch.zeros(entropy))
