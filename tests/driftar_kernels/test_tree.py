"""Draft trees: structure, walk and verification, with a Python walk as the oracle."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from driftar_kernels import DraftTree, TreeVerdict, verify_tree, walk_tree
from tests.helpers import oracle
from tests.helpers.inputs import LAYOUTS, PARENTS, in_layout, normal, parent_lists, random_parents
from tests.helpers.tolerance import assert_bitwise


def check_verdict(verdict: TreeVerdict, parents: list[list[int]], accept: list[list[bool]]) -> None:
    """Every field against the Python walk."""
    assert all(t.dtype == torch.int64 for t in verdict)
    levels = verdict.path.shape[1]
    for b, flags in enumerate(accept):
        path = oracle.walk(parents[min(b, len(parents) - 1)], flags)
        assert int(verdict.length[b]) == len(path)
        assert verdict.path[b].tolist() == path + [-1] * (levels - len(path))
        assert int(verdict.node[b]) == (path[-1] if path else -1)


# -- DraftTree ----------------------------------------------------------------


@given(parents=parent_lists())
def test_structure(parents: list[int]) -> None:
    paths = oracle.ancestor_lists(parents)
    for source in (parents, torch.tensor(parents), torch.tensor(parents, dtype=torch.int32)):
        tree = DraftTree(source)
        assert tree.num_nodes == len(parents)
        assert tree.parents.tolist() == [parents]
        assert tree.depth.tolist() == [[len(path) - 1 for path in paths]]
        expected = [[node in path for node in range(len(parents))] for path in paths]
        assert tree.ancestors.dtype == torch.bool
        assert tree.ancestors.tolist() == [expected]


def test_structure_of_a_batch() -> None:
    tree = DraftTree([[-1, 0, 1], [-1, -1, 0]])
    assert tree.parents.shape == tree.depth.shape == (2, 3)
    assert tree.depth.tolist() == [[0, 1, 2], [0, 0, 1]]
    assert tree.ancestors.shape == (2, 3, 3)
    assert tree.ancestors[1, 2].tolist() == [True, False, True]


@pytest.mark.parametrize("nodes", [256, 1000])
def test_deep_chains_and_wide_trees(backend: str, nodes: int) -> None:
    chain, star = DraftTree(list(range(-1, nodes - 1))), DraftTree([-1] * nodes)
    assert chain.depth[0, -1] == nodes - 1 and int(star.depth.max()) == 0
    accept = torch.ones(1, nodes, dtype=torch.bool)
    verdict = walk_tree(chain, accept)
    assert int(verdict.length) == nodes and verdict.path[0].tolist() == list(range(nodes))
    accept[0, 100] = False
    assert int(walk_tree(chain, accept).node) == 99
    assert int(walk_tree(star, accept).node) == 0


def test_the_tree_keeps_its_own_parents(backend: str) -> None:
    """Writing to the tensor afterwards must not turn a validated tree into a cyclic one."""
    parents = torch.tensor(PARENTS)
    tree = DraftTree(parents)
    parents[0] = 6
    verdict = walk_tree(tree, torch.ones(1, 7, dtype=torch.bool))
    assert verdict.path.tolist() == [[0, 1, 3, 6]]


@pytest.mark.parametrize(
    "parents",
    [[0], [-1, 1], [-1, 2, 1], [-2], [-1, 0, 5], [-1, 0, -7], [[-1, 0], [-1, 1]], [1, 0]],
    ids=["own", "own_later", "cycle", "below", "beyond", "far_below", "second_of_batch", "forward"],
)
def test_bad_parents(parents: Any) -> None:
    with pytest.raises(ValueError, match="parents"):
        DraftTree(parents)
    with pytest.raises(ValueError, match="parents"):
        DraftTree(torch.tensor(parents))


def test_bad_parents_name_the_node() -> None:
    with pytest.raises(ValueError, match=r"(?=.*5)(?=.*node 2)"):
        DraftTree([-1, 0, 5])


@pytest.mark.parametrize(
    ("parents", "error"),
    [
        (torch.tensor([-1.0, 0.0]), TypeError),
        (torch.tensor([True, False]), TypeError),
        (torch.tensor(-1), ValueError),
        (torch.full((1, 1, 2), -1), ValueError),
        ("chain", TypeError),
        (None, TypeError),
        ([[-1], [-1, 0]], (TypeError, ValueError)),
        ([-1.0, 0.5], TypeError),
    ],
)
def test_parents_of_the_wrong_type_or_rank(parents: Any, error: Any) -> None:
    with pytest.raises(error, match="parents"):
        DraftTree(parents)


# -- walk_tree ----------------------------------------------------------------


@given(data=st.data(), parents=parent_lists())
def test_walk(backend: str, data: st.DataObject, parents: list[int]) -> None:
    rows = st.lists(st.booleans(), min_size=len(parents), max_size=len(parents))
    accept = data.draw(st.lists(rows, min_size=1, max_size=4))
    verdict = walk_tree(DraftTree(parents), torch.tensor(accept))
    assert verdict.path.shape == (len(accept), max(map(len, oracle.ancestor_lists(parents))))
    check_verdict(verdict, [parents], accept)


@pytest.mark.parametrize("seed", range(5))
def test_walk_of_different_trees(backend: str, seed: int) -> None:
    parents = random_parents(256, batch=6, seed=seed, depth=40)
    accept = torch.rand(6, 256) < 0.9
    check_verdict(walk_tree(DraftTree(parents), accept), parents.tolist(), accept.tolist())


def test_ties_take_the_lowest_index(backend: str) -> None:
    accept = torch.tensor([[True] * 7, [True, False, True, True, True, True, True], [False] * 7])
    verdict = walk_tree(DraftTree(PARENTS), accept)
    assert verdict.node.tolist() == [6, 2, -1]
    assert verdict.path.tolist() == [[0, 1, 3, 6], [0, 2, -1, -1], [-1, -1, -1, -1]]
    assert verdict.length.tolist() == [4, 2, 0]


def test_strided_accept(backend: str) -> None:
    accept = torch.rand(7, 3) < 0.8
    check_verdict(walk_tree(DraftTree(PARENTS), accept.t()), [PARENTS], accept.t().tolist())
    wide = accept[:, 0].expand(3, 7)
    check_verdict(walk_tree(DraftTree(PARENTS), wide), [PARENTS], wide.tolist())


def test_empty_walks(backend: str) -> None:
    verdict = walk_tree(DraftTree(PARENTS), torch.ones(0, 7, dtype=torch.bool))
    assert verdict.length.shape == verdict.node.shape == (0,) and verdict.path.shape[0] == 0
    tree = DraftTree(torch.empty(0, dtype=torch.int64))
    assert tree.num_nodes == 0 and tree.depth.shape == (1, 0) and tree.ancestors.shape == (1, 0, 0)
    verdict = walk_tree(tree, torch.ones(2, 0, dtype=torch.bool))
    assert verdict.length.tolist() == [0, 0] and verdict.node.tolist() == [-1, -1]
    assert verdict.path.shape == (2, 0)


@pytest.mark.parametrize(
    ("accept", "error"),
    [
        (torch.ones(2, 7), TypeError),
        (torch.ones(2, 7, dtype=torch.int64), TypeError),
        ([[True] * 7], TypeError),
        (torch.ones(7, dtype=torch.bool), ValueError),
        (torch.ones(2, 6, dtype=torch.bool), ValueError),
        (torch.ones(2, 7, 1, dtype=torch.bool), ValueError),
        (torch.ones(2, 7, dtype=torch.bool, device="meta"), ValueError),
    ],
)
def test_bad_accept(backend: str, accept: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="accept"):
        walk_tree(DraftTree(PARENTS), accept)


def test_walk_refuses_other_trees(backend: str) -> None:
    with pytest.raises(TypeError, match="tree"):
        walk_tree(torch.tensor(PARENTS), torch.ones(1, 7, dtype=torch.bool))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="tree"):
        walk_tree(DraftTree([PARENTS] * 3), torch.ones(2, 7, dtype=torch.bool))


# -- verify_tree --------------------------------------------------------------


@pytest.mark.parametrize("dim", [1, 16, 1000])
@pytest.mark.parametrize("seed", range(3))
def test_verify(backend: str, dtype: torch.dtype, dim: int, seed: int) -> None:
    """Distances clear of the tolerance; each node agrees or not by a coin."""
    parents = random_parents(40, batch=3, seed=seed, depth=8)
    target = normal(3, 40, dim, seed=seed, dtype=dtype)
    agree = torch.rand(3, 40) < 0.85
    step = torch.where(agree, 0.5, 2.0) / math.sqrt(dim)
    draft = (target.double() + step[..., None]).to(dtype)
    measured = (draft.double() - target.double()).norm(dim=-1) <= 1.0
    verdict = verify_tree(DraftTree(parents), draft, target, tolerance=1.0)
    check_verdict(verdict, parents.tolist(), measured.tolist())


def test_the_tolerance_itself_agrees(backend: str) -> None:
    draft = torch.tensor([[[3.0, 4.0], [3.0, 4.0]]])
    tree = DraftTree([-1, 0])
    assert int(verify_tree(tree, draft, torch.zeros(1, 2, 2), tolerance=5.0).length) == 2
    below = math.nextafter(5.0, 0) - 1e-6
    assert int(verify_tree(tree, draft, torch.zeros(1, 2, 2), tolerance=below).length) == 0
    assert int(verify_tree(tree, draft, draft.clone(), tolerance=0.0).length) == 2


@pytest.mark.parametrize("where", ["draft", "target"])
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_non_finite_nodes_fail_closed(backend: str, where: str, poison: float) -> None:
    """The node and its descendants alone are rejected, however large the tolerance."""
    target = normal(2, 7, 5, seed=1)
    draft = target.clone()
    (draft if where == "draft" else target)[0, 1, 4] = poison
    verdict = verify_tree(DraftTree(PARENTS), draft, target, tolerance=1e30)
    assert verdict.node.tolist() == [2, 6]


def test_the_same_infinity_on_both_sides_is_rejected(backend: str) -> None:
    both = torch.full((1, 1, 3), math.inf)
    assert int(verify_tree(DraftTree([-1]), both, both.clone(), tolerance=1.0).length) == 0


def test_verify_layouts_and_inputs(backend: str) -> None:
    target = normal(2, 7, 6, seed=1)
    draft = target + normal(2, 7, 6, seed=2) * 0.3
    tree = DraftTree(PARENTS)
    plain = verify_tree(tree, draft, target, tolerance=0.8)
    copies = draft.clone(), target.clone()
    for how in LAYOUTS:
        other = verify_tree(tree, in_layout(draft, how), in_layout(target, how), tolerance=0.8)
        assert_bitwise(plain, other)
    assert torch.equal(draft, copies[0]) and torch.equal(target, copies[1])
    empty = verify_tree(tree, draft[:0], target[:0], tolerance=0.8)
    assert empty.length.shape == (0,)
    wide = verify_tree(tree, draft[..., :0], target[..., :0], tolerance=0.0)
    assert wide.length.tolist() == [4, 4]


@pytest.mark.parametrize(
    ("change", "error", "argument"),
    [
        ({"draft": torch.randn(2, 6, 3)}, ValueError, "draft"),
        ({"draft": torch.randn(7, 3)}, ValueError, "draft"),
        ({"target": torch.randn(2, 7, 4)}, ValueError, "target"),
        ({"target": torch.randn(1, 7, 3)}, ValueError, "target"),
        ({"target": torch.randn(2, 7, 3).double()}, TypeError, "target"),
        ({"draft": torch.ones(2, 7, 3, dtype=torch.int64)}, TypeError, "draft"),
        ({"target": torch.empty(2, 7, 3, device="meta")}, ValueError, "target"),
        ({"tolerance": -0.1}, ValueError, "tolerance"),
        ({"tolerance": math.nan}, ValueError, "tolerance"),
        ({"tolerance": "1"}, TypeError, "tolerance"),
        ({"tree": [-1] * 7}, TypeError, "tree"),
        ({"tree": DraftTree([PARENTS] * 3)}, ValueError, "tree"),
    ],
)
def test_verify_bad_input(
    backend: str, change: dict[str, Any], error: type[Exception], argument: str
) -> None:
    arguments: dict[str, Any] = {
        "tree": DraftTree(PARENTS),
        "draft": torch.randn(2, 7, 3),
        "target": torch.randn(2, 7, 3),
        "tolerance": 1.0,
    }
    with pytest.raises(error, match=argument):
        verify_tree(**{**arguments, **change})
