"""The registered Triton operators refuse what would make a kernel read out of bounds."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

import driftar_kernels as dk
from tests.helpers.inputs import (
    AttentionCase,
    bool_mask,
    chain,
    drift_inputs,
    random_parents,
    trainable,
)
from tests.helpers.inputs import run_attention as run
from tests.helpers.recording import Call, record
from tests.helpers.targets import BACKEND_DEVICES, require_backend

if "triton" not in BACKEND_DEVICES:
    pytest.skip("TRITON_INTERPRET=1 tests the Triton kernels", allow_module_level=True)

BATCH = 3  # so that a row less is no broadcast


@pytest.fixture(autouse=True)
def chosen() -> Iterator[None]:
    require_backend("triton")
    with dk.use_backend("triton"):
        yield


def attention_with(entropy: str, tree: bool) -> None:
    case = AttentionCase(batch=BATCH, queries=4, keys=9)
    options = {
        "key_lengths": torch.tensor([5, 4, 0]),
        "attn_mask": bool_mask(BATCH, 1, 4, 9, seed=1),
    }
    if tree:
        options["parents"] = random_parents(4, batch=BATCH, seed=1)
    else:
        options.update(query_offset=torch.tensor([0, 1, 2]), is_causal=True)
    result = run(*trainable(case.qkv()), options, entropy=entropy)
    total = result.out.sum() + result.lse.nan_to_num(neginf=0.0).sum()
    (total + result.entropy.sum()).backward()


def trees() -> None:
    tree = dk.DraftTree(random_parents(5, batch=BATCH, seed=2))
    verdict = dk.walk_tree(tree, torch.ones(BATCH, 5, dtype=torch.bool))
    dk.verify_tree(tree, torch.zeros(BATCH, 5, 4), torch.zeros(BATCH, 5, 4), tolerance=1.0)
    cache = torch.randn(BATCH, 2, 9, 4)
    dk.commit_path(cache, cache.clone(), torch.tensor([1, 2, 3]), verdict)
    dk.verify_chain(*chain([0.0, 0.0], [1.0, 1.0], [0.0] * 3, [1.0] * 3, dim=3, batch=BATCH))


def drifting() -> None:
    gen, pos, neg, keywords = drift_inputs(BATCH, 5, 4, 3, 6, weighted=True)
    dk.drift_loss(gen.requires_grad_(), pos, neg, **keywords).backward()


def priors() -> None:
    entropy = torch.rand(BATCH, 4, requires_grad=True)
    dk.entropy_to_sigma(entropy).sum().backward()
    mean, noise = (torch.randn(BATCH, 4, 5, requires_grad=True) for _ in range(2))
    dk.entropy_prior(mean, entropy, noise).sum().backward()


FAMILIES: dict[str, Callable[[], None]] = {
    "attention": lambda: attention_with("head", tree=False),
    "map": lambda: attention_with("map", tree=False),
    "tree attention": lambda: attention_with("head", tree=True),
    "trees": trees,
    "drift": drifting,
    "prior": priors,
}


def name_of(call: Call, index: int) -> str:
    return str(call.operator._schema.arguments[index].name)


def refuses(call: Call, index: int, value: Tensor) -> bool:
    arguments = [*call.arguments[:index], value, *call.arguments[index + 1 :]]
    try:
        call.operator(*arguments, **call.keywords)
    except (ValueError, TypeError):
        return True
    return False


@pytest.mark.parametrize("family", list(FAMILIES))
def test_a_missing_row_is_refused(family: str) -> None:
    """Every tensor of every operator, one sample short and one dimension short."""
    calls = [c for c in record(FAMILIES[family]) if c.operator.name().endswith("_triton")]
    assert calls
    for call in calls:
        tensors = [(i, x) for i, x in enumerate(call.arguments) if isinstance(x, Tensor)]
        if len(tensors) < 2:  # any shape is right
            continue
        for index, x in tensors:
            where = (
                f"{call.operator.name()}, argument {call.operator._schema.arguments[index].name}"
            )
            if x.dim() and x.numel() and x.shape[0] == BATCH:
                assert refuses(call, index, x[: BATCH - 1]), where
            if x.dim() and x.numel():
                assert refuses(call, index, x[..., None]), where


@pytest.mark.parametrize("family", list(FAMILIES))
def test_another_dtype_is_refused(family: str) -> None:
    """Of floating tensors; a cache may have any."""
    for call in record(FAMILIES[family]):
        tensors = [(i, x) for i, x in enumerate(call.arguments) if isinstance(x, Tensor)]
        for index, x in tensors:
            if "cache" in name_of(call, index) or len(tensors) == 1:
                continue
            if x.is_floating_point() and x.numel():
                assert refuses(call, index, x.to(torch.complex64)), call.operator.name()


def test_settings_are_checked() -> None:
    forward, *_ = record(FAMILIES["attention"])
    names = [argument.name for argument in forward.operator._schema.arguments]
    for name, value, match in (("entropy", "row", "entropy"), ("entropy_from", -1, "entropy_from")):
        arguments = list(forward.arguments)
        arguments[names.index(name)] = value
        with pytest.raises(ValueError, match=match):
            forward.operator(*arguments)
