"""What only a GPU record shows: streams, graphs, a second device, tensors beyond 2^31 elements.

Every check answers with a record whose ``passed`` is None, with a reason, where it cannot run. On
the CPU the same code runs on small tensors; streams, graphs and devices do not exist there, and
what is compared are repeated calls.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

import driftar_kernels as dk

Record = dict[str, Any]

NODES = 15  # of the draft tree
# What tensors must be larger than, on a GPU; elements.
LARGE = 1 << 31
BYTES_NEEDED = 64 << 30


class SpeculativeStep:
    """Draft attention, tree attention, verification of tree and chain, commit, on fixed tensors."""

    def __init__(self, device: torch.device, seed: int) -> None:
        random = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=random).to(device, torch.bfloat16)

        batch, heads, key_heads, capacity, width = 2, 4, 2, 96, 64
        self.query, self.nodes = (normal(batch, heads, n, width) for n in (1, NODES))
        self.lengths = torch.tensor([64, 49], device=device)
        self._caches = [normal(batch, key_heads, capacity, width) for _ in "kv"]
        self.key, self.value = (cache.clone() for cache in self._caches)
        self.tree = dk.DraftTree([(node - 1) // 2 for node in range(NODES)]).to(device)
        self.draft, noise = (normal(batch, NODES, 16) for _ in range(2))
        self.target = self.draft + 0.2 * noise
        self.chain = [normal(batch, n, 16).float() for n in (3, 3, 4)]
        self.std = [torch.full((batch, n), s, device=device) for n, s in ((3, 1.0), (4, 1.1))]

    def reset(self) -> None:
        """Undo the commits."""
        self.key.copy_(self._caches[0])
        self.value.copy_(self._caches[1])

    def __call__(self) -> list[Tensor]:
        """Everything that comes of the step; the chain's verdict, which is random, comes last."""
        attend = partial(dk.attention, key_lengths=self.lengths, enable_gqa=True)
        draft = attend(self.query, self.key, self.value)
        nodes = attend(self.nodes, self.key, self.value, tree=self.tree)
        verdict = dk.verify_tree(self.tree, self.draft, self.target, tolerance=0.8)
        chain = dk.verify_chain(
            self.chain[0], self.chain[1], self.std[0], self.chain[2], self.std[1]
        )
        lengths = dk.commit_path(self.key, self.value, self.lengths, verdict)
        assert draft.entropy is not None and nodes.entropy is not None
        attention = [draft.out, draft.entropy, draft.lse, nodes.out, nodes.entropy, nodes.lse]
        return [*attention, *verdict, lengths, self.key, self.value, *chain]


def _equal(left: list[Tensor], right: list[Tensor]) -> bool:
    return all(torch.equal(a, b.to(a.device)) for a, b in zip(left, right, strict=True))


def _copied(tensors: list[Tensor]) -> list[Tensor]:
    return [x.clone() for x in tensors]


def _run(step: SpeculativeStep) -> list[Tensor]:
    step.reset()
    return _copied(step())


def graph_of_a_step(device: torch.device) -> Record:
    """The whole step is captured; replays equal the eager step bit by bit, with fresh numbers."""
    step = SpeculativeStep(device, seed=1)
    eager = _run(step)
    if device.type != "cuda":
        again = [_run(step) for _ in range(2)]
        return {
            "passed": all(_equal(eager[:-2], results[:-2]) for results in again),
            "reason": "no graphs on this device: eager steps were compared",
        }
    _run(step)  # whatever a first call prepares
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    samples, passed = [], True
    for _ in range(3):
        step.reset()
        graph.replay()
        torch.cuda.synchronize(device)
        passed = passed and _equal(eager[:-2], captured[:-2])
        samples.append(captured[-1].clone())
    fresh = not torch.equal(samples[0], samples[1]) and not torch.equal(samples[1], samples[2])
    return {"passed": passed and fresh, "replays": len(samples), "fresh_numbers": fresh}


def two_streams(device: torch.device) -> Record:
    """Steps on two streams at once equal the steps one after the other."""
    steps = [SpeculativeStep(device, seed) for seed in (1, 2)]
    alone = [_run(step) for step in steps]
    rounds = 20 if device.type == "cuda" else 1
    results: list[list[list[Tensor]]] = [[], []]
    if device.type == "cuda":
        streams = [torch.cuda.Stream(device) for _ in steps]
        torch.cuda.synchronize(device)
        for _ in range(rounds):
            for step, stream, own in zip(steps, streams, results, strict=True):
                with torch.cuda.stream(stream):
                    own.append(_run(step))
        torch.cuda.synchronize(device)
    else:
        results = [[_run(step)] for step in steps]
    passed = all(
        _equal(expected[:-2], found[:-2])
        for expected, own in zip(alone, results, strict=True)
        for found in own
    )
    return {"passed": passed, "rounds": rounds}


