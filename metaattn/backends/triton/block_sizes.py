"""Block sizes: rows and keys of a tile, warps, stages of the pipeline, and two choices of how the loop is made.

``block_sizes.json`` holds what ``scripts/tune_block_sizes.py`` found fastest, by compute capability, primitive, arithmetic of the
products and head size; without a band (a causal mask, a window) and with one. What has no times in
``docs/benchmarks/block_sizes.json`` (all of 8.0, and on 9.0 some of tf32 and float32) is not measured yet: those are large
and spill few registers, as ``scripts/compile_kernels.py`` shows. A device without a row of its own has that of the
newest before it; a head size without one that of the next larger. B and S are computed at once (``backward_with_jvp``)
only for the head sizes in the table: the results of larger ones have no room in registers.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import NamedTuple

import torch

from .layout import block

OLDEST = (8, 0)  # compute capability that the kernels are for
Column = dict[int, tuple["Tile", "Tile"]]  # by head size, a power of two: without a band and with one


class Tile(NamedTuple):
    """Rows, keys, warps, stages.

    ``split``: tiles that the band's edge crosses have a loop of their own, so that the others need no comparisons.
    ``hold``: what a program keeps stays in registers, and is not read from shared memory for each product; in 16 bits.
    """

    rows: int
    keys: int
    warps: int
    stages: int
    split: bool = True
    hold: bool = False


# What a device with 99 KiB of shared memory can run; where block_sizes.json has nothing.
_SAFE: dict[str, Column] = {
    "half": {64: (Tile(64, 32, 4, 2),) * 2, 128: (Tile(32, 32, 4, 1),) * 2, 256: (Tile(16, 16, 4, 1),) * 2},
    "tf32": {64: (Tile(32, 16, 4, 1),) * 2, 128: (Tile(16, 16, 4, 1),) * 2, 256: (Tile(16, 16, 8, 1),) * 2},
    "float32": {64: (Tile(32, 16, 4, 1),) * 2, 128: (Tile(16, 16, 4, 1),) * 2, 256: (Tile(16, 16, 4, 1),) * 2},
}

PATH = Path(__file__).with_name("block_sizes.json")


def arithmetic(dtype: torch.dtype) -> str:
    """How products are computed: in ``half`` (16 bits), in ``tf32``, or in ``float32`` by parts of 16 bits."""
    if dtype != torch.float32:
        return "half"
    return "float32" if torch.get_float32_matmul_precision() == "highest" else "tf32"


@functools.cache
def table() -> dict[tuple[int, int], dict[tuple[str, str], Column]]:
    """The measured table: by capability, then by primitive and arithmetic."""
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
def _device(index: int | None) -> dict[tuple[str, str], Column]:
    """The part of the table for a device: by its index, or ``None`` for the interpreter."""
    return for_capability((9, 0) if index is None else torch.cuda.get_device_capability(index))


def for_capability(capability: tuple[int, int]) -> dict[tuple[str, str], Column]:
    """The part of the table for devices of a compute capability."""
    known = [c for c in table() if c <= capability]
    return table()[max(known)] if known else {}


def tile(primitive: str, x: torch.Tensor, head_size: int, rows: int, keys: int, *, banded: bool) -> Tile:
    """The block sizes for a primitive on tensors like ``x``; no larger than the problem."""
    kind = arithmetic(x.dtype)
    column = _device(x.device.index).get((primitive, kind)) or _SAFE[kind]
    best = column[min(size for size in column if size >= head_size)][banded]
    return fit(primitive, best._replace(rows=min(best.rows, block(rows)), keys=min(best.keys, block(keys))))


def known(primitive: str, x: torch.Tensor, head_size: int) -> bool:
    """Whether the table has block sizes for a primitive on tensors like ``x``: some kernels are for few head sizes."""
    return any(size >= head_size for size in _device(x.device.index).get((primitive, arithmetic(x.dtype)), {}))


def fit(primitive: str, t: Tile) -> Tile:
    """No more warps than 16 rows of each product have: with more, Triton (3.6) reads past its operands."""
    kept = t.keys if primitive.endswith("_keys") else t.rows
    return t._replace(warps=min(t.warps, max(4, kept // 16)))


def all_keys(primitive: str, t: Tile, x: torch.Tensor, head_size: int, rows: int) -> Tile:
    """For keys that fit into one block: a loop over few rows, in which every product has those of the rows.

    Measured at 64 tokens of head size 64 on an H100: all rows at once are 18% faster in B, two stages 9% in B with S.
    """
    if t.warps > 4:  # see fit: a block's rows are those of a product here
        t = t._replace(rows=min(t.rows, 32))
    if primitive == "backward" and max(head_size, t.keys) <= 64 and arithmetic(x.dtype) == "half":
        t = t._replace(rows=min(64, block(rows)))
    return t._replace(stages=min(t.stages, 2))
