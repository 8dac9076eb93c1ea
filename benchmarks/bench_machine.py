"""What depends on the process rather than the arithmetic: call overhead, memory, threads, other
users of the cores.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

import driftar_kernels as dk
from tests.helpers.inputs import normal

from . import bench_attention, bench_drift, bench_prior, bench_tree, cases, checks, memory
from .cases import OURS, Case
from .conftest import Keep
from .timing import Call, Contest, RunContest

BUILDERS = {
    "attention forward": bench_attention.forward,
    "attention forward and backward": bench_attention.forward_backward,
    "drift_loss": bench_drift.contest,
}


def smallest_calls() -> dict[str, Call]:
    """One call of every operator on next to nothing, without gradients."""
    query = torch.randn(1, 1, 1, 8)
    point, entropy = torch.randn(1, 1, 8), torch.rand(1)
    tree, accept = dk.DraftTree([-1]), torch.ones(1, 1, dtype=torch.bool)
    chain = bench_tree.chain_inputs(1, 1, 8)
    verdict = dk.walk_tree(tree, accept)
    cache, prefix = torch.randn(1, 1, 2, 8), torch.zeros(1, dtype=torch.int64)
    return {
        "attention": lambda: dk.attention(query, query, query),
        "drift_loss": lambda: dk.drift_loss(point, point),
        "walk_tree": lambda: dk.walk_tree(tree, accept),
        "verify_tree": lambda: dk.verify_tree(tree, point, point, tolerance=1.0),
        "verify_chain": lambda: dk.verify_chain(*chain),
        "commit_path": lambda: dk.commit_path(cache, cache, prefix, verdict),
        "entropy_to_sigma": lambda: dk.entropy_to_sigma(entropy),
        "entropy_prior": lambda: dk.entropy_prior(point[0], entropy, point[0]),
    }


@pytest.mark.parametrize("case", cases.of("overhead"), ids=str)
def bench_overhead(case: Case, race: RunContest) -> None:
    query = torch.randn(1, 1, 1, 8)
    call = smallest_calls()[case.name]
    race(
        case,
        Contest(
            check=lambda: _check_small(case.name),
            ours=call,
            peers={
                cases.SMALLEST_SDPA: lambda: F.scaled_dot_product_attention(query, query, query)
            },
        ),
    )


@pytest.mark.slow
@pytest.mark.parametrize("case", cases.of("memory"), ids=str)
def bench_memory(case: Case, benchmark: Any, keep: Keep) -> None:
    _check_small(case.name)
    _measure(case, benchmark, keep, case.name, (OURS,))


@pytest.mark.parametrize("case", cases.of("memory-length"), ids=str)
def bench_memory_by_length(case: Case, benchmark: Any, keep: Keep) -> None:
    _check_small("attention")
    _measure(case, benchmark, keep, "attention", (OURS, cases.SDPA, cases.MATERIALISED))


@pytest.mark.parametrize("case", cases.of("threads"), ids=str)
def bench_threads(case: Case, race: RunContest) -> None:
    if torch.get_num_threads() < 2:
        pytest.skip("needs two threads")
    contest = BUILDERS[case.name](case)
    race(
        case,
        Contest(
            check=contest.check,
            ours=_on_threads(2, contest.ours),
            peers={cases.ONE_THREAD: _on_threads(1, contest.ours)},
        ),
    )


@pytest.mark.parametrize("case", cases.of("openmp"), ids=str)
def bench_openmp(case: Case, race: RunContest) -> None:
    """Another user of PyTorch's OpenMP threads runs before and after every timed call."""
    contest = BUILDERS[case.name](case)
    a = torch.randn(512, 512)
    race(
        case,
        Contest(
            check=contest.check,
            ours=contest.ours,
            peers={cases.ALONE: contest.ours},
            before=lambda: torch.mm(a, a),
        ),
    )


def _on_threads(count: int, call: Call) -> Call:
    def run() -> None:
        torch.set_num_threads(count)
        call()

    return run


def _measure(
    case: Case, benchmark: Any, keep: Keep, workload: str, competitors: tuple[str, ...]
) -> None:
    if benchmark.disabled:
        return
    figures = benchmark.pedantic(
        lambda: {
            name: memory.in_fresh_process(workload, case.sizes, case.dtype, name)
            for name in competitors
        }
    )
    keep(case, figures)


def _check_small(name: str) -> None:
    """The operator's check at sizes that take no time."""
    if name == "attention":
        checks.attention_ragged({"is_causal": True}, torch.float32, gradient=True)
    elif name == "drift_loss":
        checks.drift(normal(2, 9, 16, seed=0), normal(2, 7, 16, seed=1), None)
    elif name in ("verify_tree", "walk_tree"):
        bench_tree.verify_tree(Case("verify-tree", {"B": 2, "N": 9, "D": 7})).check()
    elif name == "verify_chain":
        bench_tree.verify_chain(Case("verify-chain", {"B": 2, "K": 3, "D": 7})).check()
    elif name == "commit_path":
        bench_tree.commit_path(
            Case("commit-path", {"B": 2, "H": 2, "L": 32, "N": 8, "D": 5})
        ).check()
    else:
        bench_prior.contest(Case("entropy-prior", {"L": 65, "C": 7}, name="forward")).check()
