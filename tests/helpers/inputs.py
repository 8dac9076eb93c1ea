"""The table of inputs that tests (and benchmarks) share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from driftar_kernels import AttentionOutput, DraftTree, attention
from tests.helpers import oracle
from tests.helpers.interpreter import size

GOLDEN = Path(__file__).parent.parent / "golden"

Options = dict[str, Any]
QKV = tuple[Tensor, Tensor, Tensor]


def golden(name: str) -> dict[str, Tensor]:
    """Numbers recorded from a published implementation; ``name`` without suffix."""
    return load_file(GOLDEN / f"{name}.safetensors", device=str(torch.get_default_device()))


def generator(seed: int) -> torch.Generator:
    """For operators that draw on the tests' device."""
    return torch.Generator(torch.get_default_device()).manual_seed(seed)


def draw(function: Callable[..., Tensor], *arguments: Any, seed: int, **keywords: Any) -> Tensor:
    """Random numbers drawn on the CPU, put on the tests' device."""
    source = torch.Generator("cpu").manual_seed(seed)
    drawn = function(*arguments, generator=source, device="cpu", **keywords)
    return drawn.to(torch.get_default_device())


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normal numbers, rounded to ``dtype``; the same on every device."""
    return draw(torch.randn, *shape, seed=seed, dtype=torch.float64).to(dtype)


def random_parents(nodes: int, *, batch: int | None = None, seed: int, depth: int = 0) -> Tensor:
    """Random trees ``[N]`` or ``[batch, N]``; the first ``depth`` nodes are a chain."""
    source = torch.Generator("cpu").manual_seed(seed)

    def parent(node: int) -> int:
        if node == 0 or node < depth:
            return node - 1
        return int(torch.randint(-1, node, (1,), generator=source, device="cpu"))

    def one() -> list[int]:
        return [parent(node) for node in range(nodes)]

    if batch is None:
        return torch.tensor(one(), dtype=torch.int64)
    return torch.tensor([one() for _ in range(batch)], dtype=torch.int64).reshape(batch, nodes)


PARENTS = [-1, 0, 0, 1, -1, 4, 3]  # 0-1-3-6, 0-2, 4-5


@st.composite
def parent_lists(draw: st.DrawFn, most: int = 24) -> list[int]:
    return [draw(st.integers(-1, i - 1)) for i in range(draw(st.integers(1, most)))]


HEADS = size(4, 2)  # of query and key, unless a case says otherwise


@dataclass(frozen=True)
class AttentionCase:
    """Shapes and options of one call; ``options`` gets the case and a seed."""

    batch: int = 2
    heads: int = HEADS
    kv_heads: int = HEADS
    queries: int = 7
    keys: int = 9
    dim: int = 8
    value_dim: int = 8
    options: Callable[[AttentionCase, int], Options] = field(default=lambda case, seed: {})

    def qkv(self, seed: int = 0, dtype: torch.dtype = torch.float32, gain: float = 1.0) -> QKV:
        """query (times ``gain``), key, value."""
        query = normal(self.batch, self.heads, self.queries, self.dim, seed=seed) * gain
        key = normal(self.batch, self.kv_heads, self.keys, self.dim, seed=seed + 1)
        value = normal(self.batch, self.kv_heads, self.keys, self.value_dim, seed=seed + 2)
        return query.to(dtype), key.to(dtype), value.to(dtype)

    def keywords(self, seed: int = 0) -> Options:
        """Keyword arguments; a tree is given as ``parents`` and GQA is enabled where needed."""
        result = self.options(self, seed + 3)
        if self.heads != self.kv_heads:
            result["enable_gqa"] = True
        return result


def trainable(qkv: Iterable[Tensor], dtype: torch.dtype | None = None) -> QKV:
    """Detached copies in ``dtype`` that collect gradients; the strides are kept."""
    query, key, value = (t.detach().to(dtype or t.dtype).requires_grad_() for t in qkv)
    return query, key, value


def bool_mask(*shape: int, seed: int, density: float = 0.6) -> Tensor:
    return draw(torch.rand, *shape, seed=seed) < density


def float_mask(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal numbers, a third of them -inf."""
    hidden = bool_mask(*shape, seed=seed + 1, density=0.33)
    return normal(*shape, seed=seed).masked_fill(hidden, -torch.inf).to(dtype)


def _mask_case(shape: Callable[[AttentionCase], tuple[int, ...]], kind: str) -> AttentionCase:
    make = bool_mask if kind == "bool" else float_mask
    return AttentionCase(options=lambda c, s: {"attn_mask": make(*shape(c), seed=s)})


