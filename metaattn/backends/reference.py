"""Dense attention by the formulas, on any device and in any dtype: the exact results for tests of other backends.

Read this together with the formulas of ``docs/mathematics.md``. A dot there is ``_t`` (tangent) here, a bar is ``_bar``
(cotangent). Memory is quadratic in the length.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .base import Backend, BackwardJvpInputs, Gradients, Operands, Problem, Rows, Tangent, Values, accumulator
from .masking import (
    NEG_INF,
    additive_mask,
    dropout_weight,
    finite,
    group,
    key_sum,
    may_hide,
    product_of_shown,
    row_key,
    row_sum,
    split_heads,
    ungroup,
    zero_products_are_zero,
)


class _Dense(NamedTuple):
    """Operands with split heads in the accumulator's dtype, with the whole score matrix and the dropout weights."""

    query: Tensor
    key: Tensor
    value: Tensor
    scale: float
    scores: Tensor  # -inf where hidden
    dropout: Tensor | float  # Z
    hidden: Tensor | None  # where the scores are -inf; None if products need no care: all numbers are finite

    @classmethod
    def create(cls, problem: Problem, x: Operands, *others: Tensor | None) -> _Dense:
        """Return them; ``others`` are further tensors of the call that enter products."""
        dtype = accumulator(x.query.dtype)
        g = group(x)
        query, key, value = (t.to(dtype) for t in (g.query, g.key, g.value))
        rows, cols = slice(0, query.shape[-2]), slice(0, key.shape[-2])
        scores = problem.scale * row_key(query, key)
        mask = additive_mask(problem, g.mask, rows, cols, scores)
        hidden = None
        for term in (None if g.bias is None else g.bias.to(dtype), mask):
            if term is not None:  # not NaN where the term hides what is NaN
                scores = torch.where(term == NEG_INF, NEG_INF, scores + term)
        if may_hide(problem, x) and not zero_products_are_zero(x, others):
            hidden = scores == NEG_INF
        z = dropout_weight(problem, g.seeds, rows, cols, dtype)
        return cls(query, key, value, problem.scale, scores, 1.0 if z is None else z, hidden)

    def shown(self, weights: Tensor) -> Tensor:
        """Return weights, zero where they are hidden."""
        return weights if self.hidden is None else weights.masked_fill(self.hidden, 0.0)

    def row_sum(self, weights: Tensor, b: Tensor) -> Tensor:
        """Return ``weights b``."""
        return row_sum(weights, b) if self.hidden is None else product_of_shown(row_sum, weights, b, self.hidden)

    def key_sum(self, weights: Tensor, a: Tensor) -> Tensor:
        """Return ``weights^T a``, summed over the group."""
        return key_sum(weights, a) if self.hidden is None else product_of_shown(key_sum, weights, a, self.hidden)

    def probabilities(self) -> Tensor:
        """Return P, with zeros in a row without keys.

        Not computed as ``exp(scores - lse)``: where scores are huge, the rounding of the lse is too large.
        """
        empty = (self.scores == NEG_INF).all(-1, keepdim=True)
        return self.shown(self.scores.masked_fill(empty, 0.0).softmax(-1).masked_fill(empty, 0.0))

    def rows(self, t: Tensor | None, width: int) -> Tensor:
        """Split the heads of ``[*B, Hq, Nq]`` (if ``width`` is 0) or ``[*B, Hq, Nq, width]``; ``None`` is zeros."""
        kv_heads, groups = self.scores.shape[-4:-2]
        if t is None:
            return self.scores.new_zeros((*self.scores.shape[:-1], width or 1))
        if not width:
            t = t.unsqueeze(-1)
        return t.unflatten(-3, (kv_heads, groups)).to(self.scores.dtype)

    def tangent(self, t: Tangent) -> tuple[Tensor, Tensor, Tensor, Tensor | float]:
        """Split the heads of the tangents; ``None`` is zeros."""
        primals = (self.query, self.key, self.value)
        query, key, value = (
            torch.zeros_like(p) if d is None else split_heads(d, self.key.shape[-4]).to(p.dtype)
            for p, d in zip(primals, t[:3], strict=True)
        )
        bias = 0.0 if t.bias is None else split_heads(t.bias, self.key.shape[-4]).to(query.dtype)
        return query, key, value, bias


def _delta(p_dp: Tensor, lse: Tensor, lse_bar: Tensor) -> Tensor:
    """Return ``rowsum(P dP) - lse_bar``. The lse of a row without keys is constant: no ``lse_bar`` there.

    Not computed as ``rowsum(out_bar * out)``, which is equal, but rounded otherwise: where a row has all its weight on
    one key, ``dP - delta`` must be zero.
    """
    return p_dp.sum(-1, keepdim=True) - lse_bar.masked_fill(lse == NEG_INF, 0.0)


