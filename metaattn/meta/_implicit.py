"""The derivative of a minimum with respect to all that it depends on, by conjugate gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..autodiff import recompute, replace_at, split_tensors
from ._hvp import Vector, gradient_along
from .optim import Params


def minimum(objective: Callable[..., Tensor], found: Params, *args: Any, shift: float, **solver: Any) -> Params:
    """``found``, as the minimum of ``objective(found, *args)`` and so a function of ``args``.

    Args:
        objective: A scalar with its minimum there.
        found: The minimum, constants.
        *args: Trees; what the objective depends on, the data last.
        shift: Added to the diagonal of the Hessian.
        **solver: Of :func:`conjugate_gradients`.

    FunctionKey:
        The implicit function theorem: ``d found / d x = -H^-1 d^2 objective / (d found d x)``.
    """
    _, restore = split_tensors((found, *args))
    own, still = range(len(found)), len(split_tensors((found, *args[:-1]))[0])

    def pullback(x: Vector, w: Vector, wrt: Sequence[int], of: Sequence[int]) -> Vector:
        def along(v: Vector, wrt: Sequence[int]) -> Vector:
            return gradient_along(lambda *here: objective(*restore(here)), x, own, v, wrt, still=still)

        def product(v: Vector) -> Vector:
            return tuple(h + shift * t for h, t in zip(along(v, own), v, strict=True))

        b = tuple(replace_at([torch.zeros_like(x[i]) for i in own], of, w))
        return tuple(-m for m in along(conjugate_gradients(product, b, **solver), wrt))

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

    Nothing depends on the data, so that it runs under vmap: a system that is solved stands still; so does one that
    meets a direction in which ``A`` is not positive, at what was found before it.

    Args:
        product: ``v`` to ``A v``.
        b: The right-hand side, in parts.
        guess: Start at so many times ``b``.
        iterations: At most so many.
        tolerance: Stop at a residual of this size, relative to ``b``.

    FunctionKey:
        Hestenes and Stiefel 1952, section 3; the stop at negative curvature: Steihaug 1983.
    """
    size = _dot(b, b).sqrt()
    unit = torch.where(size > 0, size, 1)  # squares of tiny numbers would vanish
    b = tuple(t / unit for t in b)
    x: Vector = tuple(guess * t for t in b)
    r: Vector = tuple(t - a for t, a in zip(b, product(x), strict=True))
    p, rr = r, _dot(r, r)
    going = rr > tolerance**2
    for _ in range(iterations):
        q = product(p)
        curvature = _dot(p, q)
        going = going & (rr > tolerance**2) & (curvature > 0)
        step = torch.where(going, rr / torch.where(going, curvature, 1), 0)
        x = tuple(a + step * d for a, d in zip(x, p, strict=True))
        r = tuple(a - step * d for a, d in zip(r, q, strict=True))
        new = _dot(r, r)
        ratio = torch.where(going, new / torch.where(going, rr, 1), 0)
        p = tuple(a + ratio * d for a, d in zip(r, p, strict=True))
        rr = new
    return tuple(unit * t for t in x)


def _dot(a: Vector, b: Vector) -> Tensor:
    return torch.stack([(s * t).sum() for s, t in zip(a, b, strict=True)]).sum()
