"""Attention over tiles of the score matrix in plain PyTorch: memory linear in length, any device and dtype.

Three passes serve every order. :func:`forward` is the online softmax (Milakov and Gimelshein 2018, arXiv
1805.02867; Rabe and Staats 2021, arXiv 2112.05682). :func:`directional` and :func:`gradient` are ``D_n``
and ``G_n`` of the protocol, written once in jets: with no tangent the gradient is B, with one they are T
and S, and with more they are the third and higher derivatives of every backend.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
from torch import Tensor

from . import taylor as jets
from .base import Gradients, Operands, Problem, Rows, Tangent, Values, accumulator, in_turn
from .masking import NEG_INF, finite
from .taylor import Jet
from .tiling import ByKey, ByRow, ByScore, Part, key_sum, parts, row_key, weighted

name = "blockwise"

COARSE = 64.0  # of an lse: its rounding in float32 is then 4e-6

RowJets = tuple[Jet, Jet]  # of out [*B, Hq, N, Dv] and of lse [*B, Hq, N, 1]


def refuses(problem: Problem, x: Operands) -> str | None:
    """Serves everything."""
    return None


def forward(problem: Problem, x: Operands) -> Values:
    """F."""
    dtype = accumulator(x.query.dtype)
    out, lse = ByRow(x, x.value.shape[-1], dtype), ByRow(x, 1, dtype)
    for part in parts(problem, x):
        for rows in part.rows:
            row_out, peak, total = _online_softmax(part, rows)
            out.add_rows(part, rows, row_out)
            lse.add_rows(part, rows, peak + torch.log(total))
    return _values(x, out.result(), lse.result())


def backward(problem: Problem, x: Operands, values: Values, cotangent: Rows, *, bias_grad: bool) -> Gradients:
    """B."""
    return _gradient(problem, x, _row_jets(values), _row_jets(cotangent), [], bias_grad)


def forward_jvp(problem: Problem, x: Operands, values: Values, tangent: Tangent) -> Values:
    """T."""
    return directional(problem, x, values, [tangent])


def forward_with_jvp(problem: Problem, x: Operands, direction: Tangent) -> tuple[Values, Values]:
    """F, then T."""
    values = forward(problem, x)
    return values, forward_jvp(problem, x, values, direction)


def backward_jvp(
    problem: Problem,
    x: Operands,
    values: Values,
    values_tangent: Values,
    cotangent: Rows,
    tangent: Tangent,
    *,
    cotangent_tangent: Rows,
    bias_grad: bool,
) -> Gradients:
    """S."""
    residuals, w = _row_jets(values, values_tangent), _row_jets(cotangent, cotangent_tangent)
    return _gradient(problem, x, residuals, w, [tangent], bias_grad)


backward_with_jvp = in_turn(sys.modules[__name__])


def directional(problem: Problem, x: Operands, values: Values, tangents: Sequence[Tangent]) -> Values:
    """``D_n``: the mixed derivative of F along ``n >= 1`` tangents."""
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
    """``G_n``: the mixed derivative of B along ``n >= 1`` tangents.

    ``cotangent_tangent`` is the tangent of the cotangent along the first of them.
    """
    residuals = _directional(problem, x, values, tangents)
    return _gradient(problem, x, residuals, _row_jets(cotangent, cotangent_tangent), tangents, bias_grad)


def _values(x: Operands, out: Tensor, lse: Tensor) -> Values:
    """Results by rows as the protocol has them."""
    return Values(out.to(x.query.dtype), lse.squeeze(-1))


def _row_jets(*rows: Rows | Values) -> RowJets:
    """Jets of out and lse from their constants and, second, their tangents along the first direction."""
    out = {i: r.out for i, r in enumerate(rows) if r.out is not None}
    lse = {i: r.lse.unsqueeze(-1) for i, r in enumerate(rows) if r.lse is not None}
    return out, lse


def _online_softmax(part: Part, rows: slice) -> tuple[Tensor, Tensor, Tensor]:
    """Of one block of rows: out ``[L, G * rows, Dv]``, the largest score and the sum of exponentials from it."""
    query = part.scaled_query(rows)
    peak: Tensor | None = None
    total: Tensor | None = None
    out: Tensor | None = None
    for cols in part.cols(rows):
        s = part.scores(query, part.key_block(part.key, cols), rows, cols)[0]
        old, peak = peak, s.amax(-1, keepdim=True)
        if old is not None:
            peak = torch.maximum(old, peak)
        p = s.sub_(finite(peak)).exp_()
        tile_total = p.sum(-1, keepdim=True)
        tile_out = torch.bmm(weighted({0: p}, part.dropout(rows, cols))[0], part.key_block(part.value, cols)[0])
        if old is None or total is None or out is None:
            total, out = tile_total, tile_out
        else:
            shrink = torch.exp(old - finite(peak))
            total, out = total * shrink + tile_total, out * shrink + tile_out
    if peak is None or total is None or out is None:  # the band hides every key
        n, zeros = query[0].shape[:-1], query[0].new_zeros
        return zeros((*n, part.value[0].shape[-1])), zeros((*n, 1)), zeros((*n, 1))
    return torch.where(total == 0, 0.0, out / total), finite(peak), total


def _is_coarse(lse: Tensor) -> bool:
    """Whether some lse is so large that ``exp(s - lse)`` loses digits: scores, or a finite mask, beyond COARSE.

    Not looked at on other devices, whose programs it would halt.
    """
    return lse.device.type == "cpu" and bool((finite(lse).abs() > COARSE).any())


def _normaliser(part: Part, rows: slice, lse: Tensor, coarse: bool) -> tuple[Tensor, Tensor | None]:
    """What to subtract from scores, one after the other, for the logarithm of P: the lse, or its two parts anew."""
    if not coarse:
        return finite(lse), None
    _, peak, total = _online_softmax(part, rows)
    return peak, torch.where(total == 0, 0.0, torch.log(total))


def _directional(problem: Problem, x: Operands, values: Values, tangents: Sequence[Tangent]) -> RowJets:
    """The derivatives of out and lse along every subset of the tangents, in the accumulator's dtype.

    In jets, ``e = exp(s - lse_0)`` gives ``lse = lse_0 + log(rowsum(e))`` and ``out = (e Z) v / rowsum(e)``,
    where at order 0 ``rowsum(e) = 1`` and out is known.
    """
    dtype, full = accumulator(x.query.dtype), (1 << len(tangents)) - 1
    known_out, known_lse = _row_jets(values)
    orders = range(1, full + 1)
    out_jet = {s: ByRow(x, x.value.shape[-1], dtype) for s in orders}
    lse_jet = {s: ByRow(x, 1, dtype) for s in orders}
    coarse = _is_coarse(values.lse)
    for part in parts(problem, x, tangents):
        known, shift = part.by_row(known_out), part.by_row(known_lse)
        for rows in part.rows:
            query = part.scaled_query(rows)
            lse, rest = _normaliser(part, rows, part.row_block(shift, rows)[0], coarse)
            totals: Jet = {}
            sums: Jet = {}
            for cols in part.cols(rows):
                s = part.scores(query, part.key_block(part.key, cols), rows, cols)
                s[0] -= lse
                if rest is not None:
                    s[0] -= rest
                e = jets.exp_(s, full)
                ez, value = weighted(e, part.dropout(rows, cols)), part.key_block(part.value, cols)
                for i in orders:
                    jets.add_to(totals, i, e[i].sum(-1, keepdim=True) if i in e else None)
                    jets.add_to(sums, i, jets.coefficient(torch.bmm, ez, value, i))
            sums[0] = part.row_block(known, rows)[0]
            out, lse_t = jets.divide_by_one_plus(sums, totals, full), jets.log_of_one_plus(totals, full)
            for i in orders:
                if i in out:
                    out_jet[i].add_rows(part, rows, out[i])
                if i in lse_t:
                    lse_jet[i].add_rows(part, rows, lse_t[i])
    out_all = {0: known_out[0], **{s: t.result() for s, t in out_jet.items()}}
    return out_all, {0: known_lse[0], **{s: t.result() for s, t in lse_jet.items()}}


def _gradient(
    problem: Problem,
    x: Operands,
    residuals: RowJets,
    cotangent: RowJets,
    tangents: Sequence[Tangent],
    bias_grad: bool,
) -> Gradients:
    """The derivative of B along all the tangents, from the jets of its residuals and of its cotangent.

    B, in jets: ``p = exp(s - lse)``, ``delta = rowsum(out_bar out) - lse_bar``, ``dp = Z (out_bar v^T)``,
    ``ds = p (dp - delta)``; then query ``scale ds k``, key ``scale ds^T q``, value ``(p Z)^T out_bar``,
    bias ``ds``, of each of which the coefficient at the full set is wanted.
    """
    dtype, full = accumulator(x.query.dtype), (1 << len(tangents)) - 1
    query_grad = ByRow(x, x.query.shape[-1], dtype)
    key_grad, value_grad = ByKey(x.key.shape, x.key, dtype), ByKey(x.value.shape, x.value, dtype)
    bias = ByScore(x, dtype) if bias_grad else None
    coarse = _is_coarse(residuals[1][0])
    for part in parts(problem, x, tangents):
        out, lse, out_bar, lse_bar = map(part.by_row, (*residuals, *cotangent))
        for rows in part.rows:
            query, w, shift = part.scaled_query(rows), part.row_block(out_bar, rows), part.row_block(lse, rows)
            no_key = shift[0] == NEG_INF
            shift[0], rest = _normaliser(part, rows, shift[0], coarse)
            delta = jets.product(_row_dot, w, part.row_block(out, rows), full)
            # The lse of a row without keys is constant, whatever its cotangent.
            w_lse = {s: t.masked_fill(no_key, 0.0) for s, t in part.row_block(lse_bar, rows).items()}
            delta = jets.subtract_(delta, w_lse)
            row_grad: Jet = {}
            for cols in part.cols(rows):
                key, value = part.key_block(part.key, cols), part.key_block(part.value, cols)
                z = part.dropout(rows, cols)
                s = jets.subtract_(part.scores(query, key, rows, cols), shift)
                if rest is not None:
                    s[0] -= rest
                p = jets.exp_(s, full)
                dp = weighted(jets.product(row_key, w, value, full), z)
                ds = jets.product(torch.mul, p, jets.subtract_(dp, delta), full)
                jets.add_to(row_grad, 0, jets.coefficient(torch.bmm, ds, key, full))
                if (c := jets.coefficient(key_sum, ds, query, full)) is not None:
                    key_grad.add_keys(part, cols, c)
                if (c := jets.coefficient(key_sum, weighted(p, z), w, full)) is not None:
                    value_grad.add_keys(part, cols, c)
                if bias is not None and full in ds:
                    bias.add_scores(part, rows, cols, ds[full])
            if row_grad:
                query_grad.add_rows(part, rows, row_grad[0] * problem.scale)
    return Gradients(
        query_grad.result().to(x.query.dtype),
        key_grad.result().to(x.key.dtype),
        value_grad.result().to(x.value.dtype),
        None if bias is None or x.bias is None else bias.result().to(x.bias.dtype),
    )


def _row_dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(-1, keepdim=True)
