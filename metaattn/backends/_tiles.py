"""The score matrix in tiles: how a problem is cut, and the scores of one tile as jets."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

from torch import Tensor

from . import _jets as jets
from ._jets import Jet
from ._protocol import Operands, Problem, Tangent, accumulator
from ._scores import barrier, dropout_weight, row_key, tile_is_empty, tile_of

# Rows and columns of a tile, and the elements of all heads worked on at once. Best of 128 to 512, 256 to
# 1024 and 2^16 to 2^20 for the sum of all rules, causal and full, at 1024 and 4096 tokens (two cores of a
# Xeon, torch 2.13, `scripts/bench_cpu.py`): the tile of one tensor is 2 MiB, about a core's L2 cache.
ROWS, COLS = 256, 256
TILE = 2**19

Batch = tuple[slice, ...]


def _blocks(n: int, size: int) -> list[slice]:
    """Slices of at most ``size`` that cover ``range(n)``."""
    return [slice(i, min(i + size, n)) for i in range(0, n, size)]


def row_blocks(g: Operands) -> list[slice]:
    """The rows in blocks of a tile's height."""
    return _blocks(g.query.shape[-2], ROWS)


def batches(g: Operands) -> Iterator[Batch]:
    """Slices over the batch and head dimensions of grouped operands, each with at most TILE elements of a tile."""
    lead, rows, cols = g.query.shape[:-2], g.query.shape[-2], g.key.shape[-2]
    most = max(1, TILE // max(1, min(rows, ROWS) * min(cols, COLS)))
    steps = []
    for size in reversed(lead):
        steps.append(max(1, min(size, most)))
        most = max(1, most // steps[-1])
    return itertools.product(*map(_blocks, lead, reversed(steps)))


def take(t: Tensor, batch: Batch) -> Tensor:
    """The part of ``t`` that belongs to ``batch``; broadcast dimensions whole."""
    return t[tuple(slice(None) if n == 1 else b for n, b in zip(t.shape, batch, strict=False))]


class Part:
    """One batch of grouped operands with their tangents: its jets, and the scores of its tiles.

    ``full`` is the set of all tangents.
    """

    def __init__(self, problem: Problem, g: Operands, batch: Batch, tangents: Sequence[Tangent] = ()) -> None:
        def part(t: Tensor | None) -> Tensor | None:
            return None if t is None else take(t, batch)

        x = Operands(*(take(t, batch) for t in g[:3]), *map(part, g[3:]))
        ts = [Tangent(*map(part, t)) for t in tangents]
        self.problem, self.x = problem, x
        self.dtype = accumulator(x.query.dtype)
        self.full = (1 << len(ts)) - 1
        self.query = jets.jet(x.query, [t.query for t in ts])
        self.key = jets.jet(x.key, [t.key for t in ts])
        self.value = jets.jet(x.value, [t.value for t in ts])
        self.bias = jets.jet(x.bias, [t.bias for t in ts])

    def at(self, x: Jet, block: slice) -> Jet:
        """The rows or the keys ``block`` of a jet, in the accumulator's dtype."""
        return {s: t[..., block, :].to(self.dtype) for s, t in x.items()}

    def scaled_query(self, rows: slice) -> Jet:
        """The queries of ``rows``, times the scale."""
        return {s: t * self.problem.scale for s, t in self.at(self.query, rows).items()}

    def visited(self, rows: slice) -> Iterator[slice]:
        """The blocks of columns that the band does not hide from all of ``rows``."""
        every = _blocks(self.x.key.shape[-2], COLS)
        return (cols for cols in every if not tile_is_empty(self.problem, rows, cols))

    def scores(self, query: Jet, key: Jet, rows: slice, cols: slice) -> Jet:
        """The scores of a tile from its scaled queries and its keys, -inf where hidden: the caller's own tensors."""
        s = jets.product(row_key, query, key, self.full)
        for i, b in self.bias.items():
            tile = tile_of(b, rows, cols).to(self.dtype)
            s[i] = s[i].add_(tile) if i in s else tile.expand_as(s[0]).clone()
        if (wall := barrier(self.problem, self.x.mask, rows, cols, s[0])) is not None:
            s[0] += wall
        return s

    def dropout(self, rows: slice, cols: slice) -> Tensor | None:
        """The dropout weights of a tile."""
        return dropout_weight(self.problem, self.x.seeds, rows, cols, self.dtype)


def weighted(p: Jet, z: Tensor | None) -> Jet:
    """A jet times the dropout weights, if there are any."""
    return p if z is None else {s: t * z for s, t in p.items()}