class ReferenceBackend(Backend):
    """The formulas, on the whole score matrix."""

    name = "reference"

    def forward(self, problem: Problem, x: Operands) -> Values:
        """Compute F."""
        d = _Dense.create(problem, x)
        lse = d.scores.logsumexp(-1, keepdim=True)
        lse = lse.masked_fill(lse == torch.inf, torch.nan)  # the softmax of an infinite score is NaN
        p = d.probabilities()
        out = d.row_sum(p * d.dropout, d.value)
        return Values(out.flatten(-4, -3).to(x.query.dtype), lse.flatten(-4, -3).squeeze(-1))

    def backward(self, problem: Problem, x: Operands, values: Values, cotangent: Rows, *, bias_grad: bool) -> Gradients:
        """Compute B."""
        d = _Dense.create(problem, x, finite(values.lse), *cotangent)
        width = x.value.shape[-1]
        out_bar, lse_bar = d.rows(cotangent.out, width), d.rows(cotangent.lse, 0)

        p = d.probabilities()
        dp = row_key(out_bar, d.value) * d.dropout
        ds = d.shown(p * (dp - _delta(d.shown(p * dp), d.rows(values.lse, 0), lse_bar)))
        return _gradients(
            x,
            d.scale * d.row_sum(ds, d.key),
            d.scale * d.key_sum(ds, d.query),
            d.key_sum(p * d.dropout, out_bar),
            ds if bias_grad else None,
        )

    def forward_jvp(self, problem: Problem, x: Operands, values: Values, tangent: Tangent) -> Values:
        """Compute T."""
        d = _Dense.create(problem, x, finite(values.lse), *tangent)
        query_t, key_t, value_t, bias_t = d.tangent(tangent)

        p = d.probabilities()
        s_t = d.scale * (row_key(query_t, d.key) + row_key(d.query, key_t)) + bias_t
        mu = d.shown(p * s_t).sum(-1, keepdim=True)
        p_t = d.shown(p * (s_t - mu))
        out_t = d.row_sum(p_t * d.dropout, d.value) + d.row_sum(p * d.dropout, value_t)
        return Values(out_t.flatten(-4, -3).to(x.query.dtype), mu.flatten(-4, -3).squeeze(-1))

    def backward_jvp(self, problem: Problem, x: Operands, inputs: BackwardJvpInputs) -> Gradients:
        """Compute S."""
        values, _, cotangent, tangent, cotangent_tangent, bias_grad = inputs
        d = _Dense.create(problem, x, finite(values.lse), *cotangent, *tangent, *cotangent_tangent)
        width = x.value.shape[-1]
        query_t, key_t, value_t, bias_t = d.tangent(tangent)
        lse = d.rows(values.lse, 0)
        out_bar, lse_bar = d.rows(cotangent.out, width), d.rows(cotangent.lse, 0)
        out_bar_t, lse_bar_t = d.rows(cotangent_tangent.out, width), d.rows(cotangent_tangent.lse, 0)

        p = d.probabilities()
        s_t = d.scale * (row_key(query_t, d.key) + row_key(d.query, key_t)) + bias_t
        p_t = d.shown(p * (s_t - d.shown(p * s_t).sum(-1, keepdim=True)))
        dp = row_key(out_bar, d.value) * d.dropout
        dp_t = (row_key(out_bar, value_t) + row_key(out_bar_t, d.value)) * d.dropout
        centred = dp - _delta(d.shown(p * dp), lse, lse_bar)
        delta_t = _delta(d.shown(p_t * dp + p * dp_t), lse, lse_bar_t)
        ds = d.shown(p * centred)
        ds_t = d.shown(p_t * centred + p * (dp_t - delta_t))
        return _gradients(
            x,
            d.scale * (d.row_sum(ds_t, d.key) + d.row_sum(ds, key_t)),
            d.scale * (d.key_sum(ds_t, d.query) + d.key_sum(ds, query_t)),
            d.key_sum(p_t * d.dropout, out_bar) + d.key_sum(p * d.dropout, out_bar_t),
            ds_t if bias_grad else None,
        )


backend = ReferenceBackend()


def _gradients(x: Operands, query: Tensor, key: Tensor, value: Tensor, scores: Tensor | None) -> Gradients:
    """Return the gradients in the operands' shapes; that of the scores, if given, summed to the bias's."""
    if scores is not None:
        assert x.bias is not None
        scores = scores.sum_to_size(split_heads(x.bias, x.key.shape[-3]).shape)
    return ungroup(Gradients(query, key, value, scores), x)
