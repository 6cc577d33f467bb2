"""The inner loop, and the ways to differentiate it."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.func import grad

from ..compile.compiler import active_compiler
from ._checks import check_count, check_optimizer, check_params
from ._closure_checks import check_loop
from ._compiled_step import compiled_step, expand_per_task
from ._implicit import minimum
from ._inner_loop import Loop, Loss, detach
from ._mixed_mode import mixed_gradient, run_segment
from .optim import InnerOptimizer, Params, Rates, State


class Gradient(ABC):
    """How an outer derivative sees the inner loop; by name or, with settings, as an object."""

    @abstractmethod
    def unroll(self, loop: Loop, adapted: Params, state: State, steps: int, every: bool) -> list[Params]:
        """Take steps, at least one; the parameters after ``every`` one of them, or after the last alone."""


@dataclass(frozen=True)
class Reverse(Gradient):
    """``"reverse"``: back through the unrolled gradient steps. Memory grows by a step's activations with each step."""

    def unroll(self, loop: Loop, adapted: Params, state: State, steps: int, every: bool) -> list[Params]:
        """See :class:`Gradient`."""
        step = compiled_step(loop, adapted, state, "reverse")
        return loop.run(grad(loop.objective), adapted, state, 0, steps, step=step)[0]


@dataclass(frozen=True)
class FirstOrder(Gradient):
    """``"first_order"``: the inner gradients are constants.

    FunctionKey:
        Finn, Abbeel and Levine 2017 (arXiv 1703.03400), section 5.2; Nichol, Achiam and Schulman 2018 (arXiv
        1803.02999), section 2.
    """

    def unroll(self, loop: Loop, adapted: Params, state: State, steps: int, every: bool) -> list[Params]:
        """See :class:`Gradient`."""
        step = compiled_step(loop, adapted, state, "first_order")
        return loop.run(lambda *at: detach(grad(loop.objective)(*at)), adapted, state, 0, steps, step=step)[0]


