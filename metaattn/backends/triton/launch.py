"""Launching kernels: on the tensors' device, with the measured block sizes, or smaller ones where these do not fit."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from triton.runtime.errors import OutOfResources

from ..base import Operands, Problem
from .block_sizes import Tile, arithmetic, fit, tile
from .layout import Batch
from .tile_ops import INTERPRETED

# Six products of bfloat16 parts, three of each operand, are as exact as one in float32. Three of tf32 parts would take
# as long, lose a digit and need more registers. Triton's interpreter has neither.
FLOAT32 = "ieee" if INTERPRETED.value else "bf16x6"

# What did not fit, by all that a kernel's size depends on: found when it first happens, not tried again. ``None``:
# nothing smaller is left.
_smaller: dict[tuple[Any, ...], Tile | None] = {}


def constants(problem: Problem, x: Operands) -> dict[str, Any]:
    """The compile-time arguments that all kernels share."""
    d, dv = x.query.shape[-1], x.value.shape[-1]
    return {
        "D": d,
        "DV": dv,
        "FOLD": x.bias is not None or problem.scale <= 0.0,
        "PRECISION": FLOAT32 if arithmetic(x.query.dtype) == "float32" else "tf32",
    }


def tile_for(primitive: str, batch: Batch, problem: Problem) -> Tile:
    """The block sizes of a primitive for these operands."""
    x = batch.x
    head_size = max(x.query.shape[-1], x.value.shape[-1])
    return tile(primitive, x.query, head_size, batch.rows, batch.keys, banded=problem.banded)


def run(
    kernel: Any,
    primitive: str,
    t: Tile,
    batch: Batch,
    programs: Callable[[Tile], int],
    arguments: tuple[Any, ...],
    options: dict[str, Any],
    *,
    whole_rows: bool = False,
    even: bool = True,
) -> bool:
    """Launch a kernel; if its blocks do not fit this device, with fewer stages or smaller blocks.

    ``False`` if the keys of a block must stay as many, and these do not fit.

    Args:
        kernel: The kernel.
        primitive: Its name in the table.
        t: The block sizes to try first.
        batch: The operands.
        programs: How many programs there are with given block sizes.
        arguments: The kernel's arguments.
        options: Its compile-time ones.
        whole_rows: The keys of a block must stay as many.
        even: The kernel has compile-time arguments for its loop: split or not, and whether blocks divide the lengths.
    """
    x = batch.x
    extent = (t, x.query.dtype, x.query.device.index, x.mask is None, x.bias is None, x.seeds is None)
    key = (id(kernel), whole_rows, *extent, *sorted(options.items()))
    smaller = _smaller.get(key, t)
    context = torch.cuda.device(x.query.device) if x.query.is_cuda else contextlib.nullcontext()
    while smaller is not None and (count := programs(smaller)):
        t = smaller
        sizes: dict[str, Any] = {"BM": t.rows, "BN": t.keys, "num_warps": t.warps, "num_stages": t.stages}
        if x.query.dtype == torch.float32 or any(t is not None for t in x[3:]):
            # Told no limit, ptxas may give a large kernel 32 registers, and it a stack of 24 KB. Plain calls in 16 bits
            # have not been seen to need one, and are measured without: with it they take more registers than they must.
            sizes["maxnreg"] = 255
        if even:
            sizes |= {
                "SPLIT": t.split,
                "HOLD": t.hold,
                "EVEN_M": batch.rows % t.rows == 0,
                "EVEN_N": batch.keys % t.keys == 0,
            }
        try:
            with context:
                kernel[(count,)](*arguments, **options, **sizes)
            return True
        except OutOfResources:
            smaller = _shrink(t, whole_rows)
            if smaller is None and not whole_rows:
                raise
            _smaller[key] = smaller = None if smaller is None else fit(primitive, smaller)
    return smaller is not None


def _shrink(t: Tile, whole_rows: bool) -> Tile | None:
    """The next smaller block sizes, or ``None``."""
    if t.stages > 1:
        return t._replace(stages=t.stages - 1)
    if t.keys > 16 and t.keys >= t.rows and not whole_rows:
        return t._replace(keys=t.keys // 2)
    if t.rows > 16:
        return t._replace(rows=t.rows // 2)
    return t._replace(keys=t.keys // 2) if t.keys > 16 and not whole_rows else None
