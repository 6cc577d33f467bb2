"""Operands as the kernels take them: pointers with strides, batches merged into two dimensions.

No operand is copied, whatever is expanded, transposed or broadcast in it, but one whose rows are not dense and
aligned in steps of 16 elements (a head size that is not a power of two is padded to one), and those of batches that
no two strides describe (three and more that do not merge).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..base import Operands, Problem, Rows, Tangent, Values

WAVE_BYTES = 2**24  # half the L2 cache of a large GPU is more
FEW_ROWS = 16  # fill the smallest block that a product takes


class View(NamedTuple):
    """Matrices ``[batch0, batch1, head, row, column]`` by their strides; columns are dense.

    ``row`` is ``None`` where it is the common one, of :class:`Scores`; ``head`` of what is written contiguously.
    """

    ptr: Tensor | None = None
    batch0: int = 0
    batch1: int = 0
    head: int | None = 0
    row: int | None = None


class Plane(NamedTuple):
    """The same of a mask or a bias. ``row`` or ``col`` is ``None`` where it is broadcast to all rows or keys."""

    ptr: Tensor | None = None
    batch0: int = 0
    batch1: int = 0
    head: int = 0
    row: int | None = None
    col: int | None = None


class Inputs(NamedTuple):
    """Query, key and value; or their tangents, with that of the bias."""

    query: View
    key: View
    value: View
    bias: Plane = Plane()


class Scores(NamedTuple):
    """All that makes scores of products: the problem on the device."""

    scale: float
    left: int | None
    right: int | None
    NQ: int
    NK: int
    HEADS: int
    GROUP: int
    BATCH1: int
    LANES: int
    WAVE: int
    ROW: int
    bias: Plane
    mask: Plane
    seeds: Tensor | None
    threshold: int
    boost: float


class Cotangents(NamedTuple):
    """Cotangents of out and lse with their tangents, the values with theirs; room for the deltas, and for gains."""

    out: View
    out_t: View
    lse: Tensor | None
    lse_t: Tensor | None
    out_value: View
    out_value_t: View
    lse_value: Tensor
    lse_value_t: Tensor | None
    delta: Tensor | None
    delta_t: Tensor | None
    gain: Tensor | None


class Share(NamedTuple):
    """Which heads a part of a bias has for its own and which it serves, and how the sum over these is split."""

    row: int | None
    col: int | None
    OWN: int
    HEADS: int
    BATCH1: int
    SERVES: int
    SERVES_HEADS: int
    SERVES_BATCH1: int
    SPLITS: int
    SIZE: int
    MATRIX: int


class Batch:
    """The batch dimensions of one call, and how they merge into two.

    Args:
        x: The operands.
        others: More tensors with all their batch dimensions, or ``None``: those that kernels load in their loops.
        once: The same, loaded once.
        planes: More tensors that broadcast to the scores, or ``None``.
    """

    def __init__(
        self,
        x: Operands,
        others: Sequence[Tensor | None] = (),
        planes: Sequence[Tensor | None] = (),
        once: Sequence[Tensor | None] = (),
    ) -> None:
        self.x = x
        self.sizes = tuple(x.query.shape[:-3])
        self.heads, self.rows = x.query.shape[-3:-1]
        self.kv_heads, self.keys = x.key.shape[-3:-1]
        self.lanes = math.prod(self.sizes) * self.heads
        present = [t for t in (*x[:3], x.bias, x.mask, *others, *planes, *once) if t is not None]
        self.groups = _merge(self.sizes, present)
        # Three or more that do not merge: everything is made contiguous, and merges.
        self.copies = len(self.groups) > 2
        if self.copies:
            self.groups = [list(range(len(self.sizes)))]
        # One row stride for all that kernels load in their loops, if it is one.
        strides = {t.stride(-2) for t in (*x[:3], *others) if t is not None}
        self.common = strides.pop() if len(strides) == 1 and not self.copies else None

    @property
    def batch1(self) -> int:
        """The size of the second of the two batch dimensions."""
        return math.prod(self.sizes[d] for d in self.groups[-1]) if self.groups else 1

    @property
    def exact(self) -> bool:
        """Whether the rows are so few that what products lose to rounding does not average out, nor costs time."""
        return self.rows <= FEW_ROWS

    @property
    def wave(self) -> int:
        """How many lanes to work on at once: those whose keys, values and tangents of these fill half an L2 cache."""
        lane = 2 * self.keys * (self.x.key.shape[-1] + self.x.value.shape[-1]) * self.x.key.element_size()
        return max(1, min(self.lanes, WAVE_BYTES // max(1, lane)))

    def view(self, t: Tensor | None) -> View:
        """A tensor ``[*B, H, N, ·]``."""
        if t is None:
            return View()
        if self.copies:
            t = t.contiguous()
        row = t.stride(-2)
        return View(t, *self._batch_strides(t), t.stride(-3), None if row == self.common else row)

    def room(self, t: Tensor | None) -> View:
        """One that is written."""
        return View(t, head=None) if t is None or t.is_contiguous() else self.view(t)

    def plane(self, t: Tensor | None) -> Plane:
        """A tensor that broadcasts to the scores."""
        if t is None:
            return Plane()
        if t.dtype == torch.bool:
            t = _barrier(t)
        if self.copies:
            t = t.expand(*self.sizes, *t.shape[-3:]).contiguous()
        rows, keys = t.shape[-2:]
        head = 0 if t.shape[-3] == 1 else t.stride(-3)
        row = None if rows == 1 and self.rows != 1 else t.stride(-2)
        col = None if keys == 1 and self.keys != 1 else t.stride(-1)
        return Plane(t, *self._batch_strides(t), head, row, col)

    def lane(self, t: Tensor | None) -> Tensor | None:
        """A number for each row, ``[*B, H, N]``, contiguous."""
        return None if t is None else t.contiguous()

    def scores(self, problem: Problem) -> Scores:
        """The problem with the operands' bias, mask and seeds."""
        far = self.rows + self.keys  # as good as no limit, and an int32
        left, right = (None if side is None else min(side, far) for side in (problem.left, problem.right))
        seeds = self.x.seeds
        if seeds is not None:
            seeds = seeds.expand(*self.sizes, self.heads, 1, 1).contiguous()
        return Scores(
            problem.scale,
            left,
            right,
            self.rows,
            self.keys,
            self.heads,
            self.heads // max(1, self.kv_heads),
            self.batch1,
            self.lanes,
            self.wave,
            self.common or 0,
            self.plane(self.x.bias),
            self.plane(self.x.mask),
            seeds,
            round(problem.dropout_p * 2**32),
            1.0 / (1.0 - problem.dropout_p),
        )

    def inputs(self, t: Operands | Tangent) -> Inputs:
        """Query, key and value of the operands; or all of a tangent."""
        bias = self.plane(t.bias) if isinstance(t, Tangent) else Plane()
        return Inputs(self.view(t.query), self.view(t.key), self.view(t.value), bias)

    def cotangents(self, values: Rows, values_t: Rows, w: Rows, w_t: Rows) -> Cotangents:
        """Cotangents, values and room for what kernels tell one another."""
        assert values.out is not None
        assert values.lse is not None
        second = values_t.out is not None
        room = self.x.query.new_empty(1 + second + self.exact, self.lanes, self.rows, dtype=torch.float32)
        # A row of zeros for all rows stands for an absent cotangent.
        out = values.out.new_zeros(values.out.shape[-1]).expand_as(values.out) if w.out is None else w.out
        return Cotangents(
            self.view(out),
            self.view(w_t.out),
            self.lane(w.lse),
            self.lane(w_t.lse),
            self.view(values.out),
            self.view(values_t.out),
            values.lse.contiguous(),
            self.lane(values_t.lse),
            room[0],
            room[1] if second else None,
            room[-1] if self.exact else None,
        )

    def share(self, bias: Tensor, splits: int) -> tuple[Share, tuple[int, ...]]:
        """How the gradient of ``bias`` is laid out and split; and its shape, batch dimensions merged."""
        own = [math.prod(bias.shape[d] for d in g) for g in self.groups]
        own = [1] * (2 - len(own)) + (own if not self.copies else [math.prod(self.sizes)])
        all_ = [math.prod(self.sizes[d] for d in g) for g in self.groups]
        all_ = [1] * (2 - len(all_)) + all_
        heads, rows, keys = bias.shape[-3:]
        row = None if rows == 1 and self.rows != 1 else keys
        col = None if keys == 1 and self.keys != 1 else 1
        serves = [a // o for a, o in zip((*all_, self.heads), (*own, heads), strict=True)]
        served = math.prod(serves)
        shape = (*own, heads, rows, keys)
        share = Share(
            row,
            col,
            math.prod(own) * heads,
            heads,
            own[1],
            served,
            serves[2],
            serves[1],
            min(splits, served),
            math.prod(shape),
            rows * keys,
        )
        return share, shape

    def _batch_strides(self, t: Tensor) -> tuple[int, int]:
        # Within a group the last dimension larger than 1 has the stride of the whole.
        last = [next((d for d in reversed(g) if self.sizes[d] != 1), g[-1]) for g in self.groups]
        strides = [0 if t.shape[d] == 1 else t.stride(d) for d in last]
        first, second = [0] * (2 - len(strides)) + strides
        return first, second


def aligned(t: Tensor, size: int | None = None) -> Tensor:
    """A tensor whose last dimension is a dense power of two, and whose rows begin at multiples of 16 elements.

    All other dimensions stay as they are, expanded ones as well, unless it must be copied for that. With ``size``
    columns, or as many as the next power of two.
    """
    size = block(t.shape[-1]) if size is None else size
    if t.shape[-1] != size:
        return F.pad(t, (0, size - t.shape[-1]))
    steps = [step for step, n in zip(t.stride()[:-1], t.shape[:-1], strict=True) if n > 1]
    dense = t.stride(-1) == 1 and all(step % 16 == 0 for step in steps) and t.data_ptr() % 16 == 0
    return t if dense and near_rows(t) else t.clone(memory_format=torch.contiguous_format)


def near_rows(t: Tensor) -> bool:
    """Whether the rows of a block are so near each other that their offsets are an int32."""
    return abs(t.stride(-2)) < 2**23


def align(x: Operands, size: int | None) -> Operands:
    """Operands whose query, key and value are :func:`aligned`, to ``size`` columns or each to its own."""
    return x._replace(query=aligned(x.query, size), key=aligned(x.key, size), value=aligned(x.value, size))


def align_tangent(t: Tangent, size: int | None) -> Tangent:
    """The same for a tangent."""
    query, key, value = (None if part is None else aligned(part, size) for part in t[:3])
    return Tangent(query, key, value, t.bias)


def align_rows(rows: Rows | Values, size: int | None) -> Rows:
    """The same for values, their tangents or their cotangents."""
    return Rows(None if rows.out is None else aligned(rows.out, size), rows.lse)


def block(size: int) -> int:
    """The power of two, at least 16, that holds ``size``: what a matrix product takes."""
    return max(16, 1 << (size - 1).bit_length())


def _barrier(mask: Tensor) -> Tensor:
    """0 where a boolean mask shows, -inf where it hides, broadcast as the mask is: a kernel adds it like a bias."""
    own = mask[tuple(slice(0, 1) if step == 0 else slice(None) for step in mask.stride())]
    zero = torch.zeros((), dtype=torch.bfloat16, device=mask.device)
    return torch.where(own, zero, zero - torch.inf).expand(mask.shape)


def _merge(sizes: tuple[int, ...], tensors: Sequence[Tensor]) -> list[list[int]]:
    """Adjacent batch dimensions that one stride describes in every tensor, together."""
    groups: list[list[int]] = []
    last = -1  # the last dimension larger than 1
    for d, size in enumerate(sizes):
        if size == 1:
            if groups:
                groups[-1].append(d)
            else:
                groups.append([d])
            continue
        joins = last < 0 or all(_one_stride(t, last, d) for t in tensors)
        if groups and joins:
            groups[-1].append(d)
        else:
            groups.append([d])
        last = d
    return groups


def _one_stride(t: Tensor, a: int, b: int) -> bool:
    """Whether dimensions ``a`` and ``b``, with nothing but ones between, are steps of one stride."""
    if (t.shape[a] == 1) != (t.shape[b] == 1):
        return False
    return t.shape[a] == 1 or t.stride(a) == t.stride(b) * t.shape[b]
