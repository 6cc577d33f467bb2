"""Launches of the kernel of ``matmul_jvp_kernel.py``: the products that it supports, and its block sizes."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.runtime.errors import OutOfResources

from ..matmul_jvp import Product
from .block_sizes import MIN_CAPABILITY, arithmetic
from .layout import power_of_two
from .matmul_jvp_kernel import matmul_jvp


class Matrix(NamedTuple):
    """A batch of matrices by its strides; ``None`` is a stride of 1."""

    ptr: Tensor | None = None
    batch: int | None = None
    row: int | None = None
    col: int | None = None


class Job(NamedTuple):
    """One product in the form that the kernel takes: factors, results (``None`` if not requested) and sizes."""

    a: Matrix = Matrix()
    b: Matrix = Matrix()
    a_t: Matrix = Matrix()
    b_t: Matrix = Matrix()
    value: Tensor | None = None
    tangent: Tensor | None = None
    M: int = 0
    N: int = 0
    K: int = 0


class Blocks(NamedTuple):
    """Rows, columns and inner size of a block; warps and pipeline stages."""

    rows: int
    cols: int
    inner: int
    warps: int
    stages: int


# Found by scripts/tune_matmul_jvp.py on an H100. ONE: one product with a tangent. SEVERAL: two products, or one without
# a tangent. LARGE: products that fill the GPU several times.
ONE, SEVERAL, LARGE = Blocks(64, 64, 32, 4, 3), Blocks(64, 128, 32, 4, 4), Blocks(128, 128, 64, 8, 3)
# For tf32, found on an H200, for small and large products. With two warps the compiler uses the older tensor-core
# instructions, which read factors in any layout. Hopper's need both factors contiguous along the sum. Those of a
# layer's gradients are not, and transposing them for these instructions took three times as long.
ONE_TF32, SEVERAL_TF32 = Blocks(64, 128, 32, 4, 3), Blocks(64, 64, 32, 2, 3)
LARGE_FROM = 1024  # blocks of 64 x 128
_stages: dict[tuple[Any, ...], int] = {}  # the largest number that fits, for launches whose first choice did not fit


def matmul_supported(like: Tensor) -> bool:
    """Return whether the kernel supports factors like this one.

    It supports 16-bit dtypes, and float32 if PyTorch may use tf32, on GPUs of compute capability 8.0 and newer.
    """
    half = like.dtype in (torch.float16, torch.bfloat16)
    tf32 = like.dtype == torch.float32 and arithmetic(like.dtype) == "tf32"
    return (half or tf32) and torch.cuda.get_device_capability(like.device) >= MIN_CAPABILITY


def _fits(job: Product) -> bool:
    """Return whether no matrix is empty, or too large for 32-bit offsets."""
    (batch, m, k), n = job.a.shape, job.b.shape[2]
    factors = [t for t in job[:4] if t is not None]
    far = [sum((size - 1) * step for size, step in zip(t.shape[1:], t.stride()[1:], strict=True)) for t in factors]
    return min(batch, m, n, k) > 0 and max(m * n, *far) < 2**31


def _blocks_for(jobs: Sequence[Product]) -> Blocks:
    several = len(jobs) > 1 or jobs[0].a_t is None
    if jobs[0].a.dtype == torch.float32:
        return SEVERAL_TF32 if several else ONE_TF32
    if sum(job.a.shape[0] * -(-job.a.shape[1] // 64) * -(-job.b.shape[2] // 128) for job in jobs) >= LARGE_FROM:
        return LARGE
    return SEVERAL if several else ONE


def multiply(jobs: Sequence[Product], blocks: Blocks | None = None) -> list[Tensor] | None:
    """Compute one or two products, as :func:`metaattn.backends.matmul_jvp.multiply` does.

    Returns:
        The results; ``None`` if no block sizes fit the device, or the offsets do not fit into 32 bits.
    """
    if not all(map(_fits, jobs)):
        return None
    x, tile = jobs[0].a, blocks or _blocks_for(jobs)
    results: list[Tensor] = []
    arguments: list[Job] = []
    options: dict[str, Any] = {}
    counts: list[int] = []
    for job, end in zip(jobs, ("", "2")[: len(jobs)], strict=True):
        (batch, m, k), n = job.a.shape, job.b.shape[2]
        value = x.new_empty(batch, m, n) if job.value else None
        tangent = None if job.a_t is None else x.new_empty(batch, m, n)
        results += [t for t in (value, tangent) if t is not None]
        a, b, a_t, b_t = map(_matrix, job[:4])
        arguments.append(Job(a, b, a_t, b_t, value, tangent, m, n, k))
        bm, bn, bk = (
            min(tile.rows, power_of_two(m)),
            min(tile.cols, power_of_two(n)),
            min(tile.inner, power_of_two(k)),
        )
        counts.append(batch * triton.cdiv(m, bm) * triton.cdiv(n, bn))
        sizes = {"BM": bm, "BN": bn, "BK": bk, "EVEN_M": m % bm == 0, "EVEN_N": n % bn == 0, "EVEN_K": k % bk == 0}
        options |= {name + end: size for name, size in sizes.items()}
    if len(jobs) == 1:
        arguments.append(Job())
        options |= {name + "2": size for name, size in options.items()}
    options["PRECISION"] = "tf32" if arithmetic(x.dtype) != "float32" else "ieee"
    if x.dtype == torch.float32:
        options["maxnreg"] = 255  # for the reason in launch.launch_kernel
    # No more warps than one for 16 rows of a block, for the reason in block_sizes.fit.
    rows = min(options[name] for name in ("BM", "BM2"))
    warps = min(tile.warps, max(4, rows // 16))
    requested = [t is not None for job in arguments for t in (job.value, job.tangent)]
    key = (x.device.index, x.dtype, warps, *options.values(), *requested)
    stages = min(tile.stages, _stages.get(key, tile.stages))
    with torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext():
        while stages:
            try:
                matmul_jvp[(sum(counts),)](*arguments, counts[0], **options, num_warps=warps, num_stages=stages)
                return results
            except OutOfResources:
                _stages[key] = stages = stages - 1
    return None


def _matrix(t: Tensor | None) -> Matrix:
    return Matrix() if t is None else Matrix(t, *(None if step == 1 else step for step in t.stride()))
