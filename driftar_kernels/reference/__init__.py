"""Plain PyTorch versions of every operator: readable, any dtype, differentiable by autograd.

They materialise whatever the formulas name (attention maps, distance matrices) and serve as the
oracle of the tests and as the backend of last resort. Nothing here imports the rest of the package.
"""

from . import attention, drift, prior, tree

__all__ = ["attention", "drift", "prior", "tree"]
