"""Operands in the form that the kernels take: pointers with strides, and batch dimensions merged into two.

Expanded, transposed and broadcast operands are read where they are. An operand is copied only if

* its rows are not dense and aligned in steps of 16 elements (a head size that is not a power of two is padded to one);
* or query and value have different head sizes, of which one is small (``block_sizes.least_columns``);
* or the batch dimensions of the call do not merge into two (three or more, with unrelated strides).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..base import Operands, Problem, Rows, Tangent, Values

L2_GROUP_BYTES = 2**24  # less than half the L2 cache of a large GPU
FEW_ROWS = 16  # these fit into the smallest block that a product takes


class View(NamedTuple):
    """Matrices ``[batch0, batch1, head, row, column]`` by their strides; columns are dense.

    ``row`` is ``None`` where it equals ``ROW_STRIDE`` of :class:`KernelProblem`; ``head`` is ``None`` for results that
    are contiguous.
    """

    ptr: Tensor | None = None
    batch0: int = 0
    batch1: int = 0
    head: int | None = 0
    row: int | None = None


class ScoreLayout(NamedTuple):
    """A mask, a bias or a bias's tangent by its strides.

    ``row`` or ``col`` is ``None`` where the tensor is broadcast to all rows or all keys.
    """

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
    bias: ScoreLayout = ScoreLayout()


class KernelProblem(NamedTuple):
    """The problem, its sizes, and all that turns products of queries and keys into scores.

    Attributes:
        scale: Factor of the scores.
        left: Limit of the band; ``None`` without one.
        right: Limit of the band; ``None`` without one.
        NQ: Number of query rows.
        NK: Number of keys.
        HEADS: Number of query heads.
        GROUP: Number of query heads that share a key head.
        BATCH1: Size of the second of the two batch dimensions.
        TOTAL_HEADS: Number of query heads in all batches.
        L2_GROUP: Number of heads that programs process together, so that their keys stay in the L2 cache.
        ROW_STRIDE: Row stride of all views whose ``row`` is ``None``.
        bias: Added to the scores.
        mask: As 0 and -inf, added to the scores.
        seeds: Dropout seeds by head, contiguous.
        dropout_threshold: Dropout keeps elements whose 32 random bits are at least this.
        dropout_scale: Factor of the elements that dropout keeps.
    """

    scale: float
    left: int | None
    right: int | None
    NQ: int
    NK: int
    HEADS: int
    GROUP: int
    BATCH1: int
    TOTAL_HEADS: int
    L2_GROUP: int
    ROW_STRIDE: int
    bias: ScoreLayout
    mask: ScoreLayout
    seeds: Tensor | None
    dropout_threshold: int
    dropout_scale: float


class RowInputs(NamedTuple):
    """Inputs of the backward kernels by row: cotangents and values, with tangents (``_t``); and scratch memory.

    The rows kernel writes ``delta``, ``delta_t`` and ``row_renorm``; the others read them.
    """

    out_bar: View
    out_bar_t: View
    lse_bar: Tensor | None
    lse_bar_t: Tensor | None
    out: View
    out_t: View
    lse: Tensor
    lse_t: Tensor | None
    delta: Tensor | None
    delta_t: Tensor | None
    row_renorm: Tensor | None


class BiasSplit(NamedTuple):
    """Layout of the gradient of a bias, and the split of its sum over what the bias is broadcast to.

    Attributes:
        row: Row stride of the gradient; ``None`` where the bias is broadcast to all rows.
        col: Column stride; ``None`` where the bias is broadcast to all keys.
        BIAS_HEADS: Number of matrices in the bias: its batch dimensions times its heads.
        HEADS: Heads of the bias.
        BATCH1: Size of its second batch dimension.
        SUMMED: Number of heads of the call that each matrix of the bias is broadcast to: the sum goes over them.
        SUMMED_HEADS: The part of SUMMED that comes from the head dimension.
        SUMMED_BATCH1: The part of SUMMED that comes from the second batch dimension.
        SPLITS: Number of partial sums. Each is the gradient from every SPLITS-th of the heads.
        SIZE: Elements of one partial sum.
        MATRIX: Elements of one matrix of the bias.
    """

    row: int | None
    col: int | None
    BIAS_HEADS: int
    HEADS: int
    BATCH1: int
    SUMMED: int
    SUMMED_HEADS: int
    SUMMED_BATCH1: int
    SPLITS: int
    SIZE: int
    MATRIX: int


class BatchLayout:
    """The batch dimensions of one call, merged into two, and the operands as views with these.

    Args:
        x: The operands.
        in_loops: Further tensors with all batch dimensions that kernels load in their loops; ``None`` is absent.
        score_tensors: Further tensors that broadcast to the scores; ``None`` is absent.
        once: Further tensors with all batch dimensions that kernels load once; ``None`` is absent.
    """

    def __init__(
        self,
        x: Operands,
        in_loops: Sequence[Tensor | None] = (),
        score_tensors: Sequence[Tensor | None] = (),
        once: Sequence[Tensor | None] = (),
    ) -> None:
        self.x = x
        self.sizes = tuple(x.query.shape[:-3])
        self.heads, self.rows = x.query.shape[-3:-1]
        self.kv_heads, self.keys = x.key.shape[-3:-1]
        self.total_heads = math.prod(self.sizes) * self.heads
        present = [t for t in (*x[:3], x.bias, x.mask, *in_loops, *score_tensors, *once) if t is not None]
        self.groups = _merge(self.sizes, present)
        # If three or more dimensions do not merge, all tensors are made contiguous, and then they merge.
        self.copies = len(self.groups) > 2
        if self.copies:
            self.groups = [list(range(len(self.sizes)))]
        # If all tensors that kernels load in their loops have the same row stride, offsets are computed once for all.
        strides = {t.stride(-2) for t in (*x[:3], *in_loops) if t is not None}
        self.row_stride = strides.pop() if len(strides) == 1 and not self.copies else None

    @property
    def batch1(self) -> int:
        """Return the size of the second of the two batch dimensions."""
        return math.prod(self.sizes[d] for d in self.groups[-1]) if self.groups else 1

    @property
    def compensate(self) -> bool:
        """Return whether kernels compensate the rounding of products.

        They do so for few rows, whose rounding errors do not average out. There it costs no time.
        """
        return self.rows <= FEW_ROWS

    @property
    def renormalize(self) -> bool:
        """Return whether kernels make the rows of P sum to one, where the lse is so large that its rounding matters.

        In 16 bits it matters only for scores that a bias shifts by thousands, or to the end of the range.
        """
        return self.compensate or self.x.bias is not None or self.x.query.dtype == torch.float32

    @property
    def l2_group(self) -> int:
        """Return how many heads have keys, values and tangents of both that together fill half an L2 cache."""
        head_bytes = 2 * self.keys * (self.x.key.shape[-1] + self.x.value.shape[-1]) * self.x.key.element_size()
        return max(1, min(self.total_heads, L2_GROUP_BYTES // max(1, head_bytes)))

    def view(self, t: Tensor | None) -> View:
        """Return a tensor ``[*B, H, N, ·]`` as a view."""
        if t is None:
            return View()
        if self.copies:
            t = t.contiguous()
        row = t.stride(-2)
        return View(t, *self._batch_strides(t), t.stride(-3), None if row == self.row_stride else row)

    def output_view(self, t: Tensor | None) -> View:
        """Return the view of a tensor that a kernel writes."""
        return View(t, head=None) if t is None or t.is_contiguous() else self.view(t)

    def score_layout(self, t: Tensor | None) -> ScoreLayout:
        """Return the layout of a tensor that broadcasts to the scores. A boolean mask becomes 0 and -inf."""
        if t is None:
            return ScoreLayout()
        if t.dtype == torch.bool:
            t = _additive_mask(t)
        if self.copies:
            t = t.expand(*self.sizes, *t.shape[-3:]).contiguous()
        rows, keys = t.shape[-2:]
        head = 0 if t.shape[-3] == 1 else t.stride(-3)
        row = None if rows == 1 and self.rows != 1 else t.stride(-2)
        col = None if keys == 1 and self.keys != 1 else t.stride(-1)
        return ScoreLayout(t, *self._batch_strides(t), head, row, col)

    def kernel_problem(self, problem: Problem) -> KernelProblem:
        """Return the problem with the bias, mask and seeds of the operands."""
        no_limit = self.rows + self.keys  # larger limits mean the same, and may not fit into an int32
        left, right = (None if side is None else min(side, no_limit) for side in (problem.left, problem.right))
        seeds = self.x.seeds
        if seeds is not None:
            seeds = seeds.expand(*self.sizes, self.heads, 1, 1).contiguous()
        return KernelProblem(
            problem.scale,
            left,
            right,
            self.rows,
            self.keys,
            self.heads,
            self.heads // max(1, self.kv_heads),
            self.batch1,
            self.total_heads,
            self.l2_group,
            self.row_stride or 0,
            self.score_layout(self.x.bias),
            self.score_layout(self.x.mask),
            seeds,
            round(problem.dropout_p * 2**32),
            1.0 / (1.0 - problem.dropout_p),
        )

    def inputs(self, t: Operands | Tangent) -> Inputs:
        """Return the views of query, key and value of the operands; or of all of a tangent."""
        bias = self.score_layout(t.bias) if isinstance(t, Tangent) else ScoreLayout()
        return Inputs(self.view(t.query), self.view(t.key), self.view(t.value), bias)

    def row_inputs(self, values: Rows, values_t: Rows, w: Rows, w_t: Rows) -> RowInputs:
        """Return values and cotangents with their tangents, and scratch memory for what kernels pass on."""
        assert values.out is not None
        assert values.lse is not None
        jvp = values_t.out is not None
        scratch = self.x.query.new_empty(1 + jvp + self.renormalize, self.total_heads, self.rows, dtype=torch.float32)
        # An absent cotangent is one row of zeros, expanded to all rows.
        out_bar = values.out.new_zeros(values.out.shape[-1]).expand_as(values.out) if w.out is None else w.out
        return RowInputs(
            self.view(out_bar),
            self.view(w_t.out),
            _contiguous(w.lse),
            _contiguous(w_t.lse),
            self.view(values.out),
            self.view(values_t.out),
            values.lse.contiguous(),
            _contiguous(values_t.lse),
            scratch[0],
            scratch[1] if jvp else None,
            scratch[-1] if self.renormalize else None,
        )

    def bias_split(self, bias: Tensor, splits: int) -> tuple[BiasSplit, tuple[int, ...]]:
        """Return how the gradient of ``bias`` is laid out and split, and its shape with merged batch dimensions."""
        own = [math.prod(bias.shape[d] for d in g) for g in self.groups]
        own = [1] * (2 - len(own)) + (own if not self.copies else [math.prod(self.sizes)])
        every = [math.prod(self.sizes[d] for d in g) for g in self.groups]
        every = [1] * (2 - len(every)) + every
        heads, rows, keys = bias.shape[-3:]
        row = None if rows == 1 and self.rows != 1 else keys
        col = None if keys == 1 and self.keys != 1 else 1
        summed_by_dim = [a // o for a, o in zip((*every, self.heads), (*own, heads), strict=True)]
        summed = math.prod(summed_by_dim)
        shape = (*own, heads, rows, keys)
        split = BiasSplit(
            row,
            col,
            math.prod(own) * heads,
            heads,
            own[1],
            summed,
            summed_by_dim[2],
            summed_by_dim[1],
            min(splits, summed),
            math.prod(shape),
            rows * keys,
        )
        return split, shape

    def _batch_strides(self, t: Tensor) -> tuple[int, int]:
        # Within a group of merged dimensions the last one larger than 1 has the stride of the whole group.
        last = [next((d for d in reversed(g) if self.sizes[d] != 1), g[-1]) for g in self.groups]
        strides = [0 if t.shape[d] == 1 else t.stride(d) for d in last]
        first, second = [0] * (2 - len(strides)) + strides
        return first, second


def _contiguous(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


def aligned(t: Tensor, columns: int = 1) -> Tensor:
    """Return a tensor with dense last dimension, whose rows begin at multiples of 16 elements.

    All other dimensions keep their strides, also expanded ones, unless the tensor must be copied.

    Args:
        t: The tensor.
        columns: The least size of the last dimension of the result, which is padded with zeros to a power of two.
    """
    size = power_of_two(max(t.shape[-1], columns))
    if t.shape[-1] != size:
        return F.pad(t, (0, size - t.shape[-1]))
    steps = [step for step, n in zip(t.stride()[:-1], t.shape[:-1], strict=True) if n > 1]
    dense = t.stride(-1) == 1 and all(step % 16 == 0 for step in steps) and t.data_ptr() % 16 == 0
    return t if dense and row_offsets_fit(t) else t.clone(memory_format=torch.contiguous_format)


def row_offsets_fit(t: Tensor) -> bool:
    """Return whether the offsets of a block's rows fit into an int32."""
    return abs(t.stride(-2)) < 2**23


