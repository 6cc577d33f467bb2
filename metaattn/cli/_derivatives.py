"""Derivatives of attention, each as one call that can be checked and timed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.func import jvp, vjp, vmap

Attention = Callable[..., Tensor]

RULES = {
    "fwd": "the value",
    "bwd": "the gradient, after a forward pass that is not timed",
    "grad": "the value and its gradient",
    "jvp": "the value and its directional derivative",
    "hvp": "Hessian product, forward over reverse (jvp of vjp)",
    "rof": "Hessian product, reverse over forward (vjp of jvp)",
    "dbl": "double backward, with respect to all inputs and the cotangent",
    "vmap": "Hessian products of two queries, by vmap",
}


def derivative(
    rule: str, attention: Attention, x: Sequence[Tensor], tangents: Sequence[Tensor], cotangent: Tensor
) -> Callable[[], Any]:
    """Prepare a derivative of attention as a call without arguments.

    Args:
        rule: A key of :data:`RULES`.
        attention: A function of ``x`` that returns the output.
        x: The differentiable inputs: query ``[B, H, N, D]``, key, value and optionally a bias.
        tangents: A tangent for each of ``x``, of the same shape.
        cotangent: A cotangent of the output, of the same shape.

    Returns:
        A function without arguments that returns all results of the rule as a pytree of tensors. Work that is not to be
        timed is done before it is returned.

    Raises:
        ValueError: There is no such rule.
    """
    x, t, w = tuple(x), tuple(tangents), cotangent

    def hessian_product(*x: Tensor) -> Any:
        return jvp(lambda *x: vjp(attention, *x)[1](w), x, t)

    if rule == "fwd":
        return lambda: attention(*x)
    if rule == "jvp":
        return lambda: jvp(attention, x, t)
    if rule == "hvp":
        return lambda: hessian_product(*x)
    if rule == "rof":
        return lambda: vjp(lambda *x: jvp(attention, x, t)[1], *x)[1](w)
    if rule == "vmap":
        return lambda: vmap(lambda query: hessian_product(query, *x[1:]))(torch.stack([x[0], t[0]]))
    inputs = [a.detach().requires_grad_() for a in x]
    if rule == "bwd":
        out = attention(*inputs)
        return lambda: torch.autograd.grad(out, inputs, w, retain_graph=True)
    if rule == "grad":
        return lambda: torch.autograd.grad(attention(*inputs), inputs, w)
    if rule != "dbl":
        raise ValueError(f"rule must be one of {', '.join(RULES)}; got {rule!r}")
    weight = w.detach().requires_grad_()

    def double_backward() -> Any:
        gradient = torch.autograd.grad(attention(*inputs), inputs, weight, create_graph=True)
        return torch.autograd.grad(gradient, (*inputs, weight), t)

    return double_backward
