"""Kernel launches: on the tensors' device, with the measured block sizes, or with smaller ones if these do not fit."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from triton.runtime.errors import OutOfResources

from ..base import Operands, Problem
from .block_sizes import Tile, arithmetic, fit, tile
from .layout import BatchLayout
from .tile_ops import INTERPRETED

# Each operand is split into three bfloat16 numbers, and six products of these are as exact as one in float32. Three
# products of tf32 numbers would take as long, lose a digit and need more registers. Triton's interpreter has neither.
FLOAT32 = "ieee" if INTERPRETED.value else "bf16x6"

# Smaller block sizes by all that the resources of a kernel depend on, for launches that did not fit the device. The
# first launch finds them. ``None``: no block sizes fit.
_smaller: dict[tuple[Any, ...], Tile | None] = {}


def constexpr_arguments(problem: Problem, x: Operands) -> dict[str, Any]:
    """Return the compile-time arguments that all kernels share."""
    d, dv = x.query.shape[-1], x.value.shape[-1]
    return {
        "D": d,
        "DV": dv,
        "FOLD_SCALE": x.bias is not None or problem.scale <= 0.0,
        "PRECISION": FLOAT32 if arithmetic(x.query.dtype) == "float32" else "tf32",
    }


def tile_for(primitive: str, layout: BatchLayout, problem: Problem) -> Tile:
    """Return the block sizes of a primitive for these operands."""
    x = layout.x
    head_size = max(x.query.shape[-1], x.value.shape[-1])
    return tile(primitive, x.query, head_size, layout.rows, layout.keys, banded=problem.banded)


def launch_kernel(
    kernel: Any,
    primitive: str,
    t: Tile,
    layout: BatchLayout,
    programs: Callable[[Tile], int],
    arguments: tuple[Any, ...],
    options: dict[str, Any],
    *,
    fixed_keys: bool = False,
    has_segments: bool = True,
) -> bool:
    """Launch a kernel; if its blocks do not fit the device, with fewer stages or smaller blocks.

    Args:
        kernel: The kernel.
        primitive: Its name in the table of block sizes.
        t: The block sizes to try first.
        layout: The operands.
        programs: Number of programs as a function of the block sizes.
        arguments: The kernel's arguments.
        options: Its compile-time arguments.
        fixed_keys: Whether the number of keys in a block must not shrink.
        has_segments: Whether the kernel has the compile-time arguments of a loop in segments: SPLIT, KEEP_IN_REGISTERS,
            EVEN_M and EVEN_N.

    Returns:
        False if ``fixed_keys`` and no block sizes fit. Then nothing was launched.

    Raises:
        OutOfResources: No block sizes fit, and not ``fixed_keys``.
    """
    x = layout.x
    extent = (t, x.query.dtype, x.query.device.index, x.mask is None, x.bias is None, x.seeds is None)
    key = (id(kernel), fixed_keys, *extent, *sorted(options.items()))
    smaller = _smaller.get(key, t)
    context = torch.cuda.device(x.query.device) if x.query.is_cuda else contextlib.nullcontext()
    while smaller is not None and (count := programs(smaller)):
        t = smaller
        sizes: dict[str, Any] = {"BM": t.rows, "BN": t.keys, "num_warps": t.warps, "num_stages": t.stages}
        if x.query.dtype == torch.float32 or any(t is not None for t in x[3:]):
            # Without a limit ptxas may give a large kernel 32 registers, and a stack of 24 KB. This has not been seen
            # for plain 16-bit calls, whose block sizes are measured without a limit: with one they use more registers.
            sizes["maxnreg"] = 255
        if has_segments:
            sizes |= {
                "SPLIT": t.split,
                "KEEP_IN_REGISTERS": t.keep_in_registers,
                "EVEN_M": layout.rows % t.rows == 0,
                "EVEN_N": layout.keys % t.keys == 0,
            }
        try:
            with context:
                kernel[(count,)](*arguments, **options, **sizes)
            return True
        except OutOfResources:
            smaller = _shrink(t, fixed_keys)
            if smaller is None and not fixed_keys:
                raise
            if smaller is not None:
                fitting = fit(primitive, smaller, arithmetic(x.query.dtype))
                smaller = None if fixed_keys and fitting.keys < smaller.keys else fitting
            _smaller[key] = smaller
    return smaller is not None


def _shrink(t: Tile, fixed_keys: bool) -> Tile | None:
    """Return the next smaller block sizes; ``None`` if there are none."""
    if t.stages > 1:
        return t._replace(stages=t.stages - 1)
    if t.keys > 16 and t.keys >= t.rows and not fixed_keys:
        return t._replace(keys=t.keys // 2)
    if t.rows > 16:
        return t._replace(rows=t.rows // 2)
    return t._replace(keys=t.keys // 2) if t.keys > 16 and not fixed_keys else None
