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

from .layout import power_of_two

MIN_CAPABILITY = (8, 0)  # compute capability that the kernels need
Column = dict[int, tuple["Tile", "Tile"]]  # by head size, a power of two: without a band and with one


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
    return limit_warps(primitive, no_larger)


def has_block_sizes(primitive: str, x: torch.Tensor, head_size: int) -> bool:
    """Return whether the table has sizes for a primitive on tensors like ``x``; some kernels support few head sizes."""
    column = _for_device(x.device.index).get((primitive, arithmetic(x.dtype)), {})
    return any(size >= head_size for size in column)


def limit_warps(primitive: str, t: Tile) -> Tile:
    """Limit the warps to one for 16 rows of each product: with more, Triton 3.6 reads past its operands."""
    product_rows = t.keys if primitive.endswith("_keys") else t.rows
    return t._replace(warps=min(t.warps, max(4, product_rows // 16)))


def single_key_block(primitive: str, t: Tile, x: torch.Tensor, head_size: int, rows: int) -> Tile:
    """Return the sizes for keys that fit into one block: a loop over few rows, which are the rows of every product.

    Measured at 64 tokens of head size 64 on an H100: all rows at once are 18% faster in B, two stages are 9% faster in
    B with S.
    """
    if t.warps > 4:  # as in limit_warps: here the rows of a block are the rows of a product
        t = t._replace(rows=min(t.rows, 32))
    if primitive == "backward" and max(head_size, t.keys) <= 64 and arithmetic(x.dtype) == "half":
        t = t._replace(rows=min(64, power_of_two(rows)))
    return t._replace(stages=min(t.stages, 2))
