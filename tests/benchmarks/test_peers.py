"""The competitors compute what they are said to compute."""

from __future__ import annotations

import itertools

import torch

from benchmarks.bench_tree import chain_inputs
from benchmarks.peers import attention as attention_peers
from benchmarks.peers import drift as drift_peers
from benchmarks.peers import prior as prior_peers
from benchmarks.peers import tree as tree_peers
from driftar_kernels import DraftTree, walk_tree
from tests.helpers import oracle
from tests.helpers.inputs import drift_inputs, normal, random_parents
from tests.helpers.tolerance import assert_bitwise


def test_attention() -> None:
    query, key, value = (normal(2, 3, 33, 16, seed=seed) for seed in range(3))
    peers = {
        "head": (attention_peers.sdpa_twice, attention_peers.materialised),
        "map": (attention_peers.materialised_average,),
    }
    for entropy, causal in itertools.product(peers, (True, False)):
        truth = oracle.attention(
            query, key, value, entropy=entropy, is_causal=causal, normalize=False
        )
        assert truth.entropy is not None
        for peer in peers[entropy]:
            out, row_entropy = peer(query, key, value, is_causal=causal)
            torch.testing.assert_close(out.double(), truth.out, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(row_entropy.double(), truth.entropy, rtol=1e-4, atol=1e-4)


def test_grouped_heads_with_a_mask() -> None:
    query, key, value = normal(1, 6, 5, 8, seed=0), *(normal(1, 2, 9, 8, seed=s) for s in (1, 2))
    visible = oracle.visible_keys(1, 5, 9, is_causal=True, query_offset=4)
    mask = torch.zeros(visible.shape).masked_fill(~visible, -torch.inf)
    out = attention_peers.sdpa_masked(query, key, value, mask[:, None])
    truth = oracle.attention(
        query, key, value, is_causal=True, query_offset=4, enable_gqa=True, entropy="none"
    )
    torch.testing.assert_close(out.double(), truth.out, rtol=1e-4, atol=1e-5)


def test_drift_loss() -> None:
    for negatives in (0, 4):
        gen, pos, neg, _ = drift_inputs(negatives=negatives, dtype=torch.float64)
        truth = oracle.drift(gen, pos, neg)
        loss = drift_peers.drift_loss(gen, pos, neg)
        torch.testing.assert_close(loss, truth.loss.mean(), rtol=1e-6, atol=0)


def test_tree_walks() -> None:
    parents = random_parents(40, seed=1, depth=8)
    draft = normal(5, 40, 3, seed=2)
    target = draft + 0.5 * normal(5, 40, 3, seed=3)
    tree = DraftTree(parents)
    wanted = walk_tree(tree, (draft - target).norm(dim=-1) <= 1.0)
    walks = (
        tree_peers.walk_tensors(parents, draft, target, 1.0, tree.max_depth),
        tree_peers.walk_lists(parents.tolist(), draft, target, 1.0, tree.max_depth),
    )
    for verdict in walks:
        assert_bitwise(verdict, wanted)


def test_chain_emits_the_target() -> None:
    """The first emitted vector has the target's mean and spread."""
    draft, draft_mean, draft_std, target_mean, target_std = (
        x[:1].expand(20_000, *x.shape[1:]) for x in chain_inputs(1, 1, 3)
    )
    draft = draft_mean + draft_std[..., None] * torch.randn(draft.shape)
    length, sample = tree_peers.chain(draft, draft_mean, draft_std, target_mean, target_std)
    first = torch.where(length[:, None] == 1, draft[:, 0], sample)
    standard = (first - target_mean[:, 0]) / target_std[:, 0, None]
    assert 0 < int(length.sum()) < len(length)
    assert float(standard.mean(0).abs().max()) < 5 / 20_000**0.5
    assert float((standard.var(0) - 1).abs().max()) < 5 * (2 / 20_000) ** 0.5


def test_prior() -> None:
    mean, entropy, noise = normal(5, 6, seed=0), torch.rand(5), normal(5, 6, seed=1)
    truth = mean.double() + oracle.sigma(entropy)[:, None] * noise.double()
    sample = prior_peers.entropy_prior(mean, entropy, noise)
    torch.testing.assert_close(sample.double(), truth, rtol=1e-6, atol=1e-6)
