"""LaCT's large-chunk fast weights: the op, its parts, its backends, its derivation (README.md)."""

from refine_kernels.lact.edges import lact_finish, lact_prepare
from refine_kernels.lact.layout import Widths
from refine_kernels.lact.op import chunk_lact, lact_apply, lact_scan
from refine_kernels.lact.state import LaCTState, LaCTWeights

__all__ = [
    "LaCTState",
    "LaCTWeights",
    "Widths",
    "chunk_lact",
    "lact_apply",
    "lact_finish",
    "lact_prepare",
    "lact_scan",
]
