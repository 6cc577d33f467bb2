"""Dense attention by the formulas, on any device and in any dtype: the exact results for tests of other backends.

Read this together with the formulas of ``docs/mathematics.md``. A dot there is ``_t`` (tangent) here, a bar is ``_bar``
(cotangent). Memory is quadratic in the length.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .base import Backend, BackwardJvpInputs, Gradients, Operands, Problem, Rows, Tangent, Values, accumulator
from .masking import NEG_INF, additive_mask, dropout_weight, group, key_sum, row_key, row_sum, split_heads, ungroup


class _Dense(NamedTuple):
    """Operands with split heads in the accumulator's dtype, with the whole score matrix and the dropout weights."""

    query: Tensor
    key: Tensor
    value: Tensor
    scale: float
    scores: Tensor  # -inf where hidden
    dropout: Tensor | float  # Z

    @classmethod
    def create(cls, problem: Problem, x: Operands) -> _Dense:
        dtype = accumulator(x.query.dtype)
        g = group(x)
        query, key, value = (t.to(dtype) for t in (g.query, g.key, g.value))
        rows, cols = slice(0, query.shape[-2]), slice(0, key.shape[-2])
        scores = problem.scale * row_key(query, key)
        if g.bias is not None:
            scores = scores + g.bias.to(dtype)
        if (mask := additive_mask(problem, g.mask, rows, cols, scores)) is not None:
            scores = scores + mask
        z = dropout_weight(problem, g.seeds, rows, cols, dtype)
        return cls(query, key, value, problem.scale, scores, 1.0 if z is None else z)

    def probabilities(self) -> Tensor:
        """Return P, with zeros in a row without keys.

        Not computed as ``exp(scores - lse)``: where scores are huge, the rounding of the lse is too large.
        """
        empty = (self.scores == NEG_INF).all(-1, keepdim=True)
        return self.scores.masked_fill(empty, 0.0).softmax(-1).masked_fill(empty, 0.0)

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


def _delta(p: Tensor, dp: Tensor, lse: Tensor, lse_bar: Tensor) -> Tensor:
    """Return ``rowsum(P dP) - lse_bar``. The lse of a row without keys is constant: no ``lse_bar`` there.

    Not computed as ``rowsum(out_bar * out)``, which is equal, but rounded otherwise: where a row has all its weight on
    one key, ``dP - delta`` must be zero.
    """
    return (p * dp).sum(-1, keepdim=True) - lse_bar.masked_fill(lse == NEG_INF, 0.0)


class ReferenceBackend(Backend):
    """The formulas, on the whole score matrix."""

    name = "reference"

    def forward(self, problem: Problem, x: Operands) -> Values:
        """Compute F."""
        d = _Dense.create(problem, x)
        lse = d.scores.logsumexp(-1, keepdim=True)
        p = d.probabilities()
        out = row_sum(p * d.dropout, d.value)
        return Values(out.flatten(-4, -3).to(x.query.dtype), lse.flatten(-4, -3).squeeze(-1))

    def backward(self, problem: Problem, x: Operands, values: Values, cotangent: Rows, *, bias_grad: bool) -> Gradients:
        """Compute B."""
        d = _Dense.create(problem, x)
        width = x.value.shape[-1]
        out_bar, lse_bar = d.rows(cotangent.out, width), d.rows(cotangent.lse, 0)

        p = d.probabilities()
        dp = row_key(out_bar, d.value) * d.dropout
        ds = p * (dp - _delta(p, dp, d.rows(values.lse, 0), lse_bar))
        return _gradients(
            x,
            d.scale * row_sum(ds, d.key),
            d.scale * key_sum(ds, d.query),
            key_sum(p * d.dropout, out_bar),
            ds if bias_grad else None,
        )

    def forward_jvp(self, problem: Problem, x: Operands, values: Values, tangent: Tangent) -> Values:
        """Compute T."""
        d = _Dense.create(problem, x)
        query_t, key_t, value_t, bias_t = d.tangent(tangent)

        p = d.probabilities()
        s_t = d.scale * (row_key(query_t, d.key) + row_key(d.query, key_t)) + bias_t
        mu = (p * s_t).sum(-1, keepdim=True)
        p_t = p * (s_t - mu)
        out_t = row_sum(p_t * d.dropout, d.value) + row_sum(p * d.dropout, value_t)
        return Values(out_t.flatten(-4, -3).to(x.query.dtype), mu.flatten(-4, -3).squeeze(-1))

    def backward_jvp(self, problem: Problem, x: Operands, inputs: BackwardJvpInputs) -> Gradients:
        """Compute S."""
        values, values_tangent, cotangent, tangent, cotangent_tangent, bias_grad = inputs
        d = _Dense.create(problem, x)
        width = x.value.shape[-1]
        query_t, key_t, value_t, bias_t = d.tangent(tangent)
        lse, mu = d.rows(values.lse, 0), d.rows(values_tangent.lse, 0)
        out_bar, lse_bar = d.rows(cotangent.out, width), d.rows(cotangent.lse, 0)
        out_bar_t, lse_bar_t = d.rows(cotangent_tangent.out, width), d.rows(cotangent_tangent.lse, 0)

        p = d.probabilities()
        s_t = d.scale * (row_key(query_t, d.key) + row_key(d.query, key_t)) + bias_t
        p_t = p * (s_t - mu)
        dp = row_key(out_bar, d.value) * d.dropout
        dp_t = (row_key(out_bar, value_t) + row_key(out_bar_t, d.value)) * d.dropout
        centred = dp - _delta(p, dp, lse, lse_bar)
        delta_t = (p_t * dp).sum(-1, keepdim=True) + _delta(p, dp_t, lse, lse_bar_t)
        ds = p * centred
        ds_t = p_t * centred + p * (dp_t - delta_t)
        return _gradients(
            x,
            d.scale * (row_sum(ds_t, d.key) + row_sum(ds, key_t)),
            d.scale * (key_sum(ds_t, d.query) + key_sum(ds, query_t)),
            key_sum(p_t * d.dropout, out_bar) + key_sum(p * d.dropout, out_bar_t),
            ds_t if bias_grad else None,
        )


backend = ReferenceBackend()


def _gradients(x: Operands, query: Tensor, key: Tensor, value: Tensor, scores: Tensor | None) -> Gradients:
    """Return the gradients in the operands' shapes; that of the scores, if given, summed to the bias's."""
    if scores is not None:
        assert x.bias is not None
        scores = scores.sum_to_size(split_heads(x.bias, x.key.shape[-3]).shape)
    return ungroup(Gradients(query, key, value, scores), x)
