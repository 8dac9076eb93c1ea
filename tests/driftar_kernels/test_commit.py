"""Moving accepted nodes in a cache, against a copy made in Python."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from driftar_kernels import DraftTree, TreeVerdict, commit_path, walk_tree
from tests.helpers.inputs import PARENTS, far_rows, normal, parent_lists, random_parents


def committed(cache: Tensor, lengths: list[int], paths: list[list[int]]) -> Tensor:
    result = cache.clone()
    for b, path in enumerate(paths):
        for step, node in enumerate(path):
            result[b, :, lengths[b] + step] = cache[b, :, lengths[b] + node]
    return result


def check_commit(key: Tensor, value: Tensor, lengths: Tensor, verdict: TreeVerdict) -> None:
    paths = [row[: int(n)].tolist() for row, n in zip(verdict.path, verdict.length, strict=True)]
    wanted = [committed(cache, lengths.tolist(), paths) for cache in (key, value)]
    before = lengths.clone()
    new = commit_path(key, value, lengths, verdict)
    assert new.dtype == torch.int64
    assert new.tolist() == [n + len(p) for n, p in zip(lengths.tolist(), paths, strict=True)]
    assert torch.equal(lengths, before)
    for cache, expected in zip((key, value), wanted, strict=True):
        for b, end in enumerate(new.tolist()):  # rows behind the new length are unspecified
            assert torch.equal(cache[b, :, :end], expected[b, :, :end])


@pytest.mark.parametrize("lengths_dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("seed", range(4))
def test_commit(backend: str, dtype: torch.dtype, seed: int, lengths_dtype: torch.dtype) -> None:
    parents = random_parents(30, batch=4, seed=seed, depth=3)
    verdict = walk_tree(DraftTree(parents), torch.rand(4, 30) < 0.9)
    key = normal(4, 3, 50, 8, seed=seed, dtype=dtype)
    value = normal(4, 3, 50, 5, seed=seed + 1, dtype=dtype)
    check_commit(key, value, torch.tensor([0, 7, 20, 13], dtype=lengths_dtype), verdict)


@given(data=st.data(), parents=parent_lists(12))
def test_commit_any_path(backend: str, data: st.DataObject, parents: list[int]) -> None:
    accept = data.draw(st.lists(st.booleans(), min_size=len(parents), max_size=len(parents)))
    verdict = walk_tree(DraftTree(parents), torch.tensor([accept]))
    cache = torch.arange(20.0).reshape(1, 1, 20, 1)
    check_commit(cache, cache.clone(), torch.tensor([data.draw(st.integers(0, 8))]), verdict)


def test_commit_of_a_long_path_moves_rows_in_order(backend: str) -> None:
    """Sources and destinations overlap: a source must be read before it is overwritten."""
    parents = [-1, -1, *range(1, 62)]  # path 1, 2, 3, ...: each row moves up by one
    verdict = walk_tree(DraftTree(parents), torch.ones(2, 63, dtype=torch.bool))
    check_commit(
        normal(2, 2, 100, 16, seed=1),
        normal(2, 2, 100, 16, seed=2),
        torch.tensor([30, 37]),
        verdict,
    )


def test_commit_in_strided_caches(backend: str) -> None:
    """Caches laid out [B, L, H, D], and a slice of a larger one, which stays as it was."""
    verdict = walk_tree(DraftTree([-1, -1, 1]), torch.tensor([[False, True, True]] * 2))
    lengths = torch.tensor([2, 5])
    whole = normal(2, 20, 3, 8, seed=1)
    check_commit(
        whole.transpose(1, 2), normal(2, 20, 3, 8, seed=2).transpose(1, 2), lengths, verdict
    )
    big = normal(2, 3, 40, 8, seed=3)
    before = big.clone()
    check_commit(big[:, :, 10:30], normal(2, 3, 20, 8, seed=4), lengths, verdict)
    assert torch.equal(big[:, :, :10], before[:, :, :10])
    assert torch.equal(big[:, :, 30:], before[:, :, 30:])


def test_commit_marks_the_caches_as_changed(backend: str) -> None:
    """In-place work bumps the version counter, so that autograd notices."""
    verdict = walk_tree(DraftTree([-1, -1]), torch.tensor([[False, True]]))
    key, value = torch.randn(1, 1, 4, 2), torch.randn(1, 1, 4, 2)
    versions = key._version, value._version
    commit_path(key, value, torch.tensor([1]), verdict)
    assert key._version > versions[0] and value._version > versions[1]


def test_commit_beyond_32_bits(backend: str) -> None:
    verdict = walk_tree(DraftTree([-1, -1]), torch.tensor([[False, True]]))
    key, value = normal(1, 1, 3, 8, seed=1), normal(1, 1, 3, 8, seed=2)
    far = far_rows(key, 2**30 + 64), far_rows(value, 2**30 + 64)
    for caches in ((key, value), far):
        commit_path(*caches, torch.tensor([1]), verdict)
    assert torch.equal(far[0][:, :, :2], key[:, :, :2])
    assert torch.equal(far[1][:, :, :2], value[:, :, :2])


def test_commit_of_nothing(backend: str) -> None:
    verdict = walk_tree(DraftTree(PARENTS), torch.zeros(2, 7, dtype=torch.bool))
    check_commit(
        normal(2, 2, 9, 4, seed=1), normal(2, 2, 9, 4, seed=2), torch.tensor([2, 0]), verdict
    )
    none = walk_tree(DraftTree(PARENTS), torch.zeros(0, 7, dtype=torch.bool))
    new = commit_path(
        torch.randn(0, 2, 9, 4), torch.randn(0, 2, 9, 4), torch.empty(0, dtype=torch.int64), none
    )
    assert new.shape == (0,)


def verdict_of(length: list[int], path: list[list[int]]) -> TreeVerdict:
    node = [p[-1] for p in path]
    return TreeVerdict(torch.tensor(length), torch.tensor(path), torch.tensor(node))


@pytest.mark.parametrize(
    ("change", "error", "argument"),
    [
        ({"key_cache": torch.randn(2, 9, 4)}, ValueError, "key_cache"),
        ({"value_cache": torch.randn(2, 2, 8, 4)}, ValueError, "value_cache"),
        ({"value_cache": torch.randn(2, 3, 9, 4)}, ValueError, "value_cache"),
        ({"value_cache": torch.empty(2, 2, 9, 4, device="meta")}, ValueError, "value_cache"),
        ({"key_cache": [0.0]}, TypeError, "key_cache"),
        ({"key_lengths": torch.tensor([1.0, 2.0])}, TypeError, "key_lengths"),
        ({"key_lengths": [1, 2]}, TypeError, "key_lengths"),
        ({"key_lengths": torch.tensor([1, 2, 3])}, ValueError, "key_lengths"),
        ({"key_lengths": torch.tensor([-1, 2])}, ValueError, "key_lengths"),
        ({"key_lengths": torch.tensor([8, 2])}, ValueError, "key_lengths|path|verdict"),
        ({"verdict": verdict_of([1, 1], [[9], [0]])}, ValueError, "path|verdict"),
        ({"verdict": verdict_of([1, 1], [[-1], [0]])}, ValueError, "path|verdict"),
        ({"verdict": verdict_of([1, 2], [[0], [0]])}, ValueError, "length|verdict"),
        ({"verdict": verdict_of([1, -1], [[0], [0]])}, ValueError, "length|verdict"),
        ({"verdict": verdict_of([1], [[0]])}, ValueError, "path|length|verdict"),
    ],
)
def test_commit_bad_input(
    backend: str, change: dict[str, Any], error: type[Exception], argument: str
) -> None:
    arguments: dict[str, Any] = {
        "key_cache": torch.randn(2, 2, 9, 4),
        "value_cache": torch.randn(2, 2, 9, 4),
        "key_lengths": torch.tensor([1, 2]),
        "verdict": verdict_of([1, 1], [[1], [0]]),
    }
    key = arguments["key_cache"].clone()
    with pytest.raises(error, match=argument):
        commit_path(**{**arguments, **change})
    assert torch.equal(arguments["key_cache"], key)


def test_commit_of_many_heads_and_wide_rows(backend: str) -> None:
    """Enough bytes that the heads of one sample are moved by several threads."""
    parents = random_parents(64, batch=3, seed=1, depth=20)
    verdict = walk_tree(DraftTree(parents), torch.rand(3, 64) < 0.95)
    key, value = normal(3, 8, 130, 96, seed=1), normal(3, 8, 130, 64, seed=2)
    check_commit(key, value, torch.tensor([0, 66, 31]), verdict)
