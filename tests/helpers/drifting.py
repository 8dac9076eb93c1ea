"""The drift operators held against the oracle."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from driftar_kernels import drift_field, drift_loss
from tests.helpers import oracle
from tests.helpers.tolerance import assert_relative


def check(gen: Tensor, pos: Tensor, neg: Tensor | None, **keywords: Any) -> None:
    """Everything within 1e-4 of the fp64 oracle, relative to its largest value."""
    truth = oracle.drift(gen, pos, neg, **keywords)
    field = drift_field(gen, pos, neg, **keywords)
    assert field.force.dtype == field.scale.dtype == field.norms.dtype == torch.float32
    assert_relative(field.scale, truth.scale, 1e-5, "scale")
    # A norm below the published clip of 1e-8 multiplies the force by 1e4: no relative claim there.
    relevant = float(truth.norms.max()) > 1e-8
    if relevant:
        assert_relative(field.norms, truth.norms, 1e-4, "norms")
        assert_relative(field.force, truth.force, 1e-4, "force")
    leaf = gen.clone().requires_grad_()
    loss = drift_loss(leaf, pos, neg, **keywords, reduction="none")
    assert loss.dtype == torch.float32
    (gradient,) = torch.autograd.grad(loss.sum(), leaf)
    assert gradient.dtype == gen.dtype and bool(gradient.isfinite().all())
    if relevant:
        assert_relative(loss, truth.loss, 2e-4, "loss")
