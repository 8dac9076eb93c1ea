"""Randomness per image: an image depends on its own seed, not on the batch it is made in."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

__all__ = [
    "ImageNoise",
    "Source",
    "check_seed",
    "image_generators",
    "image_sources",
    "reveal_orders",
]

Source = torch.Generator | Sequence[torch.Generator]

_SEEDS = 2**64


def check_seed(seed: int) -> int:
    """The seed; ValueError unless it is an integer in [0, 2^64)."""
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < _SEEDS:
        raise ValueError(f"seed must be an integer in [0, 2^64), got {seed!r}")
    return seed


def image_generators(seed: int, count: int) -> list[torch.Generator]:
    """CPU generators seeded ``seed, seed + 1, ...`` (modulo 2^64), one for each image."""
    return [torch.Generator().manual_seed((seed + index) % _SEEDS) for index in range(count)]


def image_sources(
    seed: int | None, generator: Source | None, count: int
) -> tuple[int | None, Source]:
    """What `count` images are drawn from: one generator, or one for each, and the seed behind them.

    Without seed and generator a seed is drawn from PyTorch's global generator. Raises ValueError
    for both at once, a seed out of range or another number of generators, TypeError for something
    else than generators.
    """
    if generator is None:
        seed = int(torch.randint(2**63 - 1, ())) if seed is None else check_seed(seed)
        return seed, image_generators(seed, count)
    if seed is not None:
        raise ValueError("seed and generator must not both be given")
    if isinstance(generator, torch.Generator):
        return None, generator
    generators = list(generator)
    if not all(isinstance(entry, torch.Generator) for entry in generators):
        raise TypeError("generator must be a torch.Generator or a list of them")
    if len(generators) != count:
        raise ValueError(
            f"generator must hold one for each of the {count} images, got {len(generators)}"
        )
    return None, generators


class ImageNoise:
    """A ``noise(shape)`` whose rows come in equal parts, image by image, from their generators.

    Args:
        generators: one for each image of the batch.
        doubled: whether the draw of an index (counted from 0) is for two guidance branches, one
            after the other; both then get the same noise.
    """

    def __init__(
        self,
        generators: Sequence[torch.Generator],
        doubled: Callable[[int], bool] = lambda index: False,
    ) -> None:
        self._generators = generators
        self._doubled = doubled
        self._draws = 0

    def __call__(self, shape: tuple[int, ...]) -> Tensor:
        branches = 2 if self._doubled(self._draws) else 1
        self._draws += 1
        rows, rest = divmod(shape[0], branches * len(self._generators))
        if rest:
            raise ValueError(
                f"noise{shape} cannot be split over {len(self._generators)} images of "
                f"{branches} branches"
            )
        parts = [
            torch.randn((rows, *shape[1:]), generator=generator, device=generator.device).cpu()
            for generator in self._generators
        ]
        return torch.cat(parts).repeat(branches, *(1,) * (len(shape) - 1))


def reveal_orders(generators: Sequence[torch.Generator], length: int) -> Tensor:
    """A random permutation of ``length`` positions for each image, int64 ``[B, length]``."""
    draws = [
        torch.rand(length, generator=generator, device=generator.device).cpu()
        for generator in generators
    ]
    return torch.stack(draws).argsort(1)
