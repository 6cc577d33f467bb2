"""Fused kernels in Triton: the backend ``triton``, and batched matrix products with tangents.

Purpose: compute all six primitives, and :func:`multiply`, on CUDA devices. On a CPU the kernels run only in Triton's
interpreter (``TRITON_INTERPRET=1``), for tests.

Entry point: ``backend``, an instance of :class:`TritonBackend` (``interface.py``).

Mechanism: ``interface.py`` brings operands into the kernels' form with ``layout.py``, takes block sizes from
``block_sizes.py`` and launches through ``launch.py``. ``flash_fwd.py`` is the kernel of F and T, ``flash_bwd.py`` and
``flash_bwd_bias.py`` those of B and S; ``tile_ops.py`` has what they share. ``matmul_jvp.py`` launches
``matmul_jvp_kernel.py``.

Only :mod:`metaattn.backends` may import this package, and it does so on first use: Triton may be missing. No other
package knows Triton, and the kernels know no autograd.
"""

from .interface import TritonBackend, backend
from .matmul_jvp import matmul_supported, multiply

__all__ = ["TritonBackend", "backend", "matmul_supported", "multiply"]