MASK_SHAPES: Mapping[str, Callable[[AttentionCase], tuple[int, ...]]] = {
    "k": lambda c: (c.keys,),
    "qk": lambda c: (c.queries, c.keys),
    "q1": lambda c: (c.queries, 1),
    "11qk": lambda c: (1, 1, c.queries, c.keys),
    "b11k": lambda c: (c.batch, 1, 1, c.keys),
    "hqk": lambda c: (c.heads, c.queries, c.keys),
    "bhqk": lambda c: (c.batch, c.heads, c.queries, c.keys),
}

CASES: dict[str, AttentionCase] = {
    "plain": AttentionCase(),
    "scale": AttentionCase(options=lambda c, s: {"scale": 0.7}),
    "negative_scale": AttentionCase(options=lambda c, s: {"scale": -0.4}),
    "causal": AttentionCase(queries=9, options=lambda c, s: {"is_causal": True}),
    "causal_cache": AttentionCase(
        queries=3, options=lambda c, s: {"is_causal": True, "query_offset": c.keys - c.queries}
    ),
    "causal_negative_offset": AttentionCase(
        options=lambda c, s: {"is_causal": True, "query_offset": -3}
    ),
    "causal_offset_beyond": AttentionCase(
        options=lambda c, s: {"is_causal": True, "query_offset": 100}
    ),
    "causal_tensor_offset": AttentionCase(
        batch=3,
        options=lambda c, s: {"is_causal": True, "query_offset": torch.tensor([-2, 0, 5])},
    ),
    "causal_int32_offset": AttentionCase(
        options=lambda c, s: {
            "is_causal": True,
            "query_offset": torch.tensor([2, -9], dtype=torch.int32),
        }
    ),
    "lengths": AttentionCase(
        batch=4, options=lambda c, s: {"key_lengths": torch.tensor([0, 1, 9, 5])}
    ),
    "lengths_int32": AttentionCase(
        options=lambda c, s: {"key_lengths": torch.tensor([4, 9], dtype=torch.int32)}
    ),
    "gqa": AttentionCase(heads=size(6, 4), kv_heads=2),
    "mqa": AttentionCase(kv_heads=1, options=lambda c, s: {"is_causal": True}),
    "value_narrower": AttentionCase(dim=16, value_dim=5),
    "value_wider": AttentionCase(dim=8, value_dim=40),
    "entropy_from": AttentionCase(
        queries=9, options=lambda c, s: {"is_causal": True, "entropy_from": 3}
    ),
    "entropy_from_all": AttentionCase(options=lambda c, s: {"entropy_from": 9}),
    "entropy_from_beyond": AttentionCase(options=lambda c, s: {"entropy_from": 50}),
    "tree": AttentionCase(
        queries=12, keys=20, options=lambda c, s: {"parents": random_parents(12, seed=s)}
    ),
    "tree_per_batch": AttentionCase(
        queries=12, keys=12, options=lambda c, s: {"parents": random_parents(12, batch=2, seed=s)}
    ),
    "tree_lengths": AttentionCase(
        batch=3,
        queries=10,
        keys=24,
        options=lambda c, s: {
            "parents": random_parents(10, batch=3, seed=s),
            "key_lengths": torch.tensor([0, 14, 6]),
        },
    ),
    "tree_mask": AttentionCase(
        queries=6,
        keys=14,
        options=lambda c, s: {
            "parents": random_parents(6, seed=s),
            "attn_mask": bool_mask(6, 14, seed=s),
            "key_lengths": torch.tensor([8, 3]),
        },
    ),
    "tree_256": AttentionCase(
        batch=2,
        heads=size(2, 1),
        kv_heads=1,
        queries=size(256, 72),
        keys=size(300, 120),
        options=lambda c, s: {
            "parents": random_parents(c.queries, batch=2, seed=s, depth=70),
            "key_lengths": torch.tensor([44, 17]),
        },
    ),
    "one_query": AttentionCase(
        queries=1,
        keys=300,
        dim=24,
        options=lambda c, s: {"entropy_from": 37, "key_lengths": torch.tensor([300, 270])},
    ),
    "few_queries_per_group": AttentionCase(
        heads=size(8, 4),
        kv_heads=2,
        queries=5,
        keys=300,
        options=lambda c, s: {
            "entropy_from": 11,
            "attn_mask": bool_mask(c.batch, c.heads, c.queries, c.keys, seed=s),
        },
    ),
    "many_blocks": AttentionCase(
        batch=1,
        heads=2,
        kv_heads=1,
        queries=size(530, 140),
        keys=size(700, 180),
        dim=16,
        value_dim=48,
        options=lambda c, s: {
            "is_causal": True,
            "query_offset": c.keys - c.queries,
            "entropy_from": 37,
        },
    ),
    "everything": AttentionCase(
        batch=3,
        heads=size(4, 2),
        kv_heads=size(2, 1),
        queries=size(33, 17),
        keys=size(70, 40),
        dim=24,
        value_dim=17,
        options=lambda c, s: {
            "attn_mask": float_mask(3, 1, c.queries, c.keys, seed=s),
            "is_causal": True,
            "query_offset": torch.tensor([c.keys - c.queries - 7, 0, -4]),
            "key_lengths": torch.tensor([c.keys, 20, c.keys - 6]),
            "scale": 0.3,
            "entropy_from": 5,
        },
    ),
}
for _shape in MASK_SHAPES:
    for _kind in ("bool", "float"):
        CASES[f"mask_{_kind}_{_shape}"] = _mask_case(MASK_SHAPES[_shape], _kind)


