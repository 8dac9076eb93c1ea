"""Calls that stay in C++ give what PyTorch's own way gives, and leave to it what they must."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from driftar_kernels import (
    AttentionOutput,
    DraftTree,
    _library,
    attention,
    entropy_prior,
    use_backend,
    verify_tree,
)
from tests.helpers.targets import require_backend

PARENTS = DraftTree([-1, 0, 0]).parents
# Positional arguments of operators, with every type of argument that there is among them.
CALLS: dict[str, Callable[[], tuple[Any, ...]]] = {
    "attention_forward": lambda: (
        *torch.randn(3, 1, 2, 3, 8).unbind(),
        torch.rand(3, 3) < 0.8,
        None,
        torch.tensor([0]),
        PARENTS,
        0,
        0.5,
        False,
        "head",
        True,
        0,
    ),
    "verify_tree": lambda: (PARENTS, *torch.randn(2, 1, 3, 4).unbind(), 1, 2),
    "walk_tree": lambda: (PARENTS, torch.tensor([[True, False, True]]), 2),
    "verify_chain": lambda: (
        *torch.randn(2, 1, 2, 4).unbind(),
        torch.rand(1, 2),
        torch.randn(1, 3, 4),
        torch.rand(1, 3),
        torch.tensor([7]),
    ),
    "drift_field": lambda: (*torch.randn(2, 1, 5, 4).unbind(), None, None, True, (0.1, 1)),
    "entropy_prior": lambda: (torch.randn(2, 3), torch.rand(2), torch.randn(2, 3), 0.5, 2.0, 1.0),
    "entropy_to_sigma": lambda: (torch.rand(4), 0.5, 2.0, 1.0),
}


@pytest.fixture(autouse=True)
def cpu() -> None:
    require_backend("cpu")


class Subclass(Tensor):
    """A tensor that wants to see what is done with it."""


class FunctionMode(TorchFunctionMode):
    """Sees functions, and changes nothing."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class DispatchMode(TorchDispatchMode):
    """Sees operators, and changes nothing."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def sigma(entropy: Any, *settings: Any) -> Any:
    return _library.direct("entropy_to_sigma")(entropy, *(settings or (0.5, 2.0, 1.0)))


@pytest.mark.parametrize("op", list(CALLS))
def test_same_result(op: str) -> None:
    arguments = CALLS[op]()
    torch.testing.assert_close(
        _library.direct(op)(*arguments), _library.native(op)(*arguments), rtol=0, atol=0
    )


def test_named_result() -> None:
    """As many of the results as there are names."""
    arguments = CALLS["attention_forward"]()
    found = _library.direct("attention_forward", AttentionOutput)(*arguments)
    assert type(found) is AttentionOutput
    expected = _library.native("attention_forward")(*arguments)[:4]
    torch.testing.assert_close(tuple(found), expected, rtol=0, atol=0)


def test_a_result_without_enough_outputs_is_refused() -> None:
    class Eight(NamedTuple("Eight", [(f"x{i}", Tensor) for i in range(8)])):
        """More than any operator returns."""

    with pytest.raises(RuntimeError, match="8 results"):
        _library.direct("attention_forward", Eight)


@pytest.mark.parametrize(
    "argument",
    [
        None,
        1.0,
        [0.5],
        torch.rand(2).as_subclass(Subclass),
        torch.rand(2, device="meta"),
    ],
    ids=["None", "number", "list", "subclass", "meta"],
)
def test_other_tensors_are_left(argument: Any) -> None:
    assert sigma(torch.rand(2)) is not None
    assert sigma(argument) is None


@pytest.mark.parametrize(
    "number", [True, "0.5", None, float("nan"), float("inf"), 10**400, torch.tensor(0.5)]
)
def test_other_numbers_are_left(number: Any) -> None:
    assert sigma(torch.rand(2), 0.5, 2, 1) is not None
    assert sigma(torch.rand(2), number, 2.0, 1.0) is None


@pytest.mark.parametrize(
    "position, value",
    [(7, 0.0), (7, True), (7, 2**63), (8, "x"), (9, 1), (9, None), (10, b"head"), (10, "\ud800")],
)
def test_other_settings_are_left(position: int, value: Any) -> None:
    arguments = list(CALLS["attention_forward"]())
    arguments[position] = value
    assert _library.direct("attention_forward")(*arguments) is None


@pytest.mark.parametrize("temperatures", [0.1, (), (0.1, "1"), (0.0,), {0.1}, None])
def test_other_lists_are_left(temperatures: Any) -> None:
    arguments = (*CALLS["drift_field"]()[:-1], temperatures)
    assert _library.direct("drift_field")(*arguments) is None


def test_a_wrong_number_of_arguments_is_left() -> None:
    entropy = torch.rand(2)
    direct = _library.direct("entropy_to_sigma")
    assert direct() is None and direct(entropy) is None and direct(entropy, *[1.0] * 4) is None


def test_what_the_operator_refuses_is_left() -> None:
    direct = _library.direct("verify_tree")
    parents, draft, target, tolerance, depth = CALLS["verify_tree"]()
    assert direct(parents, draft, target[:, :2], tolerance, depth) is None  # a ValueError
    assert direct(parents, draft, target.double(), tolerance, depth) is None  # a TypeError
    assert direct(parents, draft, target, -1.0, depth) is None


@pytest.mark.parametrize(
    "mode",
    [FunctionMode, DispatchMode, lambda: torch.autocast("cpu")],
    ids=["functions", "operators", "autocast"],
)
def test_modes_see_the_call(mode: Callable[[], AbstractContextManager[object]]) -> None:
    with mode():
        assert sigma(torch.rand(2)) is None
    assert sigma(torch.rand(2)) is not None


def test_function_transforms_see_the_call() -> None:
    seen: list[Any] = []

    def look(entropy: Tensor) -> Tensor:
        seen.append(sigma(entropy))
        return entropy

    torch.func.vmap(look)(torch.rand(3))
    torch.func.grad(look)(torch.rand(()))
    assert seen == [None, None]


def test_forward_derivatives_are_left() -> None:
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(torch.rand(2), torch.ones(2))
        assert sigma(dual) is None


@pytest.mark.parametrize("grad", [True, False])
def test_gradients_are_recorded_where_they_are_wanted(grad: bool) -> None:
    entropy = torch.rand(2, requires_grad=True)
    with nullcontext() if grad else torch.no_grad():
        assert sigma(entropy).requires_grad == grad
    parameter = torch.nn.Parameter(torch.rand(2))
    sigma(parameter).sum().backward()
    assert parameter.grad is not None and (parameter.grad > 0).all()


def test_without_a_compiled_library_everything_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_library, "native_error", "it was not built")
    assert sigma(torch.rand(2)) is None


def test_threads_call_at_once() -> None:
    """The interpreter is free while an operator runs."""
    query = torch.randn(1, 1, 4096, 32)
    results: list[AttentionOutput] = []
    with use_backend("cpu"):
        expected = attention(query, query, query)
    threads = [
        threading.Thread(target=lambda: results.append(attention(query, query, query)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4
    for result in results:
        assert torch.equal(result.out, expected.out)


def test_profilers_see_the_operator() -> None:
    with use_backend("cpu"), torch.profiler.profile() as profile:
        entropy_prior(torch.randn(2, 3), torch.rand(2), torch.randn(2, 3))
    assert "driftar::entropy_prior" in {event.name for event in profile.events()}


def test_errors_say_what_python_says() -> None:
    tree, draft = DraftTree([-1, 0]), torch.randn(1, 2, 4)
    with use_backend("cpu"):
        with pytest.raises(TypeError, match=r"(?=.*draft)(?=.*target)"):
            verify_tree(tree, draft, draft.double(), tolerance=0.5)
        with pytest.raises(ValueError, match="tolerance must be finite"):
            verify_tree(tree, draft, draft, tolerance=float("inf"))


def test_no_reference_leaks() -> None:
    """Arguments and results are freed with their last owner."""
    entropy = torch.rand(1000)
    found = sigma(entropy)
    alive = weakref.ref(entropy), weakref.ref(found)
    del entropy, found
    gc.collect()
    assert [x() for x in alive] == [None, None]