@dataclass(frozen=True)
class Mixed(Gradient):
    """``"mixed"``: the derivative of ``"reverse"``, exactly, in the memory of one step's activations.

    Each inner gradient keeps its parameters and its data alone; the outer derivative computes it again, forward
    over reverse. The activations kept do not grow with the steps: parameters and the optimizer's state do, at each
    step or, with ``segments``, at the start of each. All orders and modes are right, and random numbers (dropout)
    are drawn again as they were.

    The loss must take all that a derivative may be wanted of as ``params`` or ``data``. One that closes over
    such a tensor raises: that is found by one more call of the loss on constants before the first step. What PyTorch
    cannot differentiate forward over reverse raises too (2.13: ``huber_loss``).

    Args:
        segments: Cut the steps into so many stretches; each is run again when it is differentiated, which takes
            one more inner gradient a step. About the root of the number of steps needs the least memory.

    Raises:
        TypeError: Segments that are no integer.
        ValueError: Segments below 1.

    FunctionKey:
        Kemaev et al. 2025, MixFlow-MG (arXiv 2505.00793); segments: Chen et al. 2016 (arXiv 1604.06174).
    """

    segments: int | None = None

    def __post_init__(self) -> None:
        if self.segments is not None:
            check_count("segments", self.segments, 1)

    def unroll(self, loop: Loop, adapted: Params, state: State, steps: int, every: bool) -> list[Params]:
        """See :class:`Gradient`."""
        step = compiled_step(loop, adapted, state, "mixed")
        if step is None:
            check_loop(loop, adapted, state)
        gradient = mixed_gradient(loop.objective)
        if self.segments is None:
            return loop.run(gradient, adapted, state, 0, steps, step=step)[0]
        count = min(self.segments, steps)
        bounds = [steps * i // count for i in range(count + 1)]
        passed: list[Params] = []
        for first, last in pairwise(bounds):
            stretch, state = run_segment(loop, gradient, adapted, state, first, last, every, step)
            adapted = stretch[-1]
            passed += stretch
        return passed


@dataclass(frozen=True)
class Truncated(Gradient):
    """``"truncated"``: the last steps alone are differentiated; what they start from is a constant.

    If more steps are taken than are differentiated, initial values of adapted parameters get no derivative: use it to
    learn rates, losses or data.

    Args:
        steps: How many of them are differentiated.

    Raises:
        TypeError: Steps that are no integer.
        ValueError: Steps below 1.

    FunctionKey:
        Shaban et al. 2019 (arXiv 1810.10667), truncated back-propagation.
    """

    steps: int = 1

    def __post_init__(self) -> None:
        check_count("steps", self.steps, 1)

    def unroll(self, loop: Loop, adapted: Params, state: State, steps: int, every: bool) -> list[Params]:
        """See :class:`Gradient`."""
        start = max(0, steps - self.steps)
        passed: list[Params] = []
        if start:
            constant = loop.detached()
            with torch.no_grad():
                still = compiled_step(constant, detach(adapted), detach(state), "first_order")
                passed, state = constant.run(
                    grad(constant.objective), detach(adapted), detach(state), 0, start, step=still
                )
            passed, state = detach(passed), detach(state)
            adapted = passed[-1]
        step = compiled_step(loop, adapted, state, "reverse")
        return passed + loop.run(grad(loop.objective), adapted, state, start, steps, step=step)[0]


@dataclass(frozen=True)
class Implicit(Gradient):
    """``"implicit"``: that of the minimum of the loss near the initial parameters, whatever the way there.

    The steps are taken on ``loss + proximal / 2 * |params - initial|^2`` and nothing of them is kept. With ``H``
    the Hessian of the loss at their end, taken for the minimum, the derivative of the initial parameters
    from a cotangent ``w`` is ``proximal * (H + proximal)^-1 w``; that of anything else ``x`` in the loss is
    ``-d^2 loss/dx d params (H + proximal)^-1 w``. Learning rates have none. It is as exact as the end is close to the
    minimum. Conjugate gradients start at ``w / (proximal + damping)``, the first-order gradient, and stop where
    ``H + proximal + damping`` is found not to be positive definite: there it is no minimum, and ``proximal`` too small.
    One derivative in reverse mode; all others raise.

    Args:
        proximal: The strength of the pull to the initial parameters, positive.
        damping: Added to the Hessian's diagonal in the solution alone, at least 0.
        iterations: Of conjugate gradients, at most; each is one Hessian product.
        tolerance: The residual, relative to ``w``, at which they stop.

    Raises:
        TypeError: A setting that is no number.
        ValueError: A setting outside its range.

    FunctionKey:
        Rajeswaran et al. 2019, iMAML (arXiv 1909.04630), lemma 1 and algorithm 2.
    """

    proximal: float = 1.0
    damping: float = 0.0
    iterations: int = 10
    tolerance: float = 1e-6

    def __post_init__(self) -> None:
        check_count("iterations", self.iterations, 1)
        for name in ("proximal", "damping", "tolerance"):
            value = getattr(self, name)
            if not isinstance(value, Real):
                raise TypeError(f"{name} must be a number; got {value!r}")
            if not 0 <= float(value) < math.inf or (name == "proximal" and value == 0):
                least = "positive" if name == "proximal" else "at least 0"
                raise ValueError(f"{name} must be {least} and finite; got {value}")

    def unroll(self, loop: Loop, adapted: Params, state: State, steps: int, every: bool) -> list[Params]:
        """See :class:`Gradient`."""
        check_loop(loop, adapted, state)
        constant, initial = loop.detached(), detach(adapted)

        def objective(now: Params, initial: Params, fixed: Params, data: tuple[Any, ...]) -> Tensor:
            distance = sum((now[k] - p).square().sum() for k, p in initial.items())
            return loop.objective(now, fixed, data) + self.proximal / 2 * distance

        with torch.no_grad():
            passed, _ = constant.run(
                lambda now, fixed, data: grad(objective)(now, initial, fixed, data), initial, detach(state), 0, steps
            )
        passed = detach(passed)
        end = minimum(
            objective,
            passed[-1],
            adapted,
            loop.fixed,
            loop.data,
            shift=self.damping,
            guess=1 / (self.proximal + self.damping),
            iterations=self.iterations,
            tolerance=self.tolerance,
        )
        return [*passed[:-1], end]


# The names of what needs no settings.
GRADIENTS: dict[str, Gradient] = {
    "reverse": Reverse(),
    "mixed": Mixed(),
    "first_order": FirstOrder(),
    "truncated": Truncated(),
    "implicit": Implicit(),
}


def check_gradient(gradient: Any) -> Gradient:
    """The way of differentiating that a name or an object says."""
    if isinstance(gradient, Gradient):
        return gradient
    if not isinstance(gradient, str) or gradient not in GRADIENTS:
        raise ValueError(
            f"gradient must be one of {', '.join(map(repr, GRADIENTS))}, or an object such as "
            f"metaattn.meta.Truncated(steps=3); got {gradient!r}"
        )
    return GRADIENTS[gradient]


def trajectory(
    loss: Loss,
    params: Params,
    data: Sequence[Any],
    *,
    optimizer: InnerOptimizer,
    rates: Rates,
    steps: int,
    adapts: Sequence[str] | None = None,
    gradient: str | Gradient = "reverse",
) -> list[Params]:
    """Adapt parameters by gradient steps on a loss; all that the steps went through.

    Meta-parameters are whatever is differentiated afterwards: initial parameters, learning rates, and
    any tensor in ``data`` (targets, weights of samples, the parameters of a learned loss).

    Args:
        loss: ``loss(params, *data)``, a scalar.
        params: Where to start.
        data: What the loss takes after the parameters: a task's support set; trees of tensors.
        optimizer: The inner optimizer.
        rates: Its learning rates, see :func:`metaattn.meta.rate`.
        steps: How many steps, at least 0.
        adapts: Names of the parameters that change; all by default. The others are as they were throughout.
        gradient: How an outer derivative sees the steps: ``"reverse"`` (:class:`Reverse`), ``"mixed"``
            (:class:`Mixed`), ``"first_order"`` (:class:`FirstOrder`), ``"truncated"`` (:class:`Truncated`),
            ``"implicit"`` (:class:`Implicit`), or one of these with settings.

    Returns:
        ``steps + 1`` dicts of parameters, the first of which is ``params``.

    Raises:
        ValueError: A negative number of steps, an unknown way of differentiating, an unknown parameter, a
            parameter without a learning rate; a loss that closes over a tensor whose derivative would be lost.
        TypeError: Parameters that are no dict of tensors, an optimizer that is none, steps that are no integer.
        NotImplementedError: With ``"mixed"``, a loss that draws random numbers under ``make_fx``, or under a
            :func:`torch.func.vmap` with other numbers for each entry that maps neither parameters nor data; a second
            derivative, or forward mode, of ``"implicit"``.
    """
    return _unroll(loss, params, data, optimizer, rates, steps, adapts, gradient, every=True)


def _unroll(
    loss: Loss,
    params: Params,
    data: Sequence[Any],
    optimizer: InnerOptimizer,
    rates: Rates,
    steps: int,
    adapts: Sequence[str] | None,
    gradient: str | Gradient,
    every: bool,
) -> list[Params]:
    check_count("steps", steps, 0)
    how = check_gradient(gradient)
    check_optimizer(optimizer)
    check_params(params)
    names = list(params) if adapts is None else list(adapts)
    if unknown := sorted(set(names) - set(params)):
        raise ValueError(f"no parameter is named {unknown}; there are {sorted(params)}")
    if steps == 0:
        return [params]
    compiler = active_compiler()  # once: all steps and their derivatives run as the first does
    adapted = expand_per_task({k: params[k] for k in names}, data, compiler)
    fixed = {k: p for k, p in params.items() if k not in adapted}
    loop = Loop(loss, tuple(params), fixed, tuple(data), optimizer, rates, compiler)
    return [params, *(loop.join(p, fixed) for p in how.unroll(loop, adapted, optimizer.init(adapted), steps, every))]


def adapt(
    loss: Loss,
    params: Params,
    data: Sequence[Any],
    *,
    optimizer: InnerOptimizer,
    rates: Rates,
    steps: int,
    adapts: Sequence[str] | None = None,
    gradient: str | Gradient = "reverse",
) -> Params:
    """The last entry of :func:`trajectory`, which describes the arguments.

    Example:
        >>> import torch
        >>> from metaattn.meta import adapt, sgd
        >>> def loss(params, x, y):
        ...     return (params["w"] * x - y).square().mean()
        >>> x, y = torch.ones(4), 3 * torch.ones(4)
        >>> w = torch.tensor(1.0, requires_grad=True)
        >>> adapted = adapt(loss, {"w": w}, (x, y), optimizer=sgd(), rates=0.25, steps=1, gradient="mixed")
        >>> adapted["w"].item()
        2.0
        >>> torch.autograd.grad(adapted["w"], w)[0].item()  # through the inner gradient: 1 - rate * second derivative
        0.5
    """
    return _unroll(loss, params, data, optimizer, rates, steps, adapts, gradient, every=False)[-1]
