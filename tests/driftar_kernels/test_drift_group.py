"""Data-parallel drift equals one process on the whole batch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from driftar_kernels import drift_field, drift_loss
from tests.helpers.inputs import drift_inputs
from tests.helpers.tolerance import assert_relative

WORKER = """
import sys
import torch, torch.distributed as dist
from safetensors.torch import save_file
from driftar_kernels import drift_field, drift_loss, use_backend
from tests.helpers.emulator import EMULATED, take_over
from tests.helpers.inputs import drift_inputs

if EMULATED:
    take_over()
rank, store, backend = int(sys.argv[1]), sys.argv[2], sys.argv[3]
dist.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=2)
use_backend(backend)
gen, pos, neg, weights = drift_inputs(5, weighted=True)
mine = slice(0, 2) if rank == 0 else slice(2, 5)
weights = {name: value[mine] for name, value in weights.items()}
gen = gen[mine].clone().requires_grad_()
field = drift_field(gen, pos[mine], neg[mine], **weights, group=dist.group.WORLD)
loss = drift_loss(gen, pos[mine], neg[mine], **weights, group=dist.group.WORLD, reduction="none")
(gradient,) = torch.autograd.grad(loss.sum(), gen)
result = {"force": field.force, "scale": field.scale, "norms": field.norms}
result |= {"loss": loss.detach(), "gradient": gradient}
save_file({name: value.contiguous().clone() for name, value in result.items()}, store + f".{rank}")
dist.barrier()
dist.destroy_process_group()
"""


def test_two_processes_equal_one(backend: str, tmp_path: Path) -> None:
    """Unequal shards: 2 and 3 problems. The scale and the norms are those of all 5."""
    store = tmp_path / "store"
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(filter(None, sys.path)))
    environment.update(OMP_NUM_THREADS="1", GLOO_SOCKET_IFNAME="lo")
    workers = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", WORKER, str(rank), str(store), backend],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        errors = [worker.communicate(timeout=120)[1] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    if any(worker.returncode for worker in workers):
        pytest.fail("\n".join(errors))

    gen, pos, neg, weights = drift_inputs(5, weighted=True)
    leaf = gen.clone().requires_grad_()
    whole = drift_field(gen, pos, neg, **weights)
    loss = drift_loss(leaf, pos, neg, **weights, reduction="none")
    (gradient,) = torch.autograd.grad(loss.sum(), leaf)
    parts = [load_file(f"{store}.{rank}") for rank in range(2)]
    for part in parts:
        assert_relative(part["scale"], whole.scale, 1e-6)
        assert_relative(part["norms"], whole.norms, 1e-6)
    for name, expected in (("force", whole.force), ("loss", loss), ("gradient", gradient)):
        assert_relative(torch.cat([part[name] for part in parts]), expected, 1e-5, name)
