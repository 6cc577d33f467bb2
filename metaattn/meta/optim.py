"""Inner optimizers: pure functions of dicts of tensors, differentiable in all that they touch.

An optimizer is a pair of functions. ``init(params)`` gives its state; ``update(grads, state, params, rates,
step)`` gives the next parameters and state. The learning rate is an argument and not a part of the
optimizer, so that it can be a meta-parameter. The step, from 0, is an integer; in a compiled meta-step
(:func:`metaattn.meta.capture`) an integer tensor, so that one graph serves all steps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

Params = dict[str, Tensor]
State = dict[str, Params]
Rates = float | Tensor | dict[str, Tensor]
Step = int | Tensor


class InnerOptimizer(NamedTuple):
    """A pair of pure functions, see the module; ``step`` counts from 0."""

    init: Callable[[Params], State]
    update: Callable[[Params, State, Params, Rates, Step], tuple[Params, State]]


def rate(rates: Rates, name: str, step: Step) -> float | Tensor:
    """The learning rate of a parameter at a step.

    Args:
        rates: A number or a scalar tensor, for all; a tensor ``[steps]``; or a dict with, for each
            parameter, a scalar, ``[steps]`` or ``[steps, *shape of the parameter]``. Where a dimension of
            steps is shorter than the steps taken, its last entry goes on: of length 1 it is for all steps.
        name: The parameter's.
        step: Counted from 0.

    Returns:
        A number, a scalar tensor, or a tensor of the parameter's shape.

    Raises:
        ValueError: A dict without an entry for the parameter.
    """
    if isinstance(rates, dict) and name not in rates:
        raise ValueError(f"rates has no entry for {name!r}; it has {sorted(rates)}")
    r = rates[name] if isinstance(rates, dict) else rates
    if isinstance(r, Tensor) and r.dim():
        last = r.shape[0] - 1
        if isinstance(step, Tensor) and last:
            return r.index_select(0, step.clamp(max=last).view(1)).squeeze(0)
        return r[0 if last == 0 else min(step, last)]
    return r


def _correction(beta: float, step: Step, like: Tensor) -> float | Tensor:
    """``1 - beta^(step + 1)``, in float64: what a mean of ``step + 1`` values that began at zero is short of."""
    if not isinstance(step, Tensor):
        return 1 - beta ** (step + 1)
    share = 1 - torch.pow(beta, (step + 1).double())
    return share if like.dim() else share.to(like.dtype)  # among tensors without dimensions the wider dtype wins


def sgd() -> InnerOptimizer:
    """Gradient descent: ``p - rate * g``.

    Example:
        >>> import torch
        >>> from metaattn.meta import sgd
        >>> params = {"w": torch.tensor([1.0, 2.0])}
        >>> optimizer = sgd()
        >>> optimizer.update({"w": torch.ones(2)}, optimizer.init(params), params, 0.1, 0)[0]["w"]
        tensor([0.9000, 1.9000])
    """

    def init(params: Params) -> State:
        return {}

    def update(grads: Params, state: State, params: Params, rates: Rates, step: Step) -> tuple[Params, State]:
        return {k: p - rate(rates, k, step) * grads[k] for k, p in params.items()}, state

    return InnerOptimizer(init, update)


def momentum(beta: float = 0.9, *, nesterov: bool = False) -> InnerOptimizer:
    """Gradient descent with momentum, as :class:`torch.optim.SGD` has it: ``m = beta m + g; p - rate * m``.

    Args:
        beta: How much of the momentum stays, in ``[0, 1)``.
        nesterov: Whether to step by ``g + beta m`` instead.

    Raises:
        ValueError: ``beta`` outside ``[0, 1)``.

    Example:
        >>> import torch
        >>> from metaattn.meta import momentum
        >>> params, gradient = {"w": torch.tensor([1.0])}, {"w": torch.ones(1)}
        >>> optimizer = momentum(0.5)
        >>> state = optimizer.init(params)
        >>> for step in range(2):  # by 0.1 * 1, and then by 0.1 * (0.5 * 1 + 1)
        ...     params, state = optimizer.update(gradient, state, params, 0.1, step)
        >>> params["w"]
        tensor([0.7500])
    """
    if not 0 <= beta < 1:
        raise ValueError(f"beta must be at least 0 and below 1; got {beta}")

    def init(params: Params) -> State:
        return {"momentum": {k: torch.zeros_like(p) for k, p in params.items()}}

    def update(grads: Params, state: State, params: Params, rates: Rates, step: Step) -> tuple[Params, State]:
        m = {k: beta * state["momentum"][k] + g for k, g in grads.items()}
        direction = {k: g + beta * m[k] for k, g in grads.items()} if nesterov else m
        return {k: p - rate(rates, k, step) * direction[k] for k, p in params.items()}, {"momentum": m}

    return InnerOptimizer(init, update)


def adam(beta1: float = 0.9, beta2: float = 0.999, *, eps: float = 1e-8, eps_root: float = 1e-8) -> InnerOptimizer:
    """Adam, as :class:`torch.optim.Adam` has it but for ``eps_root``, which a derivative through it needs.

    The step is ``rate * m / (sqrt(v + eps_root) + eps)``, ``m`` and ``v`` corrected for their bias. At a
    gradient of exactly zero (behind a layer that starts at zero, say) ``v = 0``, where the square root has
    no derivative: with ``eps_root=0`` meta-gradients there are NaN.

    Args:
        beta1: Decay of the mean of gradients, in ``[0, 1)``.
        beta2: Decay of the mean of their squares, in ``[0, 1)``.
        eps: Added outside the root.
        eps_root: Added inside the root.

    Raises:
        ValueError: A decay outside ``[0, 1)``.

    FunctionKey:
        Kingma and Ba 2015 (arXiv 1412.6980), algorithm 1.

    Example:
        >>> import torch
        >>> from metaattn.meta import adam
        >>> params, gradient = {"w": torch.tensor([1.0, 1.0])}, {"w": torch.tensor([2.0, -20.0])}
        >>> optimizer = adam()
        >>> optimizer.update(gradient, optimizer.init(params), params, 0.1, 0)[0]["w"]  # by the rate, at first
        tensor([0.9000, 1.1000])
    """
    for name, beta in (("beta1", beta1), ("beta2", beta2)):
        if not 0 <= beta < 1:
            raise ValueError(f"{name} must be at least 0 and below 1; got {beta}")

    def init(params: Params) -> State:
        return {name: {k: torch.zeros_like(p) for k, p in params.items()} for name in ("mean", "square")}

    def update(grads: Params, state: State, params: Params, rates: Rates, step: Step) -> tuple[Params, State]:
        mean = {k: beta1 * state["mean"][k] + (1 - beta1) * g for k, g in grads.items()}
        square = {k: beta2 * state["square"][k] + (1 - beta2) * g * g for k, g in grads.items()}
        new = {}
        for k, p in params.items():
            m, v = mean[k] / _correction(beta1, step, p), square[k] / _correction(beta2, step, p)
            new[k] = p - rate(rates, k, step) * m / ((v + eps_root).sqrt() + eps)
        return new, {"mean": mean, "square": square}

    return InnerOptimizer(init, update)
