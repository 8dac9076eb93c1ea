"""How kernels are launched: so that ``torch.compile`` records the launch instead of calling it.

A recorded launch takes tensors, numbers and text. Named tuples are therefore passed field by field,
and a kernel bundles them again in its first lines.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.library import wrap_triton


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **settings: Any) -> None:
    """Run ``kernel`` on the device of its tensors, or record that it is to run."""
    flat = list(flattened(arguments))
    if recording(kernel):
        wrap_triton(kernel)[grid](*flat, **settings)
        return
    device = next(x.device for x in (*flat, *settings.values()) if isinstance(x, Tensor))
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[grid](*flat, **settings)


def recording(kernel: Callable[..., Any]) -> bool:
    """Whether launches are recorded: never those of interpreted kernels."""
    return wrap_triton(kernel) is not kernel


def flattened(arguments: Iterable[Any]) -> Iterator[Any]:
    """The arguments, named tuples replaced by their fields."""
    for argument in arguments:
        if isinstance(argument, tuple):
            yield from flattened(argument)
        else:
            yield argument


def power_of_two(count: int, at_least: int = 1) -> int:
    """The least power of two that is no smaller than either.

    Found by comparisons, so that compilers do not take a symbolic ``count`` for a constant.
    """
    power = at_least
    while power < count:
        power *= 2
    return power
