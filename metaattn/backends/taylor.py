"""Arithmetic of mixed directional derivatives, to any order.

A jet is ``x = sum_A x_A e_A`` over sets ``A`` of tangents, where ``e_i e_i = 0``: its coefficient at the
full set is the mixed derivative along all of them (nilpotent, or hyper-dual, numbers; Griewank and
Walther, Evaluating Derivatives, ch. 13). Sets are bit masks, absent coefficients are zero and cost
nothing, so that a formula written once in jets is the plain formula at order 0 and exactly the products
that the chain rule needs at every other order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

Jet = dict[int, Tensor]


def subsets(full: int) -> Iterator[int]:
    """The subsets of ``full``, itself and 0 included, in ascending order."""
    return (s for s in range(full + 1) if s & full == s)


def jet(value: Tensor | None, tangents: Iterable[Tensor | None]) -> Jet:
    """``value + sum_i tangents[i] e_i``; ``None`` is zero."""
    terms = [(0, value), *((1 << i, t) for i, t in enumerate(tangents))]
    return {s: t for s, t in terms if t is not None}


def add_to(total: Jet, at: int, term: Tensor | None) -> None:
    """``total += term e_at``; ``None`` is zero."""
    if term is not None:
        total[at] = total[at] + term if at in total else term


def coefficient(op: Callable[[Tensor, Tensor], Tensor], a: Jet, b: Jet, at: int) -> Tensor | None:
    """The coefficient at ``at`` of ``op(a, b)``, for a bilinear ``op``; ``None`` if it is zero."""
    total: Jet = {}
    for s in subsets(at):
        if s in a and at ^ s in b:
            add_to(total, 0, op(a[s], b[at ^ s]))
    return total.get(0)


def product(op: Callable[[Tensor, Tensor], Tensor], a: Jet, b: Jet, full: int) -> Jet:
    """``op(a, b)`` for a bilinear ``op``, at every subset of ``full``."""
    terms = ((s, coefficient(op, a, b, s)) for s in subsets(full))
    return {s: t for s, t in terms if t is not None}


def subtract_(a: Jet, b: Jet) -> Jet:
    """``a -= b``, in place: the terms of ``a`` must be the caller's own."""
    for s, t in b.items():
        a[s] = a[s].sub_(t) if s in a else -t
    return a


def _lowest(s: int) -> int:
    return s & -s


def exp_(x: Jet, full: int) -> Jet:
    """``exp(x)``, the constant in place: from ``d exp(x) = exp(x) dx``, along the lowest tangent of each set."""
    out = {0: x[0].exp_()}
    for s in subsets(full):
        if s:
            i = _lowest(s)
            derivative = {r ^ i: t for r, t in x.items() if r & i}
            if (t := coefficient(torch.mul, derivative, out, s ^ i)) is not None:
                out[s] = t
    return out


def divide_by_one_plus(a: Jet, x: Jet, full: int) -> Jet:
    """``a / (1 + x)`` for a jet ``x`` without a constant."""
    out: Jet = {}
    for s in subsets(full):
        _set_difference(out, s, a.get(s), coefficient(torch.mul, x, out, s))
    return out


def log_of_one_plus(x: Jet, full: int) -> Jet:
    """``log(1 + x)`` for a jet without a constant: from ``(1 + x) d log(1 + x) = dx``."""
    out: Jet = {}
    for s in subsets(full):
        if s:
            i = _lowest(s)
            derivative = {r ^ i: t for r, t in out.items() if r & i}
            _set_difference(out, s, x.get(s), coefficient(torch.mul, derivative, x, s ^ i))
    return out


def _set_difference(out: Jet, at: int, a: Tensor | None, b: Tensor | None) -> None:
    if a is not None or b is not None:
        out[at] = a if b is None else -b if a is None else a - b  # type: ignore[assignment]
