"""The derivatives of attention that are checked and timed, each as one call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.func import jvp, vjp, vmap

Attention = Callable[..., Tensor]

RULES = {
    "fwd": "the value",
    "bwd": "the gradient, its forward done before",
    "grad": "the value and its gradient",
    "jvp": "the value and its directional derivative",
    "hvp": "Hessian product, forward over reverse (jvp of vjp)",
    "rof": "Hessian product, reverse over forward (vjp of jvp)",
    "dbl": "double backward, by all inputs and the cotangent",
    "vmap": "Hessian products for two queries, mapped",
}


def derivative(
    rule: str, attention: Attention, x: Sequence[Tensor], tangents: Sequence[Tensor], cotangent: Tensor
) -> Callable[[], Any]:
    """A rule of :data:`RULES` as a call; what of it is not to be timed is done before.

    Args:
        rule: Its name.
        attention: A function of ``x`` to the output.
        x: The differentiable inputs: query, key, value and perhaps a bias.
        tangents: One for each of ``x``, of its shape.
        cotangent: Of the output.

    Returns:
        A function of no arguments that gives all results of the rule, as a tree of tensors.
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
    leaves = [a.detach().requires_grad_() for a in x]
    if rule == "bwd":
        out = attention(*leaves)
        return lambda: torch.autograd.grad(out, leaves, w, retain_graph=True)
    if rule == "grad":
        return lambda: torch.autograd.grad(attention(*leaves), leaves, w)
    if rule != "dbl":
        raise ValueError(f"rule must be one of {', '.join(RULES)}; got {rule!r}")
    leaf = w.detach().requires_grad_()

    def double_backward() -> Any:
        gradient = torch.autograd.grad(attention(*leaves), leaves, leaf, create_graph=True)
        return torch.autograd.grad(gradient, (*leaves, leaf), t)

    return double_backward
