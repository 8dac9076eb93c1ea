"""Tree and chain verification and cache commit against PyTorch and Python."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import driftar_kernels as dk
from tests.helpers.inputs import random_parents
from tests.helpers.tolerance import assert_bitwise

from . import cases, floors
from .cases import Case
from .peers import tree as peers
from .timing import Contest, RunContest


def verify_tree(case: Case) -> Contest:
    """Draft and target that agree on about 84 % of the nodes."""
    batch, nodes, width = case["B"], case["N"], case["D"]
    parents = random_parents(nodes, seed=0, depth=nodes // 8)
    tree = dk.DraftTree(parents)
    draft = torch.randn(batch, nodes, width)
    target = draft + torch.randn(batch, nodes, width)
    tolerance = _clear_tolerance((draft.double() - target.double()).norm(dim=-1))
    levels, listed = tree.max_depth, parents.tolist()

    def check() -> None:
        for size in (nodes, 1, min(nodes, 7)):
            part = draft[:, :size], target[:, :size]
            found = dk.verify_tree(dk.DraftTree(parents[:size]), *part, tolerance=tolerance)
            wanted = peers.walk_lists(
                listed[:size], part[0].double(), part[1].double(), tolerance, found.path.shape[1]
            )
            assert_bitwise(found, wanted)

    return Contest(
        check=check,
        ours=lambda: dk.verify_tree(tree, draft, target, tolerance=tolerance),
        peers={
            cases.TENSOR_WALK: lambda: peers.walk_tensors(
                parents, draft, target, tolerance, levels
            ),
            cases.LIST_WALK: lambda: peers.walk_lists(listed, draft, target, tolerance, levels),
        },
        floor=floors.read_seconds(2 * draft.numel() * draft.element_size()),
    )


def _clear_tolerance(distances: Tensor, share: float = 0.84) -> float:
    """Middle of a wide gap near the given quantile, so that no verdict depends on rounding."""
    ordered = distances.flatten().sort().values
    first = int(share * len(ordered))
    window = ordered[first : first + max(2, len(ordered) // 20)]
    gap = int(window.diff().argmax())
    return float(window[gap : gap + 2].mean())


def chain_inputs(batch: int, count: int, width: int) -> tuple[Tensor, ...]:
    """A draft that deviates from the target a little, so that both verdicts occur."""
    target_mean = torch.randn(batch, count + 1, width)
    target_std = torch.rand(batch, count + 1) + 0.5
    draft_mean = target_mean[:, :count] + 0.5 * torch.randn(batch, count, width) / width**0.5
    draft_std = target_std[:, :count] * (1 + 0.2 / width**0.5)
    draft = draft_mean + draft_std[..., None] * torch.randn(batch, count, width)
    return draft, draft_mean, draft_std, target_mean, target_std


def verify_chain(case: Case) -> Contest:
    """The lossless chain."""
    inputs = chain_inputs(case["B"], case["K"], case["D"])

    def check() -> None:
        for width in (case["D"], 7):
            _check_acceptance(width)

    return Contest(
        check=check,
        ours=lambda: dk.verify_chain(*inputs),
        peers={cases.EAGER: lambda: peers.chain(*inputs)},
        floor=floors.read_seconds(4 * 3 * inputs[0].numel()),
    )


def _check_acceptance(width: int) -> None:
    """The share of accepted first positions is the mean of min(1, p / q), within 5 sigma."""
    draws = 4000
    draft, draft_mean, draft_std, target_mean, target_std = chain_inputs(draws, 1, width)
    wide = [x.double()[:, 0] for x in (draft, draft_mean, draft_std, target_mean, target_std)]
    x, q_mean, q_std, p_mean, p_std = wide
    log_ratio = (
        0.5
        * (((x - q_mean) / q_std[:, None]).square() - ((x - p_mean) / p_std[:, None]).square()).sum(
            -1
        )
        + width * (q_std / p_std).log()
    )
    chance = log_ratio.clamp(max=0).exp()
    verdict = dk.verify_chain(draft, draft_mean, draft_std, target_mean, target_std)
    deviation = float(verdict.length.double().sum() - chance.sum())
    spread = float((chance * (1 - chance)).sum().sqrt())
    assert abs(deviation) <= 5 * spread + 1e-6, f"acceptance off by {deviation / draws:.3%}"
    assert bool(verdict.next_sample.isfinite().all())


def commit_path(case: Case) -> Contest:
    """Half of the levels of a tree are accepted; every other node of it."""
    batch, heads, capacity, nodes = case["B"], case["H"], case["L"], case["N"]
    caches = [torch.randn(batch, heads, capacity, case["D"]) for _ in range(2)]
    steps = nodes // 4
    path = torch.full((batch, nodes // 2), -1, dtype=torch.int64)
    path[:, :steps] = 1 + 2 * torch.arange(steps)
    length = torch.full((batch,), steps)
    verdict = dk.TreeVerdict(length, path, path[:, steps - 1])
    prefix = torch.full((batch,), capacity - nodes)

    def check() -> None:
        copies = [[x.clone() for x in caches] for _ in range(3)]
        new_lengths = [
            dk.commit_path(copies[0][0], copies[0][1], prefix, verdict),
            peers.commit_gathering(copies[1], prefix, path, length),
            peers.commit_per_sample(copies[2], prefix, path, length),
        ]
        end = capacity - nodes + steps
        for other, lengths in zip(copies[1:], new_lengths[1:], strict=True):
            assert_bitwise([x[:, :, :end] for x in copies[0]], [x[:, :, :end] for x in other])
            assert torch.equal(new_lengths[0], lengths)

    return Contest(
        check=check,
        ours=lambda: dk.commit_path(caches[0], caches[1], prefix, verdict),
        peers={
            cases.EAGER: lambda: peers.commit_gathering(caches, prefix, path, length),
            cases.PER_SAMPLE: lambda: peers.commit_per_sample(caches, prefix, path, length),
        },
        floor=floors.read_seconds(2 * 2 * 4 * batch * heads * steps * case["D"]),
    )


@pytest.mark.parametrize("case", cases.of("verify-tree"), ids=str)
def bench_verify_tree(case: Case, race: RunContest) -> None:
    race(case, verify_tree(case))


@pytest.mark.parametrize("case", cases.of("verify-chain"), ids=str)
def bench_verify_chain(case: Case, race: RunContest) -> None:
    race(case, verify_chain(case))


@pytest.mark.parametrize("case", cases.of("commit-path"), ids=str)
def bench_commit_path(case: Case, race: RunContest) -> None:
    race(case, commit_path(case))
