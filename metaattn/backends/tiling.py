"""The score matrix in tiles: how a problem is cut, the scores of one tile as jets, and results put together.

A batch of problems is flattened to ``[L, ·, ·]``, query heads that share a key head to rows of one problem:
a tile is ``[L, G * rows, cols]``, every product one batched matrix product, and a sum over the rows of a
tile is over the group as well.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from . import taylor as jets
from .base import Operands, Problem, Tangent, accumulator
from .masking import barrier, dropout_weight, split_heads, tile_is_empty, tile_of
from .taylor import Jet

# Rows and columns of a tile, and the elements of all heads worked on at once. Best of 128 to 512, 256 to
# 1024 and 2^16 to 2^20 for the sum of all rules, causal and full, at 1024 and 4096 tokens (two cores of a
# Xeon, torch 2.13, `scripts/bench_cpu.py`): the tile of one tensor is 2 MiB, about a core's L2 cache.
ROWS, COLS = 256, 256
TILE = 2**19

Batch = tuple[slice, ...]  # over the dimensions [*B, Hkv]


def _blocks(n: int, size: int) -> list[slice]:
    """Slices of at most ``size`` that cover ``range(n)``."""
    return [slice(i, min(i + size, n)) for i in range(0, n, size)]


def _batches(x: Operands) -> Iterator[Batch]:
    """Slices over the batch and key-head dimensions, each with at most TILE elements of a tile."""
    lead, group = x.key.shape[:-2], x.query.shape[-3] // max(1, x.key.shape[-3])
    tile = group * min(x.query.shape[-2], ROWS) * min(x.key.shape[-2], COLS)
    most = max(1, TILE // max(1, tile))
    steps = []
    for size in reversed(lead):
        steps.append(max(1, min(size, most)))
        most = max(1, most // steps[-1])
    return itertools.product(*map(_blocks, lead, reversed(steps)))


def _take(t: Tensor, batch: Batch) -> Tensor:
    """The part of ``t`` that belongs to ``batch``; broadcast dimensions whole."""
    if all(b.start == 0 and b.stop >= n for n, b in zip(t.shape, batch, strict=False)):
        return t
    return t[tuple(slice(None) if n == 1 else b for n, b in zip(t.shape, batch, strict=False))]


class Part:
    """One batch of the operands, with their tangents, as jets over tiles.

    ``full`` is the set of all tangents; ``rows`` the blocks of rows.
    """

    def __init__(self, problem: Problem, x: Operands, batch: Batch, tangents: Sequence[Tangent] = ()) -> None:
        self.problem, self.batch = problem, batch
        self.dtype = accumulator(x.query.dtype)
        self.full = (1 << len(tangents)) - 1
        self.kv_heads, self.keys = x.key.shape[-3:-1]
        self.lead = tuple(b.stop - b.start for b in batch)
        self.group = x.query.shape[-3] // self.kv_heads
        self.rows = _blocks(x.query.shape[-2], ROWS)
        self.query = self.by_row(jets.jet(x.query, [t.query for t in tangents]))
        self.key = self._by_key(jets.jet(x.key, [t.key for t in tangents]))
        self.value = self._by_key(jets.jet(x.value, [t.value for t in tangents]))
        self.bias = {s: self._broadcast(b) for s, b in jets.jet(x.bias, [t.bias for t in tangents]).items()}
        self.mask = None if x.mask is None else self._broadcast(x.mask)
        self.seeds = None if x.seeds is None else self._broadcast(x.seeds)

    def by_row(self, x: Jet) -> Jet:
        """What belongs to query heads and rows: ``[*B, Hq, N, ·]`` to ``[L, G, N, ·]``."""
        n = math.prod(self.lead)
        return {s: self._broadcast(t).reshape(n, self.group, *t.shape[-2:]) for s, t in x.items()}

    def _by_key(self, x: Jet) -> Jet:
        """``[*B, Hkv, N, ·]`` to ``[L, N, ·]``."""
        n = math.prod(self.lead)
        return {s: _take(t, self.batch).reshape(n, *t.shape[-2:]) for s, t in x.items()}

    def _broadcast(self, t: Tensor) -> Tensor:
        """``[*B, Hq, N, ·]`` to ``[*lead, G, N, ·]``, where what is broadcast stays so."""
        return _take(split_heads(t, self.kv_heads), self.batch)

    def row_block(self, x: Jet, rows: slice) -> Jet:
        """Rows of a jet ``[L, G, N, ·]`` as ``[L, G * rows, ·]``, in the accumulator's dtype."""
        return {s: t[:, :, rows].flatten(1, 2).to(self.dtype) for s, t in x.items()}

    def scaled_query(self, rows: slice) -> Jet:
        """The queries of ``rows``, times the scale."""
        return {s: t * self.problem.scale for s, t in self.row_block(self.query, rows).items()}

    def key_block(self, x: Jet, cols: slice) -> Jet:
        """Keys or values ``cols`` of a jet, in the accumulator's dtype."""
        return {s: t[:, cols].to(self.dtype) for s, t in x.items()}

    def cols(self, rows: slice) -> Iterator[slice]:
        """The blocks of columns that the band does not hide from all of ``rows``."""
        every = _blocks(self.keys, COLS)
        return (cols for cols in every if not tile_is_empty(self.problem, rows, cols))

    def heads(self, tile: Tensor) -> Tensor:
        """A tile ``[L, G * rows, cols]`` seen as ``[*lead, G, rows, cols]``."""
        return tile.view(*self.lead, self.group, tile.shape[-2] // self.group, tile.shape[-1])

    def scores(self, query: Jet, key: Jet, rows: slice, cols: slice) -> Jet:
        """The scores of a tile from its scaled queries and its keys, -inf where hidden: the caller's own tensors."""
        s = jets.product(row_key, query, key, self.full)
        for i, b in self.bias.items():
            if i not in s:
                s[i] = torch.zeros_like(s[0])
            self.heads(s[i]).add_(tile_of(b, rows, cols))
        if (wall := barrier(self.problem, self.mask, rows, cols, s[0])) is not None:
            self.heads(s[0]).add_(wall)
        return s

    def dropout(self, rows: slice, cols: slice) -> Tensor | None:
        """The dropout weights of a tile."""
        z = dropout_weight(self.problem, self.seeds, rows, cols, self.dtype)
        return None if z is None else z.flatten(0, -4).flatten(1, 2)


def parts(problem: Problem, x: Operands, tangents: Sequence[Tangent] = ()) -> Iterable[Part]:
    """The operands in batches of as many heads as a tile has room for."""
    return (Part(problem, x, batch, tangents) for batch in _batches(x))


def weighted(p: Jet, z: Tensor | None) -> Jet:
    """A jet times the dropout weights, if there are any."""
    return p if z is None else {s: t * z for s, t in p.items()}


def row_key(a: Tensor, b: Tensor) -> Tensor:
    """``a b^T``: from rows ``[L, n, d]`` and keys ``[L, m, d]`` to a tile ``[L, n, m]``."""
    return torch.bmm(a, b.mT)


def key_sum(p: Tensor, a: Tensor) -> Tensor:
    """``p^T a``: from a tile and rows to keys."""
    return torch.bmm(p.mT, a)


class Whole:
    """A result that tiles add to; zero where none does.

    Args:
        shape: Of the result.
        like: A tensor of its device.
        dtype: Its dtype.
    """

    def __init__(self, shape: Sequence[int], like: Tensor, dtype: torch.dtype) -> None:
        self.shape, self.like, self.dtype = tuple(shape), like, dtype
        self.sum: Tensor | None = None

    def add(self, at: tuple[slice, ...], tile: Tensor) -> None:
        """Add a tile at ``at``; the first, if it is all there is, becomes the result without a copy."""
        if self.sum is None and tile.shape == self.shape:
            self.sum = tile
            return
        if self.sum is None:
            self.sum = self.like.new_zeros(self.shape, dtype=self.dtype)
        self.sum[tuple(slice(None) if n == 1 else i for n, i in zip(self.shape, at, strict=True))] += tile

    def result(self) -> Tensor:
        """What was added up."""
        return self.like.new_zeros(self.shape, dtype=self.dtype) if self.sum is None else self.sum


class ByRow(Whole):
    """A result ``[*B, Hq, N, size]``."""

    def __init__(self, x: Operands, size: int, dtype: torch.dtype) -> None:
        kv_heads = x.key.shape[-3]
        heads = (kv_heads, x.query.shape[-3] // max(1, kv_heads))
        super().__init__((*x.query.shape[:-3], *heads, x.query.shape[-2], size), x.query, dtype)

    def add_rows(self, part: Part, rows: slice, tile: Tensor) -> None:
        """Add ``[L, G * rows, size]``."""
        self.add((*part.batch, slice(None), rows, slice(None)), part.heads(tile))

    def result(self) -> Tensor:
        """What was added up, its heads together again."""
        return super().result().flatten(-4, -3)


class ByKey(Whole):
    """A result ``[*B, Hkv, N, size]``."""

    def add_keys(self, part: Part, cols: slice, tile: Tensor) -> None:
        """Add ``[L, cols, size]``."""
        self.add((*part.batch, cols, slice(None)), tile.view(*part.lead, *tile.shape[-2:]))


class ByScore(Whole):
    """A result in the shape of a bias, summed over what the bias broadcasts."""

    def __init__(self, x: Operands, dtype: torch.dtype) -> None:
        assert x.bias is not None
        self.bias = x.bias
        super().__init__(split_heads(x.bias, x.key.shape[-3]).shape, x.query, dtype)

    def add_scores(self, part: Part, rows: slice, cols: slice, tile: Tensor) -> None:
        """Add a tile ``[L, G * rows, cols]``."""
        tile = part.heads(tile)
        kept = [1 if n == 1 else m for n, m in zip(self.shape, tile.shape, strict=True)]
        self.add((*part.batch, slice(None), rows, cols), tile.sum_to_size(kept))

    def result(self) -> Tensor:
        """What was added up, in the bias's own shape."""
        return super().result().reshape(self.bias.shape)
