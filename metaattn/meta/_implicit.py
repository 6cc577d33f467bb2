"""Derivative of a minimum with respect to everything that it depends on, by conjugate gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..autodiff import recompute, replace_at, split_tensors
from ._hvp import Vector, hessian_product
from .optim import Params


def minimum(objective: Callable[..., Tensor], found: Params, *args: Any, shift: float, **solver: Any) -> Params:
    """Return ``found`` as the minimum of ``objective(found, *args)``, and so as a function of ``args``.

    Args:
        objective: A scalar that is least there.
        found: The minimum, constants.
        *args: Trees of tensors that the objective depends on, the data last.
        shift: Added to the diagonal of the Hessian in the solution, at least 0.
        **solver: Options of :func:`conjugate_gradients`.

    Source:
        The implicit function theorem: ``d found / d x = -H^-1 d^2 objective / (d found d x)``.
    """
    _, restore = split_tensors((found, *args))
    of_found, first_data = range(len(found)), len(split_tensors((found, *args[:-1]))[0])

    def pullback(x: Vector, w: Vector, wrt: Sequence[int], outputs: Sequence[int]) -> Vector:
        def product(v: Vector, wrt: Sequence[int]) -> Vector:
            return hessian_product(lambda *x: objective(*restore(x)), x, of_found, v, wrt, first_data=first_data)

        def shifted_hessian(v: Vector) -> Vector:
            return tuple(h + shift * t for h, t in zip(product(v, of_found), v, strict=True))

        b = tuple(replace_at([torch.zeros_like(x[i]) for i in of_found], outputs, w))
        return tuple(-g for g in product(conjugate_gradients(shifted_hessian, b, **solver), wrt))

    def identity(found: Params, *args: Any) -> Params:
        return {k: p.view_as(p) for k, p in found.items()}

    unsupported_message = (
        "an implicit gradient has one derivative, in reverse mode; for higher orders and for forward mode use "
        "gradient='mixed' or 'reverse'"
    )
    return recompute(
        identity,
        found,
        *args,
        pullback=pullback,
        unsupported_message=unsupported_message,
        preserve_rng_state=False,
    )


def conjugate_gradients(
    product: Callable[[Vector], Vector], b: Vector, *, guess: float, iterations: int, tolerance: float
) -> Vector:
    """Solve ``A x = b`` for a positive definite ``A``.

    Control flow does not depend on numbers, so that it runs under vmap. Each system of a batch therefore goes through
    all iterations: one that is solved no longer changes, nor does one that meets a direction in which ``A`` is not
    positive, which keeps what it had found before.

    Args:
        product: ``v`` to ``A v``.
        b: The right-hand side, a tuple of tensors.
        guess: The start is ``guess * b``.
        iterations: Number of iterations, each with one product.
        tolerance: A system is solved when its residual is at most ``tolerance`` times the norm of ``b``.

    Source:
        Hestenes and Stiefel 1952, section 3; the stop at negative curvature: Steihaug 1983.
    """
    norm = _dot(b, b).sqrt()
    unit = torch.where(norm > 0, norm, 1)  # solved for b / |b|: squares of tiny numbers would be zero
    b = tuple(t / unit for t in b)
    x: Vector = tuple(guess * t for t in b)
    r: Vector = tuple(t - a for t, a in zip(b, product(x), strict=True))
    p, rr = r, _dot(r, r)
    active = rr > tolerance**2
    for _ in range(iterations):
        q = product(p)
        curvature = _dot(p, q)
        active = active & (rr > tolerance**2) & (curvature > 0)
        step = torch.where(active, rr / torch.where(active, curvature, 1), 0)
        x = tuple(a + step * d for a, d in zip(x, p, strict=True))
        r = tuple(a - step * d for a, d in zip(r, q, strict=True))
        new_rr = _dot(r, r)
        ratio = torch.where(active, new_rr / torch.where(active, rr, 1), 0)
        p = tuple(a + ratio * d for a, d in zip(r, p, strict=True))
        rr = new_rr
    return tuple(unit * t for t in x)


def _dot(a: Vector, b: Vector) -> Tensor:
    return torch.stack([(s * t).sum() for s, t in zip(a, b, strict=True)]).sum()
