"""``torch.compile`` sees through the Triton operators, to the launches of their kernels.

What is compiled cannot be interpreted: the interpreter's suite runs this file in a process of its
own. No GPU is needed, since nothing is launched.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch._functorch.aot_autograd import make_boxed_func
from torch._higher_order_ops.triton_kernel_wrap import (
    kernel_side_table,
    triton_kernel_wrapper_functional,
)
from torch._subclasses import FakeTensorMode
from torch.utils._pytree import tree_leaves

import driftar_kernels as dk
from driftar_kernels import backends
from tests.helpers.inputs import AttentionCase, chain, drift_inputs, trainable
from tests.helpers.interpreter import INTERPRETED

if importlib.util.find_spec("triton") is None:
    pytest.skip("the package triton is not installed", allow_module_level=True)

compiles = pytest.mark.skipif(INTERPRETED, reason="test_in_a_process_that_compiles runs it")
ARCHITECTURE = 90


@pytest.mark.skipif(not INTERPRETED, reason="the other tests run in this process")
def test_in_a_process_that_compiles() -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", __file__]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


class Device:
    """Of an architecture that Triton shall compile for, without any GPU."""

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", ARCHITECTURE, 32)


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The backend, on CPU tensors that only their shapes are taken of."""
    import triton

    from driftar_kernels.triton import tuning

    monkeypatch.setattr(triton.runtime.driver, "_active", Device())
    monkeypatch.setattr(tuning, "_processors", lambda device: 8)
    available = dataclasses.replace(
        backends.BACKENDS["triton"], devices=("cpu", "cuda"), missing=lambda: None
    )
    monkeypatch.setitem(backends.BACKENDS, "triton", available)
    torch._dynamo.reset()
    with dk.use_backend("triton"):
        yield


Written = dict[str, set[str]]


