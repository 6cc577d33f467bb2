"""Attention over tiles of the score matrix in plain PyTorch: memory linear in length, any device and dtype.

Three passes give every order of derivative. ``forward`` is the online softmax (Milakov and Gimelshein 2018, arXiv
1805.02867; Rabe and Staats 2021, arXiv 2112.05682). :func:`directional` and :func:`gradient` are ``D_n`` and ``G_n``
of :mod:`metaattn.backends.base`, written once in Taylor series. Without a tangent the gradient is B, with one tangent
they are T and S, and with several they are the third and higher derivatives of every backend.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import taylor
from .base import Backend, BackwardJvpInputs, Gradients, Operands, Problem, Rows, Tangent, Values, accumulator
from .masking import NEG_INF, finite
from .taylor import TaylorSeries
from .tiling import (
    KeySum,
    RowSum,
    ScoreSum,
    TiledOperands,
    key_sum,
    of_shown,
    row_key,
    shown,
    split_batch,
    weighted,
)

IMPRECISE_LSE = 64.0  # from here on an lse in float32 is rounded by 4e-6 or more

RowSeries = tuple[TaylorSeries, TaylorSeries]  # of out [*B, Hq, N, Dv] and of lse [*B, Hq, N, 1]


class BlockwiseBackend(Backend):
    """The formulas, tile by tile."""

    name = "blockwise"

    def forward(self, problem: Problem, x: Operands) -> Values:
        """Compute F."""
        dtype = accumulator(x.query.dtype)
        out, lse = RowSum(x, x.value.shape[-1], dtype), RowSum(x, 1, dtype)
        for tiled in split_batch(problem, x):
            for rows in tiled.rows:
                row_out, peak, total = _online_softmax(tiled, rows)
                out.add_rows(tiled, rows, row_out)
                lse.add_rows(tiled, rows, peak + torch.log(total))
        return _values(x, out.result(), lse.result())

    def backward(self, problem: Problem, x: Operands, values: Values, cotangent: Rows, *, bias_grad: bool) -> Gradients:
        """Compute B."""
        return _gradient(problem, x, _row_series(values), _row_series(cotangent), [], bias_grad)

    def forward_jvp(self, problem: Problem, x: Operands, values: Values, tangent: Tangent) -> Values:
        """Compute T."""
        return directional(problem, x, values, [tangent])

    def backward_jvp(self, problem: Problem, x: Operands, inputs: BackwardJvpInputs) -> Gradients:
        """Compute S."""
        residuals = _row_series(inputs.values, inputs.values_tangent)
        w = _row_series(inputs.cotangent, inputs.cotangent_tangent)
        return _gradient(problem, x, residuals, w, [inputs.tangent], inputs.bias_grad)


backend = BlockwiseBackend()


def directional(problem: Problem, x: Operands, values: Values, tangents: Sequence[Tangent]) -> Values:
    """Compute ``D_n``: the mixed derivative of F along ``n >= 1`` tangents."""
    out, lse = _directional(problem, x, values, tangents)
    full = (1 << len(tangents)) - 1
    return _values(x, out[full], lse[full])


def gradient(
    problem: Problem,
    x: Operands,
    values: Values,
    cotangent: Rows,
    tangents: Sequence[Tangent],
    *,
    cotangent_tangent: Rows,
    bias_grad: bool,
) -> Gradients:
    """Compute ``G_n``: the mixed derivative of B along ``n >= 1`` tangents.

    ``cotangent_tangent`` is the tangent of the cotangent along the first of them.
    """
    residuals = _directional(problem, x, values, tangents)
    return _gradient(problem, x, residuals, _row_series(cotangent, cotangent_tangent), tangents, bias_grad)


def _values(x: Operands, out: Tensor, lse: Tensor) -> Values:
    """Return row sums in the shapes and dtypes of :class:`~metaattn.backends.base.Values`."""
    return Values(out.to(x.query.dtype), lse.squeeze(-1))


def _row_series(*rows: Rows | Values) -> RowSeries:
    """Return the series of out and lse from their constants and, second, their tangents along the first direction."""
    out = {i: r.out for i, r in enumerate(rows) if r.out is not None}
    lse = {i: r.lse.unsqueeze(-1) for i, r in enumerate(rows) if r.lse is not None}
    return out, lse


def _online_softmax(tiled: TiledOperands, rows: slice) -> tuple[Tensor, Tensor, Tensor]:
    """Return, for one block of rows, ``out`` ``[L, G * rows, Dv]``, the largest score and the sum of exponentials.

    The exponentials are those of the scores minus the largest one.
    """
    query = tiled.scaled_query(rows)
    peak: Tensor | None = None
    total: Tensor | None = None
    out: Tensor | None = None
    for cols in tiled.cols(rows):
        scores, hidden = tiled.scores(query, tiled.key_block(tiled.key, cols), rows, cols)
        s = scores[0]
        old, peak = peak, s.amax(-1, keepdim=True)
        if old is not None:
            peak = torch.maximum(old, peak)
        p = s.sub_(finite(peak)).exp_()
        tile_total = p.sum(-1, keepdim=True)
        pz = weighted({0: p}, tiled.dropout(rows, cols))[0]
        tile_out = of_shown(torch.bmm, hidden)(pz, tiled.key_block(tiled.value, cols)[0])
        if old is None or total is None or out is None:
            total, out = tile_total, tile_out
        else:
            shrink = torch.exp(old - finite(peak))
            total, out = total * shrink + tile_total, out * shrink + tile_out
    if peak is None or total is None or out is None:  # the band hides every key
        n, zeros = query[0].shape[:-1], query[0].new_zeros
        return zeros((*n, tiled.value[0].shape[-1])), zeros((*n, 1)), zeros((*n, 1))
    return torch.where(total == 0, 0.0, out / total), finite(peak), total


def _lse_is_imprecise(x: Operands, lse: Tensor) -> bool:
    """Return whether ``exp(s - lse)`` loses digits that matter.

    That happens where the lse is large: for large scores and for masks of large finite numbers. This is checked on the
    CPU only: on other devices the check would wait for the device. And it happens with one key, for any lse, because
    the derivatives of its constant softmax are exactly zero.
    """
    if x.key.shape[-2] == 1:
        return True
    return lse.device.type == "cpu" and bool((finite(lse).abs() > IMPRECISE_LSE).any())


def _normaliser(tiled: TiledOperands, rows: slice) -> tuple[TaylorSeries, TaylorSeries]:
    """Return two series that make the logarithm of P if they are subtracted from the scores, one after the other.

    They are the score of each row's largest key, and the logarithm of the sum of exponentials of the scores minus that.
    Their sum is the lse. Subtracted one after the other they are exact where the lse is not: in a row that has all its
    weight on one key, the logarithm of that weight is zero, and so is each of its derivatives.
    """
    query, full = tiled.scaled_query(rows), tiled.full
    peak: TaylorSeries = {}
    total: TaylorSeries = {}
    for cols in tiled.cols(rows):
        s, hidden = tiled.scores(query, tiled.key_block(tiled.key, cols), rows, cols)
        at = s[0].argmax(-1, keepdim=True)
        old, peak = peak, {i: t.gather(-1, at) for i, t in s.items()}
        if old:
            larger = peak[0] > old[0]
            peak = {i: torch.where(larger, peak.get(i, 0.0), old.get(i, 0.0)) for i in peak.keys() | old.keys()}
        # For a row that has seen no key yet, subtract 0.
        shift = {i: t.masked_fill(peak[0] == NEG_INF, 0.0) for i, t in peak.items()}
        e = shown(taylor.exp_(taylor.subtract_(s, shift), full), hidden)
        shrink = taylor.exp_(taylor.subtract_({i: t.clone() for i, t in old.items()}, shift), full) if old else {}
        total = taylor.product(torch.mul, total, shrink, full) if old else {}
        for i, t in e.items():
            taylor.add_to(total, i, t.sum(-1, keepdim=True))
    if not peak:  # the band hides every key
        return {}, {}
    no_key = peak[0] == NEG_INF
    peak = {i: t.masked_fill(no_key, 0.0) for i, t in peak.items()}
    relative = {i: (t / total[0]).masked_fill(no_key, 0.0) for i, t in total.items() if i}
    return peak, {0: total[0].log().masked_fill(no_key, 0.0), **taylor.log_of_one_plus(relative, full)}


def _directional(problem: Problem, x: Operands, values: Values, tangents: Sequence[Tangent]) -> RowSeries:
    """Compute the derivatives of out and lse along every subset of the tangents, in the accumulator's dtype.

    In Taylor series, ``e = exp(s - c)`` for any series ``c`` of numbers by row gives ``lse = c + log(rowsum(e))`` and
    ``out = (e Z) v / rowsum(e)``. With the lse as constant of ``c``, ``rowsum(e) = 1`` at order 0; ``out`` is given
    there.
    """
    dtype, full = accumulator(x.query.dtype), (1 << len(tangents)) - 1
    forward_out, forward_lse = _row_series(values)
    orders = range(1, full + 1)
    out_series = {s: RowSum(x, x.value.shape[-1], dtype) for s in orders}
    lse_series = {s: RowSum(x, 1, dtype) for s in orders}
    lse_imprecise = _lse_is_imprecise(x, values.lse)
    for tiled in split_batch(problem, x, tangents, [finite(values.lse)]):
        out_0, lse = tiled.by_row(forward_out), tiled.by_row(forward_lse)
        for rows in tiled.rows:
            query = tiled.scaled_query(rows)
            centre: TaylorSeries = {}
            log_total: TaylorSeries = {0: finite(tiled.row_block(lse, rows)[0])}
            if lse_imprecise:
                centre, log_total = _normaliser(tiled, rows)
            totals: TaylorSeries = {}
            sums: TaylorSeries = {}
            for cols in tiled.cols(rows):
                s, hidden = tiled.scores(query, tiled.key_block(tiled.key, cols), rows, cols)
                s = taylor.subtract_(s, centre)
                s[0] -= log_total[0]
                e = shown(taylor.exp_(s, full), hidden)
                ez, value = weighted(e, tiled.dropout(rows, cols)), tiled.key_block(tiled.value, cols)
                for i in orders:
                    taylor.add_to(totals, i, e[i].sum(-1, keepdim=True) if i in e else None)
                    taylor.add_to(sums, i, taylor.coefficient(of_shown(torch.bmm, hidden), ez, value, i))
            sums[0] = tiled.row_block(out_0, rows)[0]
            out, lse_t = taylor.divide_by_one_plus(sums, totals, full), taylor.log_of_one_plus(totals, full)
            for i in orders:
                if i in out:
                    out_series[i].add_rows(tiled, rows, out[i])
                taylor.add_to(lse_t, i, centre.get(i))
                if i in lse_t:
                    lse_series[i].add_rows(tiled, rows, lse_t[i])
    out_all = {0: forward_out[0], **{s: t.result() for s, t in out_series.items()}}
    return out_all, {0: forward_lse[0], **{s: t.result() for s, t in lse_series.items()}}


def _gradient(
    problem: Problem,
    x: Operands,
    residuals: RowSeries,
    cotangent: RowSeries,
    tangents: Sequence[Tangent],
    bias_grad: bool,
) -> Gradients:
    """Compute the derivative of B along all the tangents, from the series of its residuals and of its cotangent.

    B in Taylor series: ``p = exp(s - lse)``, ``delta = rowsum(out_bar out) - lse_bar``, ``dp = Z (out_bar v^T)``,
    ``ds = p (dp - delta)``. The gradients are ``scale ds k`` of the query, ``scale ds^T q`` of the key,
    ``(p Z)^T out_bar`` of the value and ``ds`` of the bias. The result is the coefficient of each at the full set.

    If the lse is imprecise, both it and ``delta``, as ``rowsum(p dp)``, are computed again.
    """
    dtype, full = accumulator(x.query.dtype), (1 << len(tangents)) - 1
    query_grad = RowSum(x, x.query.shape[-1], dtype)
    key_grad, value_grad = KeySum(x.key.shape, x.key, dtype), KeySum(x.value.shape, x.value, dtype)
    bias = ScoreSum(x, dtype) if bias_grad else None
    lse_imprecise = _lse_is_imprecise(x, residuals[1][0])
    for tiled in split_batch(problem, x, tangents, [finite(residuals[1][0]), *cotangent[0].values()]):
        out, lse, out_bar, lse_bar = map(tiled.by_row, (*residuals, *cotangent))
        for rows in tiled.rows:
            block = _GradientRows(tiled, rows, tiled.row_block(out_bar, rows), tiled.row_block(lse, rows))
            if lse_imprecise:
                block.normaliser = _normaliser(tiled, rows)
                delta = block.delta()
            else:
                delta = taylor.product(_row_dot, block.w, tiled.row_block(out, rows), full)
            # The lse of a row without keys is constant: its cotangent contributes nothing.
            w_lse = {s: t.masked_fill(block.no_key, 0.0) for s, t in tiled.row_block(lse_bar, rows).items()}
            delta = taylor.subtract_(delta, w_lse)
            row_grad: TaylorSeries = {}
            for cols in tiled.cols(rows):
                key, pz, p, dp, hidden = block.tile(cols)
                ds = shown(taylor.product(torch.mul, p, taylor.subtract_(dp, delta), full), hidden)
                taylor.add_to(row_grad, 0, taylor.coefficient(of_shown(torch.bmm, hidden), ds, key, full))
                if (c := taylor.coefficient(of_shown(key_sum, hidden), ds, block.query, full)) is not None:
                    key_grad.add_keys(tiled, cols, c)
                if (c := taylor.coefficient(of_shown(key_sum, hidden), pz, block.w, full)) is not None:
                    value_grad.add_keys(tiled, cols, c)
                if bias is not None and full in ds:
                    bias.add_scores(tiled, rows, cols, ds[full])
            if row_grad:
                query_grad.add_rows(tiled, rows, row_grad[0] * problem.scale)
    return Gradients(
        query_grad.result().to(x.query.dtype),
        key_grad.result().to(x.key.dtype),
        value_grad.result().to(x.value.dtype),
        None if bias is None or x.bias is None else bias.result().to(x.bias.dtype),
    )


class _GradientRows:
    """One block of rows of :func:`_gradient`.

    Args:
        tiled: The operands.
        rows: The rows.
        w: Cotangent of ``out`` in these rows.
        lse: Log-sum-exp of these rows.
    """

    def __init__(self, tiled: TiledOperands, rows: slice, w: TaylorSeries, lse: TaylorSeries) -> None:
        self.tiled, self.rows, self.w = tiled, rows, w
        self.query = tiled.scaled_query(rows)
        self.no_key = lse[0] == NEG_INF
        self.normaliser: tuple[TaylorSeries, ...] = ({**lse, 0: finite(lse[0])},)

    def tile(self, cols: slice) -> tuple[TaylorSeries, TaylorSeries, TaylorSeries, TaylorSeries, Tensor | None]:
        """Return the keys of a tile, P Z, P, dP, and which elements are hidden (see :meth:`TiledOperands.scores`)."""
        tiled = self.tiled
        key, value = tiled.key_block(tiled.key, cols), tiled.key_block(tiled.value, cols)
        z = tiled.dropout(self.rows, cols)
        s, hidden = tiled.scores(self.query, key, self.rows, cols)
        for term in self.normaliser:
            s = taylor.subtract_(s, term)
        p = shown(taylor.exp_(s, tiled.full), hidden)
        dp = weighted(taylor.product(row_key, self.w, value, tiled.full), z)
        return key, weighted(p, z), p, dp, hidden

    def delta(self) -> TaylorSeries:
        """Return ``rowsum(P dP)``, in which rounding is as in ``dP``."""
        total: TaylorSeries = {}
        for cols in self.tiled.cols(self.rows):
            *_, p, dp, hidden = self.tile(cols)
            for i, t in shown(taylor.product(torch.mul, p, dp, self.tiled.full), hidden).items():
                taylor.add_to(total, i, t.sum(-1, keepdim=True))
        return total


def _row_dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(-1, keepdim=True)
