"""Attention over tiles of the score matrix in plain PyTorch: memory linear in length, any device and dtype.

Three passes serve every order. :func:`forward` is the online softmax (Milakov and Gimelshein 2018, arXiv
1805.02867; Rabe and Staats 2021, arXiv 2112.05682). :func:`directional` and :func:`gradient` are ``D_n``
and ``G_n`` of the protocol, written once in jets: with no tangent the gradient is B, with one they are T
and S, and with more they are the third and higher derivatives of every backend.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import _jets as jets
from ._jets import Jet
from ._protocol import Gradients, Operands, Problem, Rows, Tangent, Values, accumulator
from ._scores import NEG_INF, finite, group, key_sum, row_key, row_sum, split_heads, tile_of, ungroup
from ._tiles import Part, batches, row_blocks, take, weighted

name = "blockwise"

RowJets = tuple[Jet, Jet]  # of out and of lse


def refuses(problem: Problem, x: Operands) -> str | None:
    """Serves everything."""
    return None


def forward(problem: Problem, x: Operands) -> Values:
    """F."""
    g = group(x)
    out = g.query.new_empty((*g.query.shape[:-1], g.value.shape[-1]))
    lse = g.query.new_empty(g.query.shape[:-1], dtype=accumulator(x.query.dtype))
    for batch in batches(g):
        part = Part(problem, g, batch)
        for rows in row_blocks(g):
            row_out, row_lse = _online_softmax(part, rows)
            out[(*batch, rows)] = row_out
            lse[(*batch, rows)] = row_lse.squeeze(-1)
    return Values(out.flatten(-4, -3), lse.flatten(-3, -2))


def backward(problem: Problem, x: Operands, values: Values, cotangent: Rows, *, bias_grad: bool) -> Gradients:
    """B."""
    return _gradient(problem, x, _row_jets(values), _row_jets(cotangent), [], bias_grad)


def tangent(problem: Problem, x: Operands, values: Values, tangent: Tangent) -> Values:
    """T."""
    return directional(problem, x, values, [tangent])


def second(
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


def directional(problem: Problem, x: Operands, values: Values, tangents: Sequence[Tangent]) -> Values:
    """``D_n``: the mixed derivative of F along ``n >= 1`` tangents."""
    out, lse = _directional(problem, x, values, tangents)
    full = (1 << len(tangents)) - 1
    return Values(out[full].to(x.query.dtype), lse[full])


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


def _row_jets(*rows: Rows | Values) -> RowJets:
    """Jets of out and lse from their constants and, second, their tangents along the first direction."""
    out = {i: r.out for i, r in enumerate(rows) if r.out is not None}
    lse = {i: r.lse for i, r in enumerate(rows) if r.lse is not None}
    return out, lse


def _split(t: Tangent, kv_heads: int) -> Tangent:
    return Tangent(*(None if part is None else split_heads(part, kv_heads) for part in t))


def _split_rows(rows: RowJets, kv_heads: int) -> RowJets:
    """The jets with split heads, lse as a column."""
    out, lse = rows
    return (
        {s: split_heads(t, kv_heads) for s, t in out.items()},
        {s: split_heads(t.unsqueeze(-1), kv_heads) for s, t in lse.items()},
    )


def _online_softmax(part: Part, rows: slice) -> tuple[Tensor, Tensor]:
    """Out ``[…, rows, Dv]`` and lse ``[…, rows, 1]`` of one block of rows."""
    query = part.scaled_query(rows)
    peak = query[0].new_full((*query[0].shape[:-1], 1), NEG_INF)
    total = torch.zeros_like(peak)
    out: Tensor | None = None
    for cols in part.visited(rows):
        s = part.scores(query, part.at(part.key, cols), rows, cols)[0]
        old, peak = peak, torch.maximum(peak, s.amax(-1, keepdim=True))
        p = s.sub_(finite(peak)).exp_()
        tile_total = p.sum(-1, keepdim=True)
        tile_out = row_sum(weighted({0: p}, part.dropout(rows, cols))[0], part.at(part.value, cols)[0])
        if out is None:
            total, out = tile_total, tile_out
        else:
            shrink = torch.exp(old - finite(peak))
            total, out = total * shrink + tile_total, out * shrink + tile_out
    if out is None:  # the band hides every key
        out = query[0].new_zeros((*query[0].shape[:-1], part.x.value.shape[-1]))
    return torch.where(total == 0, 0.0, out / total), finite(peak) + torch.log(total)


def _directional(problem: Problem, x: Operands, values: Values, tangents: Sequence[Tangent]) -> RowJets:
    """The derivatives of out and lse along every subset of the tangents, in the accumulator's dtype.

    In jets, ``e = exp(s - lse_0)`` gives ``lse = lse_0 + log(rowsum(e))`` and ``out = (e Z) v / rowsum(e)``,
    where at order 0 ``rowsum(e) = 1`` and out is known.
    """
    g, kv_heads, dtype = group(x), x.key.shape[-3], accumulator(x.query.dtype)
    directions = [_split(t, kv_heads) for t in tangents]
    (known, lse), full = _split_rows(_row_jets(values), kv_heads), (1 << len(tangents)) - 1
    out_jet = {s: torch.zeros_like(known[0], dtype=dtype) for s in jets.subsets(full)}
    lse_jet = {s: torch.zeros_like(lse[0], dtype=dtype) for s in jets.subsets(full)}
    for batch in batches(g):
        part = Part(problem, g, batch, directions)
        for rows in row_blocks(g):
            at = (*batch, rows)
            query, shift = part.scaled_query(rows), finite(lse[0][at])
            totals: Jet = {}
            sums: Jet = {}
            for cols in part.visited(rows):
                s = part.scores(query, part.at(part.key, cols), rows, cols)
                s[0] -= shift
                e = jets.exp_(s, full)
                ez, value = weighted(e, part.dropout(rows, cols)), part.at(part.value, cols)
                for i in range(1, full + 1):
                    jets.add_to(totals, i, e[i].sum(-1, keepdim=True) if i in e else None)
                    jets.add_to(sums, i, jets.coefficient(row_sum, ez, value, i))
            sums[0] = known[0][at].to(dtype)
            for i, t in jets.divide_by_one_plus(sums, totals, full).items():
                out_jet[i][at] = t
            for i, t in jets.log_of_one_plus(totals, full).items():
                lse_jet[i][at] = t
    lse_jet[0] = lse[0]
    return (
        {s: t.flatten(-4, -3) for s, t in out_jet.items()},
        {s: t.flatten(-4, -3).squeeze(-1) for s, t in lse_jet.items()},
    )


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
    g, kv_heads, dtype = group(x), x.key.shape[-3], accumulator(x.query.dtype)
    directions, full = [_split(t, kv_heads) for t in tangents], (1 << len(tangents)) - 1
    (out, lse), (out_bar, lse_bar) = _split_rows(residuals, kv_heads), _split_rows(cotangent, kv_heads)
    wanted = (*g[:3], g.bias if bias_grad else None)
    grads = Gradients(*(None if t is None else t.new_zeros(t.shape, dtype=dtype) for t in wanted))  # type: ignore
    for batch in batches(g):
        part = Part(problem, g, batch, directions)
        key_grad, value_grad = take(grads.key, batch), take(grads.value, batch)
        bias_part = None if grads.bias is None else take(grads.bias, batch)
        for rows in row_blocks(g):
            at = (*batch, rows)
            query, w, shift = part.scaled_query(rows), _rows_at(out_bar, at, dtype), _rows_at(lse, at, dtype)
            no_key = shift[0] == NEG_INF
            shift[0] = finite(shift[0])
            delta = jets.product(_row_dot, w, _rows_at(out, at, dtype), full)
            # The lse of a row without keys is constant, whatever its cotangent.
            delta = jets.subtract_(
                delta, {s: t.masked_fill(no_key, 0.0) for s, t in _rows_at(lse_bar, at, dtype).items()}
            )
            query_grad: Jet = {}
            for cols in part.visited(rows):
                key, value, z = part.at(part.key, cols), part.at(part.value, cols), part.dropout(rows, cols)
                p = jets.exp_(jets.subtract_(part.scores(query, key, rows, cols), shift), full)
                dp = weighted(jets.product(row_key, w, value, full), z)
                ds = jets.product(torch.mul, p, jets.subtract_(dp, delta), full)
                jets.add_to(query_grad, 0, jets.coefficient(row_sum, ds, key, full))
                if (c := jets.coefficient(key_sum, ds, query, full)) is not None:
                    key_grad[..., cols, :] += c
                if (c := jets.coefficient(key_sum, weighted(p, z), w, full)) is not None:
                    value_grad[..., cols, :] += c
                if bias_part is not None and full in ds:
                    tile = tile_of(bias_part, rows, cols)
                    tile += ds[full].sum_to_size(tile.shape)
            if query_grad:
                grads.query[at] = query_grad[0] * problem.scale
    return ungroup(grads, x)


def _rows_at(x: Jet, at: tuple[slice, ...], dtype: torch.dtype) -> Jet:
    return {s: t[at].to(dtype) for s, t in x.items()}


def _row_dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(-1, keepdim=True)
