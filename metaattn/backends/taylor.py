"""Truncated multivariate Taylor series: mixed directional derivatives to any order.

A series is ``x = sum_A x_A e_A`` over sets ``A`` of tangents, where ``e_i e_i = 0``. Its coefficient at the full set is
the mixed derivative along all tangents. (These are nilpotent, or hyper-dual, numbers; Griewank and Walther, Evaluating
Derivatives, ch. 13.) Sets are bit masks. Absent coefficients are zero and cost nothing. A formula written once with
series is therefore the plain formula at order 0, and computes exactly the products that the chain rule needs at every
other order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

TaylorSeries = dict[int, Tensor]


def subsets(full: int) -> Iterator[int]:
    """Yield the subsets of ``full``, including itself and 0, in ascending order."""
    return (s for s in range(full + 1) if s & full == s)


def series(value: Tensor | None, tangents: Iterable[Tensor | None]) -> TaylorSeries:
    """Return ``value + sum_i tangents[i] e_i``; ``None`` is zero."""
    terms = [(0, value), *((1 << i, t) for i, t in enumerate(tangents))]
    return {s: t for s, t in terms if t is not None}


def add_to(total: TaylorSeries, at: int, term: Tensor | None) -> None:
    """Add ``term e_at`` to ``total``; ``None`` is zero."""
    if term is not None:
        total[at] = total[at] + term if at in total else term


def coefficient(op: Callable[[Tensor, Tensor], Tensor], a: TaylorSeries, b: TaylorSeries, at: int) -> Tensor | None:
    """Return the coefficient at ``at`` of ``op(a, b)`` for a bilinear ``op``; ``None`` if it is zero."""
    total: TaylorSeries = {}
    for s in subsets(at):
        if s in a and at ^ s in b:
            add_to(total, 0, op(a[s], b[at ^ s]))
    return total.get(0)


def product(op: Callable[[Tensor, Tensor], Tensor], a: TaylorSeries, b: TaylorSeries, full: int) -> TaylorSeries:
    """Return ``op(a, b)`` for a bilinear ``op``, at every subset of ``full``."""
    terms = ((s, coefficient(op, a, b, s)) for s in subsets(full))
    return {s: t for s, t in terms if t is not None}


def subtract_(a: TaylorSeries, b: TaylorSeries) -> TaylorSeries:
    """Subtract ``b`` from ``a`` in place. No other tensor may share memory with the coefficients of ``a``."""
    for s, t in b.items():
        a[s] = a[s].sub_(t) if s in a else -t
    return a


def _lowest(s: int) -> int:
    return s & -s


def exp_(x: TaylorSeries, full: int) -> TaylorSeries:
    """Return ``exp(x)``, overwriting the constant of ``x``.

    Uses ``d exp(x) = exp(x) dx`` along the lowest tangent of each set.
    """
    out = {0: x[0].exp_()}
    for s in subsets(full):
        if s:
            i = _lowest(s)
            derivative = {r ^ i: t for r, t in x.items() if r & i}
            if (t := coefficient(torch.mul, derivative, out, s ^ i)) is not None:
                out[s] = t
    return out


def divide_by_one_plus(a: TaylorSeries, x: TaylorSeries, full: int) -> TaylorSeries:
    """Return ``a / (1 + x)`` for a series ``x`` without a constant."""
    out: TaylorSeries = {}
    for s in subsets(full):
        _set_difference(out, s, a.get(s), coefficient(torch.mul, x, out, s))
    return out


def log_of_one_plus(x: TaylorSeries, full: int) -> TaylorSeries:
    """Return ``log(1 + x)`` for a series ``x`` without a constant, from ``(1 + x) d log(1 + x) = dx``."""
    out: TaylorSeries = {}
    for s in subsets(full):
        if s:
            i = _lowest(s)
            derivative = {r ^ i: t for r, t in out.items() if r & i}
            _set_difference(out, s, x.get(s), coefficient(torch.mul, derivative, x, s ^ i))
    return out


def _set_difference(out: TaylorSeries, at: int, a: Tensor | None, b: Tensor | None) -> None:
    if a is not None or b is not None:
        out[at] = a if b is None else -b if a is None else a - b  # type: ignore[assignment]