def second_device(device: torch.device) -> Record:
    """A step on the second device, while the first one is current, equals the first one's."""
    if device.type != "cuda" or torch.cuda.device_count() < 2:
        return {"passed": None, "reason": "there is no second device"}
    first, second = (
        _run(SpeculativeStep(torch.device("cuda", index), seed=1)) for index in range(2)
    )
    if torch.cuda.get_device_name(0) != torch.cuda.get_device_name(1):
        first, second = first[6:9], second[6:9]  # roundings may differ, verdicts may not
        return {"passed": _equal(first, second)}
    return {"passed": _equal(first[:-2], second[:-2])}


def _large_attention(device: torch.device, elements: int) -> bool:
    """The second sample's keys lie behind `elements`."""
    length = elements // 64 + 64
    key, value = (
        torch.randn(1, device=device, dtype=torch.bfloat16).expand(2, 1, length, 64).contiguous()
        for _ in "kv"
    )
    short = min(length, 1000)
    for x in (key, value):
        x[1, :, :short] = torch.randn(1, short, 64, device=device, dtype=torch.bfloat16)
    query = torch.randn(2, 2, 1, 64, device=device, dtype=torch.bfloat16)
    lengths = torch.tensor([5, short], device=device)
    whole = dk.attention(query, key, value, key_lengths=lengths, enable_gqa=True)
    few = [x[1:, :, :short].clone() for x in (key, value)]
    alone = dk.attention(query[1:], few[0], few[1], enable_gqa=True)
    return torch.allclose(whole.out[1:], alone.out, atol=1e-2) and torch.allclose(
        whole.lse[1:], alone.lse, atol=1e-3
    )


def _large_commit(device: torch.device, elements: int) -> bool:
    capacity = elements // 64 + 64
    cache = torch.zeros(2, 1, capacity, 64, device=device, dtype=torch.bfloat16)
    prefix = capacity - NODES
    cache[1, 0, prefix:] = torch.arange(NODES, device=device)[:, None].to(cache.dtype)
    verdict = dk.TreeVerdict(
        torch.tensor([0, 3], device=device),
        torch.tensor([[-1, -1, -1], [1, 4, 9]], device=device),
        torch.tensor([-1, 9], device=device),
    )
    lengths = torch.tensor([0, prefix], device=device)
    new = dk.commit_path(cache, cache.clone(), lengths, verdict)
    return new.tolist() == [0, prefix + 3] and cache[1, 0, prefix : prefix + 3, 0].tolist() == [
        1,
        4,
        9,
    ]


def _large_prior(device: torch.device, elements: int) -> bool:
    rows = elements // 64 + 1
    mean = torch.zeros(rows, 64, device=device, dtype=torch.bfloat16)
    noise = torch.ones_like(mean)
    entropy = torch.ones(rows, device=device)
    out = dk.entropy_prior(mean, entropy, noise)
    return bool((out == out[0, 0]).all()) and bool(out[0, 0] > 0)


def _large_drift(device: torch.device, elements: int) -> bool:
    """Copies of a few problems have the scale, the norms and the forces of these."""
    parts = [torch.randn(4, n, 64, device=device, dtype=torch.bfloat16) for n in (32, 16, 8)]
    copies = elements // parts[0].numel() + 1
    few = dk.drift_field(*parts)
    many = dk.drift_field(*(x.repeat(copies, 1, 1) for x in parts))
    return torch.allclose(many.scale, few.scale, rtol=1e-3) and torch.allclose(
        many.force[-4:], few.force, rtol=1e-2, atol=1e-2
    )


def large_tensors(device: torch.device) -> Record:
    """Tensors of more elements than 32 bits count."""
    elements = LARGE
    if device.type != "cuda":
        elements = 1 << 12
    elif torch.cuda.mem_get_info(device)[0] < BYTES_NEEDED:
        return {"passed": None, "reason": f"needs {BYTES_NEEDED >> 30} GB of free memory"}
    parts: dict[str, Callable[[torch.device, int], bool]] = {
        "attention": _large_attention,
        "commit_path": _large_commit,
        "entropy_prior": _large_prior,
        "drift_field": _large_drift,
    }
    results = {}
    for name, part in parts.items():
        results[name] = part(device, elements)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return {"passed": all(results.values()), "elements": elements, **results}


CHECKS: dict[str, Callable[[torch.device], Record]] = {
    "graph": graph_of_a_step,
    "streams": two_streams,
    "second_device": second_device,
    "large_tensors": large_tensors,
}
