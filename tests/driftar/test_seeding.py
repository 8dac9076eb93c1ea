from __future__ import annotations

import pytest
import torch

from driftar.seeding import ImageNoise, check_seed, image_generators, reveal_orders


def test_an_image_draws_the_same_in_any_batch() -> None:
    together = ImageNoise(image_generators(5, 3))
    alone = ImageNoise(image_generators(6, 1))
    for length in (2, 4):
        expected = together((3 * length, 7))[length : 2 * length]
        assert torch.equal(alone((length, 7)), expected)


def test_doubled_draws_repeat_the_images() -> None:
    doubled = ImageNoise(image_generators(5, 2), lambda index: index > 0)
    plain = ImageNoise(image_generators(5, 2))
    assert torch.equal(doubled((4, 3)), plain((4, 3)))
    draw = doubled((8, 3))
    assert torch.equal(draw[:4], draw[4:])
    assert torch.equal(draw[:4], plain((4, 3)))


def test_orders_are_permutations_of_their_own() -> None:
    orders = reveal_orders(image_generators(1, 2), 16)
    assert torch.equal(orders.sort(1).values, torch.arange(16).expand(2, -1))
    assert not torch.equal(orders[0], orders[1])
    assert torch.equal(reveal_orders(image_generators(2, 1), 16), orders[1:])


def test_seeds_wrap_around_and_are_checked() -> None:
    wrapped = ImageNoise(image_generators(2**64 - 1, 2))((2, 3))
    assert torch.equal(wrapped[1:], ImageNoise(image_generators(0, 1))((1, 3)))
    for seed in (-1, 2**64, True, 1.0):
        with pytest.raises(ValueError, match="seed"):
            check_seed(seed)  # type: ignore[arg-type]


def test_draws_that_do_not_split_are_named() -> None:
    with pytest.raises(ValueError, match="3 images"):
        ImageNoise(image_generators(0, 3))((4, 2))
