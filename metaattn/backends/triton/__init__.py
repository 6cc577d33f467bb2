"""Fused kernels for all four primitives, and for F and T, B and S at once, in Triton.

Runs on CUDA devices; on a CPU only in Triton's interpreter (``TRITON_INTERPRET=1``), for tests. The kernels
know no autograd, and nothing above this package knows Triton.
"""

from .interface import backward, backward_jvp, backward_with_jvp, forward, forward_jvp, forward_with_jvp, fuses, refuses
from .matmul_jvp import multiplies, multiply

name = "triton"

__all__ = [
    "backward",
    "backward_jvp",
    "backward_with_jvp",
    "forward",
    "forward_jvp",
    "forward_with_jvp",
    "fuses",
    "multiplies",
    "multiply",
    "refuses",
]