def run_attention(
    query: Tensor, key: Tensor, value: Tensor, keywords: Options, **more: Any
) -> AttentionOutput:
    """The public function on a case's keywords."""
    arguments = {**keywords, **more}
    if "parents" in arguments:
        arguments["tree"] = DraftTree(arguments.pop("parents"))
    return attention(query, key, value, **arguments)


def attention_truth(
    query: Tensor, key: Tensor, value: Tensor, keywords: Options, **more: Any
) -> oracle.AttentionTruth:
    """The oracle on the same keywords (``dtype`` chooses its precision)."""
    return oracle.attention(query, key, value, **{**keywords, **more})


def drift_inputs(
    batch: int = 2,
    count: int = 6,
    positives: int = 8,
    negatives: int = 4,
    channels: int = 16,
    *,
    weighted: bool = False,
    offset: float = 0.0,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor | None, Options]:
    """gen, pos, neg (None for 0 negatives) and the weights, all around ``offset``."""

    def points(number: int, step: int) -> Tensor:
        return (normal(batch, number, channels, seed=seed + step) + offset).to(dtype)

    keywords: Options = {}
    if weighted:
        for step, (name, number) in enumerate(
            {"gen_weight": count, "pos_weight": positives, "neg_weight": negatives}.items()
        ):
            if number:
                keywords[name] = draw(torch.rand, batch, number, seed=seed + 10 + step) * 2
    return (
        points(count, 0),
        points(positives, 1),
        points(negatives, 2) if negatives else None,
        keywords,
    )


LAYOUTS = ("transposed", "last_stride", "misaligned", "every_second")


def in_layout(source: Tensor, how: str) -> Tensor:
    """The same numbers in another layout."""
    if how == "transposed":
        return source.transpose(0, 1).contiguous().transpose(0, 1)
    if how == "last_stride":
        return source.transpose(-2, -1).contiguous().transpose(-2, -1)
    if how == "misaligned":
        flat = torch.empty(source.numel() + 1, dtype=source.dtype)
        flat[1:] = source.reshape(-1)
        return flat[1:].view(source.shape)
    if how == "every_second":
        big = torch.full((*source.shape[:-1], 2 * source.shape[-1]), torch.nan, dtype=source.dtype)
        big[..., ::2] = source
        return big[..., ::2]
    raise ValueError(how)


def far_rows(source: Tensor, stride: int) -> Tensor:
    """Rows (second but last dimension) ``stride`` elements apart, in untouched memory."""
    rows, columns = source.shape[-2:]
    deterministic: Any = torch.utils.deterministic  # its attributes are made at run time
    filling = deterministic.fill_uninitialized_memory
    deterministic.fill_uninitialized_memory = False
    try:
        buffer = torch.empty((rows - 1) * stride + columns, dtype=source.dtype)
    finally:
        deterministic.fill_uninitialized_memory = filling
    view = buffer.as_strided(source.shape, (*(0,) * (source.dim() - 2), stride, 1))
    view.copy_(source)
    return view


MANY = size(20_000, 4_096)  # chains enough for a statistical test


class Chain(NamedTuple):
    """Arguments of :func:`verify_chain`."""

    draft: Tensor
    draft_mean: Tensor
    draft_std: Tensor
    target_mean: Tensor
    target_std: Tensor


def chain(
    draft_mean: list[float],
    draft_std: list[float],
    target_mean: list[float],
    target_std: list[float],
    *,
    dim: int = 1,
    batch: int = MANY,
    seed: int = 1,
) -> Chain:
    """``batch`` chains of K positions with equal coordinates; drafts are drawn as given."""

    def mean(values: list[float]) -> Tensor:
        return torch.tensor(values)[None, :, None].expand(batch, len(values), dim).contiguous()

    def std(values: list[float]) -> Tensor:
        return torch.tensor(values).expand(batch, -1).contiguous()

    noise = draw(torch.randn, batch, len(draft_mean), dim, seed=seed)
    draft = mean(draft_mean) + std(draft_std)[..., None] * noise
    return Chain(draft, mean(draft_mean), std(draft_std), mean(target_mean), std(target_std))
