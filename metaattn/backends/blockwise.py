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
from .tiling import KeySum, RowSum, ScoreSum, TiledOperands, key_sum, row_key, split_batch, weighted

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
        s = tiled.scores(query, tiled.key_block(tiled.key, cols), rows, cols)[0]
        old, peak = peak, s.amax(-1, keepdim=True)
        if old is not None:
            peak = torch.maximum(old, peak)
        p = s.sub_(finite(peak)).exp_()
        tile_total = p.sum(-1, keepdim=True)
        tile_out = torch.bmm(weighted({0: p}, tiled.dropout(rows, cols))[0], tiled.key_block(tiled.value, cols)[0])
        if old is None or total is None or out is None:
            total, out = tile_total, tile_out
        else:
            shrink = torch.exp(old - finite(peak))
            total, out = total * shrink + tile_total, out * shrink + tile_out
    if peak is None or total is None or out is None:  # the band hides every key
        n, zeros = query[0].shape[:-1], query[0].new_zeros
        return zeros((*n, tiled.value[0].shape[-1])), zeros((*n, 1)), zeros((*n, 1))
    return torch.where(total == 0, 0.0, out / total), finite(peak), total


def _lse_is_imprecise(lse: Tensor) -> bool:
    """Return whether some lse is so large that ``exp(s - lse)`` loses digits.

    That happens for large scores and for masks of large finite numbers. Checked on the CPU only: on other devices the
    check would wait for the device.
    """
    return lse.device.type == "cpu" and bool((finite(lse).abs() > IMPRECISE_LSE).any())


def _log_normaliser(
    tiled: TiledOperands, rows: slice, lse: Tensor, lse_imprecise: bool
) -> tuple[Tensor, Tensor | None]:
    """Return what to subtract from the scores, one after the other, to get the logarithm of P.

    That is the lse; or, if the lse is imprecise, its two terms, computed again: the largest score and the logarithm of
    the sum of exponentials.
    """
    if not lse_imprecise:
        return finite(lse), None
    _, peak, total = _online_softmax(tiled, rows)
    return peak, torch.where(total == 0, 0.0, torch.log(total))


def _directional(problem: Problem, x: Operands, values: Values, tangents: Sequence[Tangent]) -> RowSeries:
    """Compute the derivatives of out and lse along every subset of the tangents, in the accumulator's dtype.

    In Taylor series, ``e = exp(s - lse_0)`` gives ``lse = lse_0 + log(rowsum(e))`` and ``out = (e Z) v / rowsum(e)``.
    At order 0, ``rowsum(e) = 1`` and ``out`` is given.
    """
    dtype, full = accumulator(x.query.dtype), (1 << len(tangents)) - 1
    forward_out, forward_lse = _row_series(values)
    orders = range(1, full + 1)
    out_series = {s: RowSum(x, x.value.shape[-1], dtype) for s in orders}
    lse_series = {s: RowSum(x, 1, dtype) for s in orders}
    lse_imprecise = _lse_is_imprecise(values.lse)
    for tiled in split_batch(problem, x, tangents):
        out_0, shift = tiled.by_row(forward_out), tiled.by_row(forward_lse)
        for rows in tiled.rows:
            query = tiled.scaled_query(rows)
            lse, rest = _log_normaliser(tiled, rows, tiled.row_block(shift, rows)[0], lse_imprecise)
            totals: TaylorSeries = {}
            sums: TaylorSeries = {}
            for cols in tiled.cols(rows):
                s = tiled.scores(query, tiled.key_block(tiled.key, cols), rows, cols)
                s[0] -= lse
                if rest is not None:
                    s[0] -= rest
                e = taylor.exp_(s, full)
                ez, value = weighted(e, tiled.dropout(rows, cols)), tiled.key_block(tiled.value, cols)
                for i in orders:
                    taylor.add_to(totals, i, e[i].sum(-1, keepdim=True) if i in e else None)
                    taylor.add_to(sums, i, taylor.coefficient(torch.bmm, ez, value, i))
            sums[0] = tiled.row_block(out_0, rows)[0]
            out, lse_t = taylor.divide_by_one_plus(sums, totals, full), taylor.log_of_one_plus(totals, full)
            for i in orders:
                if i in out:
                    out_series[i].add_rows(tiled, rows, out[i])
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
    """
    dtype, full = accumulator(x.query.dtype), (1 << len(tangents)) - 1
    query_grad = RowSum(x, x.query.shape[-1], dtype)
    key_grad, value_grad = KeySum(x.key.shape, x.key, dtype), KeySum(x.value.shape, x.value, dtype)
    bias = ScoreSum(x, dtype) if bias_grad else None
    lse_imprecise = _lse_is_imprecise(residuals[1][0])
    for tiled in split_batch(problem, x, tangents):
        out, lse, out_bar, lse_bar = map(tiled.by_row, (*residuals, *cotangent))
        for rows in tiled.rows:
            query, w, shift = tiled.scaled_query(rows), tiled.row_block(out_bar, rows), tiled.row_block(lse, rows)
            no_key = shift[0] == NEG_INF
            shift[0], rest = _log_normaliser(tiled, rows, shift[0], lse_imprecise)
            delta = taylor.product(_row_dot, w, tiled.row_block(out, rows), full)
            # The lse of a row without keys is constant: its cotangent contributes nothing.
            w_lse = {s: t.masked_fill(no_key, 0.0) for s, t in tiled.row_block(lse_bar, rows).items()}
            delta = taylor.subtract_(delta, w_lse)
            row_grad: TaylorSeries = {}
            for cols in tiled.cols(rows):
                key, value = tiled.key_block(tiled.key, cols), tiled.key_block(tiled.value, cols)
                z = tiled.dropout(rows, cols)
                s = taylor.subtract_(tiled.scores(query, key, rows, cols), shift)
                if rest is not None:
                    s[0] -= rest
                p = taylor.exp_(s, full)
                dp = weighted(taylor.product(row_key, w, value, full), z)
                ds = taylor.product(torch.mul, p, taylor.subtract_(dp, delta), full)
                taylor.add_to(row_grad, 0, taylor.coefficient(torch.bmm, ds, key, full))
                if (c := taylor.coefficient(key_sum, ds, query, full)) is not None:
                    key_grad.add_keys(tiled, cols, c)
                if (c := taylor.coefficient(key_sum, weighted(p, z), w, full)) is not None:
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


def _row_dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(-1, keepdim=True)
