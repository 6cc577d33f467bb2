"""Block sizes of the kernels: rows and keys of a tile, warps, pipeline stages, and two options of the loop.

``block_sizes.json`` holds the fastest sizes that ``scripts/tune_block_sizes.py`` found, by compute capability,
primitive, arithmetic of the products and head size; one without a band and one with a band (a causal mask, a window).
Entries that have no times in ``docs/benchmarks/block_sizes.json`` (all of 8.0; on 9.0 some of tf32 and float32) are not
measured yet. They are large and spill few registers, as ``scripts/compile_kernels.py`` shows.

A device whose capability is not in the table uses that of the newest capability before it. A head size that is not in
the table uses the next larger one. ``backward_with_jvp`` has one kernel only for the head sizes in the table: for
larger ones its results do not fit into registers.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import NamedTuple

import torch

from ..base import Operands
from .layout import power_of_two

MIN_CAPABILITY = (8, 0)  # compute capability that the kernels need
Column = dict[int, tuple["Tile", "Tile"]]  # by head size, a power of two: without a band and with one


# Blocks whose rows are at least 128 bytes long have the same layout in shared memory.
_SAME_LAYOUT = {"half": 64, "tf32": 32}  # elements of such a row


class Tile(NamedTuple):
    """Block sizes of one kernel.

    Attributes:
        rows: Rows of a tile.
        keys: Keys of a tile.
        warps: Warps of a program.
        stages: Stages of the pipeline that loads tiles.
        split: Tiles that the edge of the band crosses have a separate loop, so that the others need no comparisons.
        keep_in_registers: What a program loads once stays in registers and is not read from shared memory for each
            product. Only for 16-bit dtypes.
    """

    rows: int
    keys: int
    warps: int
    stages: int
    split: bool = True
    keep_in_registers: bool = False


# Sizes that a device with 99 KiB of shared memory can run, for what block_sizes.json does not have.
_SAFE: dict[str, Column] = {
    "half": {64: (Tile(64, 32, 4, 2),) * 2, 128: (Tile(32, 32, 4, 1),) * 2, 256: (Tile(16, 16, 4, 1),) * 2},
    "tf32": {64: (Tile(32, 16, 4, 1),) * 2, 128: (Tile(16, 16, 4, 1),) * 2, 256: (Tile(16, 16, 8, 1),) * 2},
    "float32": {64: (Tile(32, 16, 4, 1),) * 2, 128: (Tile(16, 16, 4, 1),) * 2, 256: (Tile(16, 16, 4, 1),) * 2},
}

PATH = Path(__file__).with_name("block_sizes.json")


def arithmetic(dtype: torch.dtype) -> str:
    """Return how products are computed: ``half`` (16 bits), ``tf32``, or ``float32`` (as sums of 16-bit products)."""
    if dtype != torch.float32:
        return "half"
    return "float32" if torch.get_float32_matmul_precision() == "highest" else "tf32"


@functools.cache
def table() -> dict[tuple[int, int], dict[tuple[str, str], Column]]:
    """Return the measured table: by capability, then by primitive and arithmetic."""
    content = json.loads(PATH.read_text())
    return {
        (int(capability.split(".")[0]), int(capability.split(".")[1])): {
            (primitive, kind): {int(size): (Tile(*full), Tile(*banded)) for size, (full, banded) in column.items()}
            for primitive, by_arithmetic in primitives.items()
            for kind, column in by_arithmetic.items()
        }
        for capability, primitives in content.items()
    }


@functools.cache
def _for_device(index: int | None) -> dict[tuple[str, str], Column]:
    """Return the part of the table for the device of an index; for the interpreter, ``None``, that of an H100."""
    return for_capability((9, 0) if index is None else torch.cuda.get_device_capability(index))


def for_capability(capability: tuple[int, int]) -> dict[tuple[str, str], Column]:
    """Return the part of the table for devices of a compute capability."""
    measured = [c for c in table() if c <= capability]
    return table()[max(measured)] if measured else {}


def tile(primitive: str, x: torch.Tensor, head_size: int, rows: int, keys: int, *, banded: bool) -> Tile:
    """Return the block sizes for a primitive on tensors like ``x``, no larger than the problem."""
    kind = arithmetic(x.dtype)
    column = _for_device(x.device.index).get((primitive, kind)) or _SAFE[kind]
    best = column[min(size for size in column if size >= head_size)][banded]
    no_larger = best._replace(rows=min(best.rows, power_of_two(rows)), keys=min(best.keys, power_of_two(keys)))
    return fit(primitive, no_larger, kind)


def has_block_sizes(primitive: str, x: torch.Tensor, head_size: int) -> bool:
    """Return whether the table has sizes for a primitive on tensors like ``x``; some kernels support few head sizes."""
    column = _for_device(x.device.index).get((primitive, arithmetic(x.dtype)), {})
    return any(size >= head_size for size in column)


def fit(primitive: str, t: Tile, kind: str) -> Tile:
    """Return sizes that avoid two faults of compilers (docs/benchmarks/compiler_faults.md).

    There is at most one warp for 16 rows of each product: with more, Triton 3.6 reads past its operands. And in tf32 a
    product of a warp group, which needs 64 rows, takes transposed blocks, so that a side of a tile is the length of
    their rows. If it is short, such blocks have another layout than the rest (see :func:`least_columns`). Then products
    have 32 rows, with which they are not those of a warp group.
    """
    of_keys = primitive.endswith("_keys")
    product_rows = t.keys if of_keys else t.rows
    if kind == "tf32" and min(t.rows, t.keys) < _SAME_LAYOUT[kind] and product_rows >= 64:
        product_rows = 32
        t = t._replace(keys=product_rows) if of_keys else t._replace(rows=product_rows)
    return t._replace(warps=min(t.warps, max(4, product_rows // 16)))


def least_columns(x: Operands) -> int:
    """Return the number of columns that query and value are padded to at least.

    The layout of a block in shared memory depends on the length of its rows, up to 128 bytes. If Triton puts blocks of
    two layouts at one address, one after the other, the assembler of CUDA 12.8 takes the address of the second from an
    unrelated register (docs/benchmarks/compiler_faults.md). Two head sizes are therefore padded until their layouts are
    the same; in tf32 also one head size, because the sides of tiles are lengths of rows as well. In float32, which is
    split into numbers of 16 bits, they are padded to one size: no GPU has tried less.
    """
    kind = arithmetic(x.query.dtype)
    if kind == "tf32":
        return _SAME_LAYOUT[kind]
    largest = power_of_two(max(x.query.shape[-1], x.value.shape[-1]))
    return min(_SAME_LAYOUT.get(kind, largest), largest)


def single_key_block(primitive: str, t: Tile, x: torch.Tensor, head_size: int, rows: int) -> Tile:
    """Return the sizes for keys that fit into one block: a loop over few rows, which are the rows of every product.

    Measured at 64 tokens of head size 64 on an H100: all rows at once are 18% faster in B, two stages are 9% faster in
    B with S.
    """
    if t.warps > 4:  # as in fit: here the rows of a block are the rows of a product
        t = t._replace(rows=min(t.rows, 32))
    if primitive == "backward" and max(head_size, t.keys) <= 64 and arithmetic(x.dtype) == "half":
        t = t._replace(rows=min(64, power_of_two(rows)))
    return t._replace(stages=min(t.stages, 2))
