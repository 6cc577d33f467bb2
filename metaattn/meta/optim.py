"""Inner optimizers: pure functions of dicts of tensors, differentiable in every tensor argument.

An optimizer is a pair of functions: ``init(params)`` returns its state, and ``update(grads, state, params, rates,
step)`` returns the next parameters and the next state. The learning rate is an argument rather than part of the
optimizer, so that it can be a meta-parameter. The step counts from 0. It is a Python integer, except in a compiled
meta-step (:func:`metaattn.meta.capture`), where it is an integer tensor so that every step can use the same graph.
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
    """A pair of pure functions that together define an optimizer.

    :func:`sgd`, :func:`momentum` and :func:`adam` return one. Any other pair of functions with these signatures is an
    inner optimizer too.

    Args:
        init: ``init(params)`` returns the initial state for parameters ``{name: tensor}``: a dict of dicts
            ``{quantity: {name: tensor}}``, empty for an optimizer without state.
        update: ``update(grads, state, params, rates, step)`` returns the next parameters and the next state. ``grads``
            has the names and shapes of ``params``; ``rates`` are learning rates to be read with :func:`rate`; ``step``
            counts from 0. It must not change its arguments in place.

    Example:
        >>> import torch
        >>> from metaattn.meta import InnerOptimizer, rate
        >>> def update(grads, state, params, rates, step):  # sign descent
        ...     return {k: p - rate(rates, k, step) * grads[k].sign() for k, p in params.items()}, state
        >>> optimizer = InnerOptimizer(init=lambda params: {}, update=update)
        >>> params = {"w": torch.tensor([1.0, 2.0])}
        >>> params, state = optimizer.update({"w": torch.tensor([5.0, -5.0])}, {}, params, 0.1, 0)
        >>> params["w"]
        tensor([0.9000, 2.1000])
    """

    init: Callable[[Params], State]
    update: Callable[[Params, State, Params, Rates, Step], tuple[Params, State]]


def rate(rates: Rates, name: str, step: Step) -> float | Tensor:
    """Return the learning rate of one parameter at one step.

    Args:
        rates: A number or a scalar tensor, for all parameters and steps; a tensor ``[steps]``, for all parameters; or
            a dict with a tensor for each parameter, of shape ``[]``, ``[steps]`` or ``[steps, *parameter.shape]``.
            After the last entry of a ``steps`` dimension, that entry is used again: a dimension of length 1 is one
            rate for all steps.
        name: The parameter's name.
        step: The step, counted from 0; an integer or a scalar integer tensor.

    Returns:
        A number, a scalar tensor, or a tensor of the parameter's shape.

    Raises:
        ValueError: ``rates`` is a dict without an entry for the parameter.

    Example:
        >>> import torch
        >>> from metaattn.meta import rate
        >>> rates = {"w": torch.tensor([0.5, 0.25])}  # one for each of two steps
        >>> [rate(rates, "w", step).item() for step in range(3)]
        [0.5, 0.25, 0.25]
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
    """Return ``1 - beta^(step + 1)``, the bias correction of a running mean that started at zero.

    It is computed in float64, because ``beta^(step + 1)`` is close to 1 at first.
    """
    if not isinstance(step, Tensor):
        return 1 - beta ** (step + 1)
    share = 1 - torch.pow(beta, (step + 1).double())
    # A float64 scalar would promote a scalar parameter, though no tensor with dimensions.
    return share if like.dim() else share.to(like.dtype)


def sgd() -> InnerOptimizer:
    """Return plain gradient descent: ``p - rate * g``.

    Returns:
        The optimizer; it has no state.

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
    """Return gradient descent with momentum, as in :class:`torch.optim.SGD`: ``m = beta m + g; p - rate * m``.

    Args:
        beta: Decay of the momentum per step, in ``[0, 1)``.
        nesterov: Take the step ``rate * (g + beta m)`` instead of ``rate * m``.

    Returns:
        The optimizer; its state has the momentum of each parameter, initially zero.

    Raises:
        ValueError: ``beta`` is outside ``[0, 1)``.

    Source:
        Polyak 1964; Nesterov's variant: Sutskever et al. 2013, equations 3 and 4.

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
    """Return Adam, as in :class:`torch.optim.Adam` except for ``eps_root``, which derivatives through the step need.

    The step is ``rate * m / (sqrt(v + eps_root) + eps)``, with bias-corrected means ``m`` of the gradients and ``v`` of
    their squares. Where a gradient is exactly zero (behind a layer that is initialised to zero, for example), ``v`` is
    zero and the square root has no derivative: with ``eps_root=0`` the meta-gradient there is NaN.

    Args:
        beta1: Decay of the mean of the gradients per step, in ``[0, 1)``.
        beta2: Decay of the mean of their squares per step, in ``[0, 1)``.
        eps: Added to the square root.
        eps_root: Added inside the square root.

    Returns:
        The optimizer; its state has both means of each parameter, initially zero.

    Raises:
        ValueError: ``beta1`` or ``beta2`` is outside ``[0, 1)``.

    Source:
        Kingma and Ba 2015 (arXiv 1412.6980), algorithm 1.

    Example:
        >>> import torch
        >>> from metaattn.meta import adam
        >>> params, gradient = {"w": torch.tensor([1.0, 1.0])}, {"w": torch.tensor([2.0, -20.0])}
        >>> optimizer = adam()
        >>> optimizer.update(gradient, optimizer.init(params), params, 0.1, 0)[0]["w"]  # at first: the rate
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
