"""Tree verification against the same walk in Python."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import driftar_kernels as dk

from . import floors, peers


@pytest.mark.parametrize("nodes", [16, 64, 256])
@pytest.mark.parametrize("width", [16, 1024])
def bench_verify_tree(nodes: int, width: int, race: Callable[..., None]) -> None:
    parents = [-1] + [int(torch.randint(-1, node, ())) for node in range(1, nodes)]
    tree = dk.DraftTree(parents)
    draft = torch.randn(1, nodes, width)
    target = draft + 0.1 * torch.randn(1, nodes, width)
    tolerance = 0.1 * width**0.5 * 1.05

    verdict = dk.verify_tree(tree, draft, target, tolerance=tolerance)
    assert int(verdict.node) == peers.python_walk(parents, draft[0], target[0], tolerance)

    race(
        lambda: dk.verify_tree(tree, draft, target, tolerance=tolerance),
        {"Python walk": lambda: peers.python_walk(parents, draft[0], target[0], tolerance)},
        2 * draft.numel() * 4 / floors.copy_rate(),
    )
