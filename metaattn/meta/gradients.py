"""The inner loop, and the ways to differentiate it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

from torch import Tensor
from torch.func import grad

from ._checks import check_optimizer, check_params, check_steps
from .optim import InnerOptimizer, Params, Rates

Loss = Callable[..., Tensor]
Gradient = Literal["reverse", "first_order"]


def _reverse(loss: Loss) -> Callable[..., Params]:
    """The inner gradient as it is: an outer derivative goes back through it."""
    return grad(loss)


def _first_order(loss: Loss) -> Callable[..., Params]:
    """The inner gradient as a constant to any outer derivative."""

    def gradient(params: Params, *data: Any) -> Params:
        return {k: g.detach() for k, g in grad(loss)(params, *data).items()}

    return gradient


# How the inner gradient looks to an outer derivative; the other ways join here.
GRADIENTS: dict[str, Callable[[Loss], Callable[..., Params]]] = {"reverse": _reverse, "first_order": _first_order}


def check_gradient(gradient: str) -> None:
    """A way of differentiating is one of ``GRADIENTS``."""
    if gradient not in GRADIENTS:
        raise ValueError(f"gradient must be one of {', '.join(map(repr, GRADIENTS))}; got {gradient!r}")


def trajectory(
    loss: Loss,
    params: Params,
    data: Sequence[Any],
    *,
    optimizer: InnerOptimizer,
    rates: Rates,
    steps: int,
    adapts: Sequence[str] | None = None,
    gradient: Gradient = "reverse",
) -> list[Params]:
    """Adapt parameters by gradient steps on a loss; all that the steps went through.

    Args:
        loss: ``loss(params, *data)``, a scalar.
        params: Where to start.
        data: What the loss takes after the parameters: a task's support set.
        optimizer: The inner optimizer.
        rates: Its learning rates, see :func:`metaattn.meta.rate`.
        steps: How many steps, at least 0.
        adapts: Names of the parameters that change; all by default. The others are as they were throughout.
        gradient: How an outer derivative sees the inner gradients: ``"reverse"`` goes back through them;
            ``"first_order"`` takes them for constants (Finn et al. 2017, section 5.2; Nichol et al. 2018).

    Returns:
        ``steps + 1`` dicts of parameters, the first of which is ``params``.

    Raises:
        ValueError: A negative number of steps, an unknown way of differentiating, an unknown parameter.
        TypeError: Parameters that are no dict of tensors, an optimizer that is none, steps that are no integer.
    """
    check_steps(steps, 0)
    check_gradient(gradient)
    check_optimizer(optimizer)
    check_params(params)
    names = list(params) if adapts is None else list(adapts)
    if unknown := sorted(set(names) - set(params)):
        raise ValueError(f"no parameter is named {unknown}; there are {sorted(params)}")
    inner = GRADIENTS[gradient](lambda adapted, *data: loss({**params, **adapted}, *data))
    adapted = {k: params[k] for k in names}
    state = optimizer.init(adapted)
    passed = [params]
    for step in range(steps):
        adapted, state = optimizer.update(inner(adapted, *data), state, adapted, rates, step)
        passed.append({**params, **adapted})
    return passed


def adapt(
    loss: Loss,
    params: Params,
    data: Sequence[Any],
    *,
    optimizer: InnerOptimizer,
    rates: Rates,
    steps: int,
    adapts: Sequence[str] | None = None,
    gradient: Gradient = "reverse",
) -> Params:
    """The end of :func:`trajectory`, which see.

    Example:
        >>> import torch
        >>> from metaattn.meta import adapt, sgd
        >>> def loss(params, x, y):
        ...     return (params["w"] * x - y).square().mean()
        >>> x, y = torch.ones(4), 3 * torch.ones(4)
        >>> w = torch.tensor(1.0, requires_grad=True)
        >>> adapted = adapt(loss, {"w": w}, (x, y), optimizer=sgd(), rates=0.25, steps=1)
        >>> adapted["w"].item()
        2.0
        >>> torch.autograd.grad(adapted["w"], w)[0].item()  # through the inner gradient: 1 - rate * second derivative
        0.5
    """
    return trajectory(
        loss, params, data, optimizer=optimizer, rates=rates, steps=steps, adapts=adapts, gradient=gradient
    )[-1]
