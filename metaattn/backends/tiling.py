"""Tiles of the score matrix in plain PyTorch: division of a call, the scores of one tile, and results put together.

A batch of attention problems is flattened to ``[L, ·, ·]``, and the query heads that share a key head become rows of
one problem. A tile is then ``[L, G * rows, cols]``, every product is one batched matrix product, and a sum over the
rows of a tile includes the sum over the group. All quantities are Taylor series (:mod:`metaattn.backends.taylor`), so
that one implementation gives every order of derivative.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from . import taylor
from .base import Operands, Problem, Tangent, accumulator
from .masking import (
    NEG_INF,
    additive_mask,
    dropout_weight,
    may_hide,
    product_of_shown,
    split_heads,
    tile_is_empty,
    tile_of,
    zero_products_are_zero,
)
from .taylor import TaylorSeries

# Rows and columns of a tile, and the number of its elements in all heads that are processed at once. Best of 128 to
# 512, 256 to 1024 and 2^16 to 2^20 for the sum of all rules, causal and full, at 1024 and 4096 tokens (two cores of a
# Xeon, torch 2.13, `scripts/bench_cpu.py`). The tile of one tensor is 2 MiB, about the L2 cache of a core.
ROWS, COLS = 256, 256
TILE = 2**19

BatchSlices = tuple[slice, ...]  # over the dimensions [*B, Hkv]
Product = Callable[[Tensor, Tensor], Tensor]


def _blocks(n: int, size: int) -> list[slice]:
    """Return slices of at most ``size`` that cover ``range(n)``."""
    return [slice(i, min(i + size, n)) for i in range(0, n, size)]


def _slices_of_batch(x: Operands) -> Iterator[BatchSlices]:
    """Yield slices over the batch and key-head dimensions, each with at most TILE elements of a tile."""
    lead, group = x.key.shape[:-2], x.query.shape[-3] // max(1, x.key.shape[-3])
    tile = group * min(x.query.shape[-2], ROWS) * min(x.key.shape[-2], COLS)
    max_heads = max(1, TILE // max(1, tile))
    steps = []
    for size in reversed(lead):
        steps.append(max(1, min(size, max_heads)))
        max_heads = max(1, max_heads // steps[-1])
    return itertools.product(*map(_blocks, lead, reversed(steps)))


def _take(t: Tensor, batch: BatchSlices) -> Tensor:
    """Return the slice of ``t`` that belongs to ``batch``; dimensions of size 1 are kept whole."""
    if all(b.start == 0 and b.stop >= n for n, b in zip(t.shape, batch, strict=False)):
        return t
    return t[tuple(slice(None) if n == 1 else b for n, b in zip(t.shape, batch, strict=False))]


class TiledOperands:
    """One slice of the batch: operands with their tangents as Taylor series, read tile by tile.

    Args:
        problem: The static part of the call.
        x: The operands.
        batch: The slice of the batch and key-head dimensions.
        tangents: Tangents of the operands.
        careful: Products must leave out what is hidden, because numbers of the call may be NaN or infinite.

    Attributes:
        full: The set of all tangents.
        rows: The blocks of rows.
    """

    def __init__(
        self, problem: Problem, x: Operands, batch: BatchSlices, tangents: Sequence[Tangent], careful: bool
    ) -> None:
        self.problem, self.batch, self.careful = problem, batch, careful
        self.dtype = accumulator(x.query.dtype)
        self.full = (1 << len(tangents)) - 1
        self.kv_heads, self.keys = x.key.shape[-3:-1]
        self.lead = tuple(b.stop - b.start for b in batch)
        self.group = x.query.shape[-3] // self.kv_heads
        self.rows = _blocks(x.query.shape[-2], ROWS)
        self.query = self.by_row(taylor.series(x.query, [t.query for t in tangents]))
        self.key = self._by_key(taylor.series(x.key, [t.key for t in tangents]))
        self.value = self._by_key(taylor.series(x.value, [t.value for t in tangents]))
        self.bias = {s: self._take(b) for s, b in taylor.series(x.bias, [t.bias for t in tangents]).items()}
        self.mask = None if x.mask is None else self._take(x.mask)
        self.seeds = None if x.seeds is None else self._take(x.seeds)

    def by_row(self, x: TaylorSeries) -> TaylorSeries:
        """Reshape a quantity of query heads and rows from ``[*B, Hq, N, ·]`` to ``[L, G, N, ·]``."""
        n = math.prod(self.lead)
        return {s: self._take(t).reshape(n, self.group, *t.shape[-2:]) for s, t in x.items()}

    def _by_key(self, x: TaylorSeries) -> TaylorSeries:
        """Reshape ``[*B, Hkv, N, ·]`` to ``[L, N, ·]``."""
        n = math.prod(self.lead)
        return {s: _take(t, self.batch).reshape(n, *t.shape[-2:]) for s, t in x.items()}

    def _take(self, t: Tensor) -> Tensor:
        """Reshape ``[*B, Hq, N, ·]`` to ``[*lead, G, N, ·]``; broadcast dimensions stay broadcast."""
        return _take(split_heads(t, self.kv_heads), self.batch)

    def row_block(self, x: TaylorSeries, rows: slice) -> TaylorSeries:
        """Return rows of a series ``[L, G, N, ·]`` as ``[L, G * rows, ·]``, in the accumulator's dtype."""
        return {s: t[:, :, rows].flatten(1, 2).to(self.dtype) for s, t in x.items()}

    def scaled_query(self, rows: slice) -> TaylorSeries:
        """Return the queries of ``rows``, times the scale."""
        return {s: t * self.problem.scale for s, t in self.row_block(self.query, rows).items()}

    def key_block(self, x: TaylorSeries, cols: slice) -> TaylorSeries:
        """Return the keys or values ``cols`` of a series, in the accumulator's dtype."""
        return {s: t[:, cols].to(self.dtype) for s, t in x.items()}

    def cols(self, rows: slice) -> Iterator[slice]:
        """Yield the blocks of columns of which the band shows at least one element to ``rows``."""
        every = _blocks(self.keys, COLS)
        return (cols for cols in every if not tile_is_empty(self.problem, rows, cols))

    def heads(self, tile: Tensor) -> Tensor:
        """View a tile ``[L, G * rows, cols]`` as ``[*lead, G, rows, cols]``."""
        return tile.view(*self.lead, self.group, tile.shape[-2] // self.group, tile.shape[-1])

    def scores(
        self, query: TaylorSeries, key: TaylorSeries, rows: slice, cols: slice
    ) -> tuple[TaylorSeries, Tensor | None]:
        """Return the scores of a tile from its scaled queries and its keys, -inf where hidden, as new tensors.

        Returns:
            The scores, and which are hidden; ``None`` if products need no care for those.
        """
        s = taylor.product(row_key, query, key, self.full)
        hidden: Tensor | None = None
        for i, b in self.bias.items():
            if i not in s:
                s[i] = torch.zeros_like(s[0])
            self.heads(s[i]).add_(tile_of(b, rows, cols))
        if (mask := additive_mask(self.problem, self.mask, rows, cols, s[0])) is not None:
            self.heads(s[0]).add_(mask)
        if self.careful:
            for term in (mask, None if 0 not in self.bias else tile_of(self.bias[0], rows, cols)):
                if term is not None:  # NaN plus -inf is NaN
                    self.heads(s[0]).masked_fill_(term == NEG_INF, NEG_INF)
            hidden = s[0] == NEG_INF
        return s, hidden

    def dropout(self, rows: slice, cols: slice) -> Tensor | None:
        """Return the dropout weights of a tile; ``None`` without dropout."""
        z = dropout_weight(self.problem, self.seeds, rows, cols, self.dtype)
        return None if z is None else z.flatten(0, -4).flatten(1, 2)


def split_batch(
    problem: Problem, x: Operands, tangents: Sequence[Tangent] = (), rows: Iterable[Tensor] = ()
) -> Iterable[TiledOperands]:
    """Yield the operands in slices of as many heads as fit into one tile.

    Args:
        problem: The static part of the call.
        x: The operands.
        tangents: Tangents of the operands.
        rows: Further tensors that enter products: cotangents, and the lse without infinities.
    """
    others = [*rows, *(part for t in tangents for part in t)]
    careful = may_hide(problem, x) and not zero_products_are_zero(x, others)
    return (TiledOperands(problem, x, batch, tangents, careful) for batch in _slices_of_batch(x))


def shown(p: TaylorSeries, hidden: Tensor | None) -> TaylorSeries:
    """Return a series of weights that is zero where ``hidden``; it is overwritten."""
    return p if hidden is None else {s: t.masked_fill_(hidden, 0.0) for s, t in p.items()}


def of_shown(product: Product, hidden: Tensor | None) -> Product:
    """Return a product of a tile of weights in which hidden ones take no part."""
    return product if hidden is None else functools.partial(product_of_shown, product, hidden=hidden)


def weighted(p: TaylorSeries, z: Tensor | None) -> TaylorSeries:
    """Return a series times the dropout weights, if there are any."""
    return p if z is None else {s: t * z for s, t in p.items()}


def row_key(a: Tensor, b: Tensor) -> Tensor:
    """Return ``a b^T``: from rows ``[L, n, d]`` and keys ``[L, m, d]`` to a tile ``[L, n, m]``."""
    return torch.bmm(a, b.mT)


def key_sum(p: Tensor, a: Tensor) -> Tensor:
    """Return ``p^T a``: from a tile ``[L, n, m]`` and rows ``[L, n, d]`` to keys ``[L, m, d]``."""
    return torch.bmm(p.mT, a)


class TileSum:
    """A result that is the sum of tiles, and zero where no tile contributes.

    Args:
        shape: Shape of the result.
        like: A tensor on the result's device.
        dtype: Dtype of the result.
    """

    def __init__(self, shape: Sequence[int], like: Tensor, dtype: torch.dtype) -> None:
        self.shape, self.like, self.dtype = tuple(shape), like, dtype
        self.sum: Tensor | None = None

    def add(self, at: tuple[slice, ...], tile: Tensor) -> None:
        """Add a tile at ``at``. If the first tile is the whole result, it is taken without a copy."""
        if self.sum is None and tile.shape == self.shape:
            self.sum = tile
            return
        if self.sum is None:
            self.sum = self.like.new_zeros(self.shape, dtype=self.dtype)
        self.sum[tuple(slice(None) if n == 1 else i for n, i in zip(self.shape, at, strict=True))] += tile

    def result(self) -> Tensor:
        """Return the sum."""
        return self.like.new_zeros(self.shape, dtype=self.dtype) if self.sum is None else self.sum


class RowSum(TileSum):
    """A result ``[*B, Hq, N, size]``."""

    def __init__(self, x: Operands, size: int, dtype: torch.dtype) -> None:
        kv_heads = x.key.shape[-3]
        heads = (kv_heads, x.query.shape[-3] // max(1, kv_heads))
        super().__init__((*x.query.shape[:-3], *heads, x.query.shape[-2], size), x.query, dtype)

    def add_rows(self, tiled: TiledOperands, rows: slice, tile: Tensor) -> None:
        """Add ``[L, G * rows, size]``."""
        self.add((*tiled.batch, slice(None), rows, slice(None)), tiled.heads(tile))

    def result(self) -> Tensor:
        """Return the sum with its heads joined."""
        return super().result().flatten(-4, -3)


class KeySum(TileSum):
    """A result ``[*B, Hkv, N, size]``."""

    def add_keys(self, tiled: TiledOperands, cols: slice, tile: Tensor) -> None:
        """Add ``[L, cols, size]``."""
        self.add((*tiled.batch, cols, slice(None)), tile.view(*tiled.lead, *tile.shape[-2:]))


class ScoreSum(TileSum):
    """A result in the shape of a bias, summed over the dimensions that the bias broadcasts."""

    def __init__(self, x: Operands, dtype: torch.dtype) -> None:
        assert x.bias is not None
        self.bias = x.bias
        super().__init__(split_heads(x.bias, x.key.shape[-3]).shape, x.query, dtype)

    def add_scores(self, tiled: TiledOperands, rows: slice, cols: slice, tile: Tensor) -> None:
        """Add a tile ``[L, G * rows, cols]``."""
        tile = tiled.heads(tile)
        kept = [1 if n == 1 else m for n, m in zip(self.shape, tile.shape, strict=True)]
        self.add((*tiled.batch, slice(None), rows, cols), tile.sum_to_size(kept))

    def result(self) -> Tensor:
        """Return the sum in the bias's own shape."""
        return super().result().reshape(self.bias.shape)
