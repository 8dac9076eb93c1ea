"""Fused operators for autoregressive-diffusion models: attention with row entropy, draft trees,
drifting fields.
"""

from .attention import AttentionOutput, attention
from .backends import available_backends, use_backend
from .drift import DriftField, drift_field, drift_loss
from .prior import entropy_prior, entropy_to_sigma
from .tree import (
    ChainVerdict,
    DraftTree,
    TreeVerdict,
    commit_path,
    verify_chain,
    verify_tree,
    walk_tree,
)
from .version import __version__

__all__ = [
    "AttentionOutput",
    "ChainVerdict",
    "DraftTree",
    "DriftField",
    "TreeVerdict",
    "__version__",
    "attention",
    "available_backends",
    "commit_path",
    "drift_field",
    "drift_loss",
    "entropy_prior",
    "entropy_to_sigma",
    "use_backend",
    "verify_chain",
    "verify_tree",
    "walk_tree",
]
