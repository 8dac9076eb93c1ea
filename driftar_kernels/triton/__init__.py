"""Triton kernels of every operator, imported on the first call that runs one.

A launcher takes the arguments of the native operator of its name. The same kernels run natively on
CUDA tensors and, under ``TRITON_INTERPRET=1``, on the CPU.
"""

from types import ModuleType

from triton.runtime.jit import JITCallable

from .attention import attention_backward, attention_forward
from .chain import verify_chain
from .drift import drift_distances, drift_force
from .prior import (
    entropy_prior,
    entropy_prior_backward,
    entropy_to_sigma,
    entropy_to_sigma_backward,
)
from .tree import commit_path, verify_tree, walk_tree

__all__ = [
    "attention_backward",
    "attention_forward",
    "commit_path",
    "drift_distances",
    "drift_force",
    "entropy_prior",
    "entropy_prior_backward",
    "entropy_to_sigma",
    "entropy_to_sigma_backward",
    "verify_chain",
    "verify_tree",
    "walk_tree",
]


def kernels() -> list[object]:
    """Everything that this package launches."""
    modules = (value for value in globals().values() if isinstance(value, ModuleType))
    found = {
        name: value
        for module in modules
        for name, value in vars(module).items()
        if name.endswith("_kernel") and isinstance(value, JITCallable)
    }
    return list(found.values())