def align(x: Operands, columns: int) -> Operands:
    """Return operands whose query, key and value are :func:`aligned`."""
    query, key, value = (aligned(t, columns) for t in x[:3])
    return x._replace(query=query, key=key, value=value)


def align_tangent(t: Tangent, columns: int) -> Tangent:
    """Return a tangent whose query, key and value are :func:`aligned`."""
    query, key, value = (None if part is None else aligned(part, columns) for part in t[:3])
    return Tangent(query, key, value, t.bias)


def align_rows(rows: Rows | Values, columns: int) -> Rows:
    """Return values, their tangents or their cotangents with ``out`` :func:`aligned`."""
    return Rows(None if rows.out is None else aligned(rows.out, columns), rows.lse)


def power_of_two(size: int) -> int:
    """Return the smallest power of two that is at least ``size`` and at least 16, as matrix products need."""
    return max(16, 1 << (size - 1).bit_length())


def _additive_mask(mask: Tensor) -> Tensor:
    """Return 0 where a boolean mask shows and -inf where it hides, broadcast as the mask is.

    A kernel adds it to the scores like a bias.
    """
    own = mask[tuple(slice(0, 1) if step == 0 else slice(None) for step in mask.stride())]
    zero = torch.zeros((), dtype=torch.bfloat16, device=mask.device)
    return torch.where(own, zero, zero - torch.inf).expand(mask.shape)


def _merge(sizes: tuple[int, ...], tensors: Sequence[Tensor]) -> list[list[int]]:
    """Group adjacent batch dimensions that a single stride describes in every tensor."""
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
    """Return whether a single stride describes ``a`` and ``b``, with only dimensions of size 1 between them."""
    if (t.shape[a] == 1) != (t.shape[b] == 1):
        return False
    return t.shape[a] == 1 or t.stride(a) == t.stride(b) * t.shape[b]
