"""Every registered operator passes ``torch.library.opcheck`` on real arguments."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

import driftar_kernels
from driftar_kernels import (
    DraftTree,
    attention,
    commit_path,
    drift,
    drift_field,
    drift_loss,
    entropy_prior,
    entropy_to_sigma,
    verify_chain,
    verify_tree,
    walk_tree,
)
from tests.helpers.inputs import (
    CASES,
    chain,
    drift_inputs,
    random_parents,
    run_attention,
    trainable,
)
from tests.helpers.interpreter import INTERPRETED, size
from tests.helpers.recording import Call, record, registered

ATTENTION_CASES = (
    "plain",
    "causal_tensor_offset",
    "lengths_int32",
    "mask_bool_qk",
    "mask_float_b11k",
    "gqa",
    "value_wider",
    "tree_lengths",
    "everything",
)
# What "map" changes about shapes and schemas it changes alike for every case.
MAP_CASES = ("plain", "gqa") if INTERPRETED else ATTENTION_CASES


def run_attention_case(name: str, entropy: str, dtype: torch.dtype) -> None:
    case = CASES[name]
    result = run_attention(*trainable(case.qkv(dtype=dtype)), case.keywords(), entropy=entropy)
    total = result.out.sum() + result.lse.nan_to_num(neginf=0).sum()
    (total if result.entropy is None else total + result.entropy.sum()).backward()


def run_strided_attention() -> None:
    query, key, value = (t.transpose(2, 3) for t in (torch.randn(2, 2, 8, n) for n in (5, 6, 6)))
    attention(query.requires_grad_(), key, value).out.sum().backward()
    attention(torch.randn(0, 2, 3, 8), torch.randn(0, 2, 4, 8), torch.randn(0, 2, 4, 8))
    attention(torch.randn(1, 2, 3, 8), torch.randn(1, 2, 0, 8), torch.randn(1, 2, 0, 8))


def run_trees() -> None:
    tree = DraftTree(random_parents(9, batch=2, seed=1))
    verdict = walk_tree(tree, torch.rand(2, 9) < 0.8)
    walk_tree(DraftTree([-1, 0]), torch.ones(0, 2, dtype=torch.bool))
    for dtype in (torch.float32, torch.bfloat16):
        target = torch.randn(2, 9, 4, dtype=dtype)
        verify_tree(tree, target + 0.1, target, tolerance=0.3)
        commit_path(
            torch.randn(2, 3, 20, 4, dtype=dtype),
            torch.randn(2, 20, 3, 5, dtype=dtype).transpose(1, 2),
            torch.tensor([3, 11], dtype=torch.int32),
            verdict,
        )


def run_chains() -> None:
    verify_chain(*chain([0.0, 1.0], [1.0, 0.0], [0.5, 1.0, 0.0], [1.0, 0.0, 2.0], dim=3, batch=4))
    verify_chain(*chain([0.0], [1.0], [0.5, 1.0], [1.0, 0.0], dim=3, batch=0))


def run_drift() -> None:
    for batch, count, negatives, weighted in ((2, 6, 4, True), (1, 9, 0, False), (5, 1, 1, False)):
        gen, pos, neg, keywords = drift_inputs(batch, count, negatives=negatives, weighted=weighted)
        drift_loss(gen.requires_grad_(), pos, neg, **keywords).backward()
    many = size(drift.MIN_PROBLEMS, 2)
    for batch in {1, many} if not INTERPRETED else {many}:  # one way for all in Triton
        gen, pos, neg, _ = drift_inputs(batch, 17, 20, 3, 4)
        with mock.patch.object(drift, "MIN_PROBLEMS", many):
            drift_field(gen, pos, neg)
            # A group is served step by step.
            with mock.patch.object(torch.distributed, "all_reduce"):
                drift_field(gen, pos, neg, group=mock.sentinel.group)
            # Too large for keeping the distances.
            with mock.patch.multiple(drift, MAX_KEPT=0, MAX_KEPT_OF_SMALL=0):
                drift_field(gen, pos, neg)
    gen, pos, neg, _ = drift_inputs(dtype=torch.bfloat16)
    drift_field(gen, pos, neg)


def run_prior() -> None:
    for dtype in (torch.float32, torch.float16):
        entropy = torch.rand(3, 4, requires_grad=True)
        entropy_to_sigma(entropy).sum().backward()
        mean, noise = (torch.randn(3, 4, 5, dtype=dtype, requires_grad=True) for _ in range(2))
        entropy_prior(mean, entropy, noise).sum().backward()


FAMILIES: dict[str, Callable[[], None]] = {
    **{
        f"attention-{name}-{entropy}": partial(run_attention_case, name, entropy, torch.float32)
        for entropy, names in (("head", ATTENTION_CASES), ("map", MAP_CASES))
        for name in names
    },
    "attention-plain-none": lambda: run_attention_case("plain", "none", torch.float32),
    "attention-everything-bf16": lambda: run_attention_case("everything", "head", torch.bfloat16),
    "attention-gqa-fp16": lambda: run_attention_case("gqa", "map", torch.float16),
    "attention-strided": run_strided_attention,
    "tree": run_trees,
    "chain": run_chains,
    "drift": run_drift,
    "prior": run_prior,
}


def has_autograd(call: Call) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(call.operator.name(), "Autograd") or any(
        torch._C._dispatch_has_kernel_for_dispatch_key(call.operator.name(), f"Autograd{key}")
        for key in ("CPU", "CUDA")
    )


def differentiable(call: Call) -> Call:
    """The call with gradients switched on for its floating tensors."""
    leaves, spec = tree_flatten((call.arguments, call.keywords))
    for leaf in leaves:
        if isinstance(leaf, Tensor) and leaf.is_floating_point():
            leaf.requires_grad_()
    return Call(call.operator, *tree_unflatten(leaves, spec))


@pytest.mark.parametrize("family", list(FAMILIES))
def test_opcheck(backend: str, family: str) -> None:
    """Schema (no hidden mutation or aliasing), autograd registration, fake tensors, compilation."""
    calls = record(FAMILIES[family])
    if backend != "reference":
        assert calls, "no registered operator was reached"
    for call in calls:
        torch.library.opcheck(call.operator, call.arguments, call.keywords)


@pytest.mark.parametrize("family", ["attention-everything-head", "attention-gqa-map", "prior"])
def test_opcheck_with_gradients(backend: str, family: str) -> None:
    """As above through the autograd formula of the operators that have one."""
    names = set()
    for call in record(FAMILIES[family]):
        if has_autograd(call) and "backward" not in call.operator.name():
            names.add(call.operator.name())
            call = differentiable(without_mask_gradient(call))
            torch.library.opcheck(call.operator, call.arguments, call.keywords)
    assert names or backend == "reference"


def without_mask_gradient(call: Call) -> Call:
    """A float mask has no gradient by contract: hand over the visible keys alone."""
    schema = call.operator._schema.arguments
    arguments = [
        torch.isfinite(value)
        if "mask" in argument.name and isinstance(value, Tensor) and value.is_floating_point()
        else value
        for argument, value in zip(schema, call.arguments, strict=False)
    ]
    return Call(call.operator, tuple(arguments), call.keywords)


def test_every_registered_operator_is_checked() -> None:
    """No operator escapes the checks above, and each public function has its operator."""
    reached: set[str] = set()
    for name in driftar_kernels.available_backends():
        with driftar_kernels.use_backend(name):
            for function in FAMILIES.values():
                reached |= {c.operator.name().removeprefix("driftar::") for c in record(function)}
    if "triton" in driftar_kernels.available_backends():
        assert registered() == reached
    else:  # its operators are registered, so that compiled code can name them, but cannot run
        assert {name for name in registered() if not name.endswith("_triton")} == reached
    if "cpu" in driftar_kernels.available_backends():
        attentive = ["attention_forward", "attention_backward"]
        trees = ["walk_tree", "verify_tree", "verify_chain", "commit_path"]
        for stem in [*attentive, *trees, "drift", "sigma", "prior"]:
            assert any(stem in operator for operator in reached), stem


def test_triton_twins_have_the_native_schema() -> None:
    """Fakes define the twins, csrc/ops.cpp the native operators: the two must not drift apart."""
    operators = torch.ops.driftar
    names = registered()
    twins = {name for name in names if name.endswith("_triton")}
    if "cpu" in driftar_kernels.available_backends():
        # The C++ kernels alone choose between ways to the combined force.
        batch = {"drift_squares", "drift_combined_force"}
        alone = batch | {"drift_field", "drift_loss_gradient", "verify_chain_reference"}
        assert {twin.removesuffix("_triton") for twin in twins} == names - twins - alone
    for twin in twins:
        native = getattr(operators, twin.removesuffix("_triton")).default._schema
        derived = getattr(operators, twin).default._schema
        for left, right in zip(native.arguments, derived.arguments, strict=True):
            assert (left.name, str(left.type)) == (right.name, str(right.type)), twin
            assert left.is_write == right.is_write, twin
        assert [str(r.type) for r in native.returns] == [str(r.type) for r in derived.returns]


PUBLIC: dict[str, Callable[[], Any]] = {
    "attention": lambda: attention(*CASES["plain"].qkv()),
    "walk_tree": lambda: walk_tree(DraftTree([-1]), torch.ones(1, 1, dtype=torch.bool)),
    "verify_tree": lambda: verify_tree(
        DraftTree([-1]), torch.ones(1, 1, 2), torch.ones(1, 1, 2), tolerance=0.0
    ),
    "verify_chain": lambda: verify_chain(*chain([0.0], [1.0], [0.0] * 2, [1.0] * 2, batch=2)),
    "drift_field": lambda: drift_field(*drift_inputs()[:3]),
    "drift_loss": lambda: drift_loss(*drift_inputs()[:3]),
    "entropy_to_sigma": lambda: entropy_to_sigma(torch.rand(3)),
    "entropy_prior": lambda: entropy_prior(torch.rand(3, 2), torch.rand(3), torch.rand(3, 2)),
}


@pytest.mark.parametrize("name", list(PUBLIC))
def test_native_backends_run_registered_operators(native_backend: str, name: str) -> None:
    assert record(PUBLIC[name])