def recorded(function: Callable[..., Any], *inputs: Tensor) -> Written:
    """What the graphs of the compiled function, and of its gradient, launch: kernels, and their
    arguments that the compiler takes for written."""
    launches: Written = {}

    def keep(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        for node in graph.graph.nodes:
            assert not str(node.target).startswith("driftar."), f"{node.target} is opaque"
            if node.target is triton_kernel_wrapper_functional:
                kernel = kernel_side_table.get_kernel(node.kwargs["kernel_idx"])
                name = getattr(kernel, "fn", kernel).__name__
                launches.setdefault(name, set()).update(node.kwargs["tensors_to_clone"])
        return make_boxed_func(graph.forward)

    compiled = torch.compile(function, fullgraph=True, backend=aot_autograd(fw_compiler=keep))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        result = compiled(*(mode.from_tensor(x) for x in inputs))
        leaves = [x for x in tree_leaves(result) if isinstance(x, Tensor) and x.requires_grad]
        if leaves:
            torch.autograd.backward([x.sum() for x in leaves])
    return launches


def attend(queries: int = 70, keys: int = 90, **options: Any) -> Callable[[], Written]:
    case = AttentionCase(heads=4, kv_heads=2, queries=queries, keys=keys)

    def run() -> Written:
        return recorded(
            lambda *qkv: tuple(dk.attention(*qkv, enable_gqa=True, **options)),
            *trainable(case.qkv()),
        )

    return run


def verify_and_commit() -> Written:
    tree = dk.DraftTree([-1, 0, 0, 1])

    def step(draft: Tensor, cache: Tensor, lengths: Tensor, accept: Tensor) -> Any:
        verdict = dk.verify_tree(tree, draft, draft * 2, tolerance=0.5)
        kept = dk.commit_path(cache, cache + 1, lengths, verdict)
        return kept, dk.walk_tree(tree, accept).node

    accept = torch.ones(2, 4, dtype=torch.bool)
    cache, lengths = torch.randn(2, 3, 9, 8), torch.tensor([2, 3])
    return recorded(step, torch.randn(2, 4, 5), cache, lengths, accept)


def verify_chains() -> Written:
    inputs = chain([0.0, 0.1], [1.0, 0.5], [0.0, 0.3, 1.0], [1.0, 1.0, 1.0], dim=3, batch=4)
    return recorded(lambda *x: tuple(dk.verify_chain(*x)), *inputs)


def drift() -> Written:
    gen, pos, neg, keywords = drift_inputs(weighted=True)
    assert neg is not None
    return recorded(lambda *x: dk.drift_loss(*x, **keywords), gen.requires_grad_(), pos, neg)


def prior() -> Written:
    def step(mean: Tensor, entropy: Tensor, noise: Tensor) -> Tensor:
        return dk.entropy_prior(mean, entropy, noise) * dk.entropy_to_sigma(entropy)[..., None]

    noise = torch.randn(3, 4, 5, requires_grad=True)
    return recorded(step, torch.randn(3, 4, 5), torch.rand(3, 4, requires_grad=True), noise)


STATISTICS = {"out", "lse", "max_score", "entropy_lse", "entropy_cross"}
GRADIENTS = {
    "query_gradient_kernel": {"delta", "grad_query"},
    "key_gradient_kernel": {"grad_key", "grad_value"},
}
HEAD: Written = {"forward_kernel": STATISTICS | {"entropy", "entropy_norm"}, **GRADIENTS}
TREE: Written = {"ancestor_kernel": {"bits"}, **HEAD}
LENGTHS = torch.tensor([90, 80])
CASES: dict[str, tuple[Callable[[], Written], Written]] = {
    "attention": (attend(is_causal=True), HEAD),
    "everything": (
        attend(
            attn_mask=torch.randn(70, 90),
            query_offset=LENGTHS,
            key_lengths=LENGTHS,
            is_causal=True,
            entropy_from=3,
        ),
        HEAD,
    ),
    "tree": (attend(tree=dk.DraftTree([-1] * 70), key_lengths=LENGTHS - 75), TREE),
    "no entropy": (
        attend(entropy="none"),
        {"forward_kernel": {"out", "lse", "max_score"}, **GRADIENTS},
    ),
    "decode": (
        attend(queries=1, keys=300),
        {
            "forward_kernel": {"partial_out", "partial"},
            "merge_kernel": HEAD["forward_kernel"],
            **GRADIENTS,
        },
    ),
    "map": (
        attend(entropy="map"),
        {
            "forward_kernel": STATISTICS,
            "map_kernel": {"entropy", "entropy_cross", "entropy_norm"},
            "map_query_gradient_kernel": {"delta", "grad_query"},
            "map_key_gradient_kernel": {"grad_key", "grad_value"},
        },
    ),
    "trees": (
        verify_and_commit,
        {
            "verify_kernel": {"length", "path", "node"},
            "commit_kernel": {"cache"},
            "walk_kernel": {"length", "path", "node"},
        },
    ),
    "chains": (verify_chains, {"chain_kernel": {"length", "next_sample"}}),
    "drift": (
        drift,
        {
            "mean_kernel": {"mean"},
            "centre_kernel": {"centred", "norms"},
            "distance_kernel": {"distances", "partial"},
            "normaliser_kernel": {"row_lse", "column_least", "column_sum"},
            "column_kernel": {"column_lse"},
            "force_kernel": {"force", "partial"},
        },
    ),
    "prior": (
        prior,
        {
            "prior_kernel": {"out"},
            "prior_backward_kernel": {"grad_entropy", "grad_noise"},
            "sigma_kernel": {"sigma"},
            "sigma_backward_kernel": {"grad_entropy"},
        },
    ),
}


@compiles
@pytest.mark.parametrize("name", CASES)
@pytest.mark.usefixtures("chosen")
def test_graphs_hold_the_launches(name: str) -> None:
    """Of kernels that write their results and nothing else: what a compiler takes for written it
    copies, and an input would be written back."""
    run, expected = CASES[name]
    assert run() == expected


@compiles
def test_every_kernel_is_recorded() -> None:
    from driftar_kernels import triton

    names = {kernel.__name__ for kernel in triton.kernels()}
    assert names == {name for _, expected in CASES.values() for name in expected}


@compiles
@pytest.mark.usefixtures("chosen")
def test_one_graph_for_all_lengths() -> None:
    """Sizes stay symbols through the launchers, and options do not depend on them."""
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(
        lambda *qkv: dk.attention(*qkv, is_causal=True).out,
        fullgraph=True,
        dynamic=True,
        backend=aot_autograd(fw_compiler=counter),
    )
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        for queries, keys in ((70, 90), (71, 333), (640, 1000)):
            qkv = AttentionCase(queries=queries, keys=keys).qkv()
            out = compiled(*(mode.from_tensor(x) for x in qkv))
            assert out.shape == (2, qkv[0].shape[1], queries, 8)
    assert counter.frame_count == 1


@compiles
def test_no_kernel_is_compiled_per_length() -> None:
    """Triton keeps a kernel by the types of its arguments, and by those values that it takes for
    constants: none of them is a length."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    from driftar_kernels.triton import attention, resources

    backend = make_backend(GPUTarget("cuda", ARCHITECTURE, 32))
    found = []
    for queries, keys in ((97, 97), (100, 1000), (1024, 4096)):
        query, key = (torch.empty(2, 4, length, 64, device="meta") for length in (queries, keys))
        problem = (None, None, None, None, keys - queries, 0.125, True, "head")
        with resources.recorded() as launches:
            out, entropy, lse, _, *saved = attention.attention_forward(
                query, key, key, *problem, True, 0
            )
            attention.attention_backward(
                out, entropy, lse, query, key, key, *problem[:4], out, lse, *saved, *problem[4:], 0
            )
        kinds = []
        for launch in launches:
            bind = create_function_from_signature(
                launch.kernel.signature, launch.kernel.params, backend
            )
            kinds.append(bind(*launch.arguments, **launch.keywords)[1])
        assert len(kinds) == 3
        found.append(kinds)
    assert found[0] == found[1] == found[2]


@compiles
def test_launches_enter_the_device_of_their_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton launches on the current stream of the current device."""
    from driftar_kernels.triton import launch as module

    entered: list[torch.device] = []

    @contextmanager
    def enter(device: torch.device) -> Iterator[None]:
        entered.append(device)
        yield
        entered.append(torch.device("cpu"))

    class Kernel:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            return lambda *arguments: entered.append(torch.device("meta"))

    monkeypatch.setattr(torch.cuda, "device", enter)
    monkeypatch.setattr(module, "recording", lambda kernel: False)
    with FakeTensorMode():
        module.launch(Kernel(), (1,), 3, torch.empty(2, device="cuda:1"))
    assert [str(device) for device in entered] == ["cuda:1", "meta", "cpu"]


@pytest.fixture
def machine_code(monkeypatch: pytest.MonkeyPatch, chosen: None) -> Iterator[list[str]]:
    """Names of the kernels that Inductor compiles to machine code. Launches do nothing, and its own
    C++ is not built."""
    from torch._inductor import config
    from torch._inductor.async_compile import AsyncCompile
    from torch._inductor.codecache import PyCodeCache
    from torch._inductor.runtime import triton_helpers
    from torch._inductor.runtime.hints import DeviceProperties

    gpu = DeviceProperties(
        type="cuda",
        index=0,
        multi_processor_count=132,
        cc=ARCHITECTURE,
        major=ARCHITECTURE // 10,
        regs_per_multiprocessor=1 << 16,
        max_threads_per_multi_processor=2048,
        max_threads_per_block=1024,
        warp_size=32,
    )
    names: list[str] = []

    def compiled(self: AsyncCompile, name: str, source: str, device_str: str = "cuda") -> Any:
        kernel = getattr(PyCodeCache.load(source), name)
        kernel.precompile(warm_cache_only=True)
        (result,) = kernel.compile_results
        assert result.kernel.asm["cubin"]
        names.append(kernel.fn.__name__)
        return SimpleNamespace(run=lambda *arguments, **keywords: None)

    monkeypatch.setattr(triton_helpers, "set_driver_to_gpu", lambda: None)
    monkeypatch.setattr(DeviceProperties, "create", lambda device: gpu)
    monkeypatch.setattr(AsyncCompile, "triton", compiled)
    monkeypatch.setattr(AsyncCompile, "cpp_pybinding", lambda *arguments: lambda *inputs: None)
    with config.patch(force_disable_caches=True):
        yield names


def attend_once(**options: Any) -> Callable[..., Any]:
    return lambda x: tuple(dk.attention(*3 * (x.reshape(1, 1, 1, -1),), **options))


ONES: dict[str, tuple[Callable[..., Any], set[str]]] = {
    "attention": (attend_once(is_causal=True), {"forward_kernel"}),
    "map": (attend_once(entropy="map"), {"forward_kernel", "map_kernel"}),
    "trees": (
        lambda x: tuple(
            dk.verify_tree(
                dk.DraftTree([-1]), x.reshape(1, 1, -1), x.reshape(1, 1, -1), tolerance=1.0
            )
        ),
        {"verify_kernel"},
    ),
    "drift": (
        lambda x: tuple(dk.drift_field(x.reshape(1, 1, -1), x.reshape(1, 1, -1))),
        set(CASES["drift"][1]),
    ),
    "prior": (
        lambda x: dk.entropy_prior(x.reshape(1, -1), x[:1], x.reshape(1, -1)),
        {"prior_kernel"},
    ),
}


@compiles
@pytest.mark.parametrize("name", ONES)
@pytest.mark.parametrize("width", [1, 16])
def test_inductor_compiles_the_launches(machine_code: list[str], name: str, width: int) -> None:
    """As it copies them, and with its own idea of what is constant: every size that is 1."""
    function, expected = ONES[name]
    with torch.no_grad():
        torch.compile(function, fullgraph=True)(torch.randn(width))
    assert set(machine_code) == expected


@compiles
@pytest.mark.parametrize(("name", "entropy"), [("attention", "head"), ("map", "map")])
def test_inductor_compiles_the_gradients(machine_code: list[str], name: str, entropy: str) -> None:
    x = torch.randn(16, requires_grad=True)
    out, *_ = torch.compile(attend_once(entropy=entropy), fullgraph=True)(x)
    out.sum().backward()
    assert set(machine_code) == set(CASES[name][1])
