"""Adaptation by gradient steps (:func:`adapt`, :func:`trajectory`) and the modes in which it is differentiated.

A mode is a :class:`Gradient` object, which unrolls the steps for the outer derivative: through every step
(:class:`Reverse`, :class:`Mixed`), through the last steps only (:class:`Truncated`), with constant inner gradients
(:class:`FirstOrder`), or as the minimum of a loss (:class:`Implicit`).
"""

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
    """Base class of the modes in which an outer derivative sees the inner loop.

    Every function with a ``gradient`` argument takes a mode by name (``"reverse"``, ``"mixed"``, ``"first_order"``,
    ``"truncated"``, ``"implicit"``: default settings), or an object such as ``Truncated(steps=3)``.

    Example:
        >>> from metaattn.meta import Gradient, Mixed, maml
        >>> learner = maml(lambda params, x: (params["w"] - x).square().sum(), gradient=Mixed(segments=2), steps=8)
        >>> isinstance(learner.gradient, Gradient)
        True
    """

    @abstractmethod
    def unroll(self, loop: Loop, adapted: Params, state: State, steps: int, every: bool) -> list[Params]:
        """Take the inner steps.

        Args:
            loop: The loss, its data, the optimizer and its rates.
            adapted: The parameters that change, ``{name: tensor}``, before the first step.
            state: The optimizer's state before the first step.
            steps: Number of steps, at least 1.
            every: Return the parameters after every step. Otherwise only those after the last step need to be in the
                list, as its last entry.

        Returns:
            Dicts with the names and shapes of ``adapted``, in the order of the steps.
        """


@dataclass(frozen=True)
class Reverse(Gradient):
    """Backpropagation through the unrolled gradient steps: ``"reverse"``.

    It supports every order and mode. Memory grows with the number of steps, by the activations of one step each.

    Example:
        >>> import torch
        >>> from metaattn.meta import Reverse, adapt, sgd
        >>> def loss(params, x):
        ...     return (params["w"] - x).square()
        >>> w, data = torch.tensor(0.0, requires_grad=True), (torch.tensor(1.0),)
        >>> adapted = adapt(loss, {"w": w}, data, optimizer=sgd(), rates=0.25, steps=2, gradient=Reverse())
        >>> torch.autograd.grad(adapted["w"], w)[0].item()  # (1 - 0.25 * 2)^2
        0.25
    """

    def unroll(self, loop: Loop, adapted: Params, state: State, steps: int, every: bool) -> list[Params]:
        """See :class:`Gradient`."""
        step = compiled_step(loop, adapted, state, "reverse")
        return loop.run(grad(loop.objective), adapted, state, 0, steps, step=step)[0]


@dataclass(frozen=True)
class FirstOrder(Gradient):
    """Inner gradients treated as constants: ``"first_order"``.

    The derivative with respect to the initial parameters is then the gradient at the adapted ones. Learning rates keep
    their derivatives.

    Source:
        Finn, Abbeel and Levine 2017 (arXiv 1703.03400), section 5.2; Nichol, Achiam and Schulman 2018 (arXiv
        1803.02999), section 2.

    Example:
        >>> import torch
        >>> from metaattn.meta import FirstOrder, adapt, sgd
        >>> def loss(params, x):
        ...     return (params["w"] - x).square()
        >>> w, data = torch.tensor(0.0, requires_grad=True), (torch.tensor(1.0),)
        >>> adapted = adapt(loss, {"w": w}, data, optimizer=sgd(), rates=0.25, steps=2, gradient=FirstOrder())
        >>> torch.autograd.grad(adapted["w"], w)[0].item()
        1.0
    """

    def unroll(self, loop: Loop, adapted: Params, state: State, steps: int, every: bool) -> list[Params]:
        """See :class:`Gradient`."""
        step = compiled_step(loop, adapted, state, "first_order")
        return loop.run(lambda *at: detach(grad(loop.objective)(*at)), adapted, state, 0, steps, step=step)[0]


@dataclass(frozen=True)
class Mixed(Gradient):
    """Exact derivative of ``"reverse"`` in the activation memory of one step: ``"mixed"``.

    Each inner gradient stores only its parameters and its data. The outer derivative computes it again, in forward mode
    over reverse mode. The stored activations therefore do not grow with the number of steps. What grows is the stored
    parameters and the optimizer's state: one copy for each step or, with ``segments``, one for each segment. All orders
    and modes are supported, and random numbers (dropout) are drawn again as in the first pass.

    The loss must receive every tensor that is to be differentiated in ``params`` or ``data``. A loss that closes over
    such a tensor raises an error; this is checked by one extra call of the loss on constants before the first step.
    Functions that PyTorch cannot differentiate in forward mode over reverse mode (``huber_loss`` in 2.13) raise too.

    Args:
        segments: Divide the steps into this many segments, and run each segment again when it is differentiated. That
            costs one more inner gradient per step. The square root of the number of steps needs about the least memory.
            ``None``: store the parameters of every step.

    Raises:
        TypeError: ``segments`` is not an integer.
        ValueError: ``segments`` is below 1.

    Source:
        Kemaev et al. 2025, MixFlow-MG (arXiv 2505.00793); segments: Chen et al. 2016 (arXiv 1604.06174).

    Example:
        >>> import torch
        >>> from metaattn.meta import Mixed, adapt, sgd
        >>> def loss(params, x):
        ...     return (params["w"] - x).square()
        >>> w, data = torch.tensor(0.0, requires_grad=True), (torch.tensor(1.0),)
        >>> adapted = adapt(loss, {"w": w}, data, optimizer=sgd(), rates=0.25, steps=4, gradient=Mixed(segments=2))
        >>> torch.autograd.grad(adapted["w"], w)[0].item()  # (1 - 0.25 * 2)^4, as with "reverse"
        0.0625
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
            part, state = run_segment(loop, gradient, adapted, state, first, last, every, step)
            adapted = part[-1]
            passed += part
        return passed


@dataclass(frozen=True)
class Truncated(Gradient):
    """Derivative through the last steps only, from constant parameters: ``"truncated"``.

    When more steps are taken than are differentiated, the initial values of adapted parameters get no derivative. Use
    this mode to learn learning rates, losses or data.

    Args:
        steps: Number of steps, counted from the end, that are differentiated.

    Raises:
        TypeError: ``steps`` is not an integer.
        ValueError: ``steps`` is below 1.

    Source:
        Shaban et al. 2019 (arXiv 1810.10667), truncated back-propagation.

    Example:
        >>> import torch
        >>> from metaattn.meta import Truncated, adapt, sgd
        >>> def loss(params, x):
        ...     return (params["w"] - x).square()
        >>> rate, data = torch.tensor(0.25, requires_grad=True), (torch.tensor(1.0),)
        >>> start = {"w": torch.tensor(0.0)}
        >>> adapted = adapt(loss, start, data, optimizer=sgd(), rates=rate, steps=2, gradient=Truncated(steps=1))
        >>> torch.autograd.grad(adapted["w"], rate)[0].item()  # minus the second step's gradient, taken at w = 0.5
        1.0
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
                step = compiled_step(constant, detach(adapted), detach(state), "first_order")
                passed, state = constant.run(
                    grad(constant.objective), detach(adapted), detach(state), 0, start, step=step
                )
            passed, state = detach(passed), detach(state)
            adapted = passed[-1]
        step = compiled_step(loop, adapted, state, "reverse")
        return passed + loop.run(grad(loop.objective), adapted, state, start, steps, step=step)[0]


@dataclass(frozen=True)
class Implicit(Gradient):
    """Derivative of a minimum of the loss near the initial parameters: ``"implicit"``.

    The steps minimise ``loss + proximal / 2 * |params - initial|^2`` and store nothing. Their result is treated as the
    minimum, whichever steps led to it; the derivative is as accurate as the result is close to the minimum. With ``H``
    the Hessian of the loss there and ``w`` a cotangent of the adapted parameters, the derivative is

    * ``proximal * (H + proximal)^-1 w`` with respect to the initial parameters,
    * ``-d^2 loss/dx d params (H + proximal)^-1 w`` with respect to any other argument ``x`` of the loss,
    * zero with respect to learning rates.

    The linear system is solved by conjugate gradients, which start at ``w / (proximal + damping)``, the first-order
    gradient. They stop where ``H + proximal + damping`` turns out not to be positive definite: the result is then
    no minimum, and ``proximal`` is too small. This mode has one derivative, in reverse mode; other derivatives raise.

    Args:
        proximal: Strength of the pull towards the initial parameters, positive.
        damping: Added to the diagonal of the Hessian in the linear system only, at least 0.
        iterations: Maximum number of conjugate-gradient iterations; each takes one Hessian-vector product.
        tolerance: Residual, relative to the norm of ``w``, at which the iterations stop, at least 0.

    Raises:
        TypeError: A setting is not a number, or ``iterations`` is not an integer.
        ValueError: A setting is outside its range.

    Source:
        Rajeswaran et al. 2019, iMAML (arXiv 1909.04630), lemma 1 and algorithm 2.

    Example:
        >>> import torch
        >>> from metaattn.meta import Implicit, adapt, sgd
        >>> def loss(params, x):
        ...     return (params["w"] - x).square()
        >>> w, data = torch.tensor(0.0, requires_grad=True), (torch.tensor(1.0),)
        >>> mode = Implicit(proximal=2.0)
        >>> adapted = adapt(loss, {"w": w}, data, optimizer=sgd(), rates=0.25, steps=1, gradient=mode)
        >>> adapted["w"].item(), torch.autograd.grad(adapted["w"], w)[0].item()  # 2 / (2 + 2)
        (0.5, 0.5)
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
                bound = "positive" if name == "proximal" else "at least 0"
                raise ValueError(f"{name} must be {bound} and finite; got {value}")

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


# The modes by name, with default settings.
GRADIENTS: dict[str, Gradient] = {
    "reverse": Reverse(),
    "mixed": Mixed(),
    "first_order": FirstOrder(),
    "truncated": Truncated(),
    "implicit": Implicit(),
}


def check_gradient(gradient: Any) -> Gradient:
    """Return the mode for a name or an object.

    Raises:
        ValueError: There is no such mode.
    """
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
    """Adapt parameters by gradient steps on a loss, and return the parameters before, between and after the steps.

    Every tensor argument can be a meta-parameter: the initial parameters, the learning rates, and any tensor in
    ``data`` (targets, weights of samples, the parameters of a learned loss).

    The loss is that of one task. Several tasks are adapted by :func:`torch.func.vmap` over this function, or by a
    :class:`Learner`. Without it, a dimension of tasks in ``data`` is whatever the loss makes of it: an average over it
    adapts one set of parameters to all tasks.

    Args:
        loss: ``loss(params, *data)`` returns a scalar tensor.
        params: Initial parameters, ``{name: tensor}`` of any shapes.
        data: The further arguments of the loss: pytrees of tensors, usually one task's support set, such as inputs
            ``[shots, tokens, width]`` and targets ``[shots]``.
        optimizer: The inner optimizer, such as ``sgd()``.
        rates: Its learning rates: a number, a tensor ``[]`` or ``[steps]``, or a dict of tensors; see
            :func:`metaattn.meta.rate`.
        steps: Number of steps, at least 0.
        adapts: Names of the parameters that change; ``None`` for all. The others keep their initial values.
        gradient: How an outer derivative sees the steps: ``"reverse"`` (:class:`Reverse`), ``"mixed"``
            (:class:`Mixed`), ``"first_order"`` (:class:`FirstOrder`), ``"truncated"`` (:class:`Truncated`),
            ``"implicit"`` (:class:`Implicit`), or one of these classes with settings.

    Returns:
        A list of ``steps + 1`` dicts with the names and shapes of ``params``; the first is ``params``.

    Raises:
        ValueError: ``steps`` is negative; the mode or a parameter's name is unknown; a parameter has no learning rate;
            the loss is not a scalar, or closes over a tensor whose derivative would be lost.
        TypeError: ``params`` is not a dict of tensors, ``optimizer`` is not an :class:`InnerOptimizer`, or ``steps`` is
            not an integer.
        NotImplementedError: With ``"mixed"``, the loss draws random numbers under ``make_fx``, or under a
            :func:`torch.func.vmap` with ``randomness="different"`` that maps neither parameters nor data. With
            ``"implicit"``, a second derivative or forward mode is requested.

    Example:
        >>> import torch
        >>> from metaattn.meta import sgd, trajectory
        >>> def loss(params, x, y):
        ...     return (x @ params["w"] - y).square().mean()
        >>> params, x, y = {"w": torch.zeros(3)}, torch.randn(5, 3), torch.randn(5)
        >>> passed = trajectory(loss, params, (x, y), optimizer=sgd(), rates=0.1, steps=4)
        >>> len(passed), passed[-1]["w"].shape
        (5, torch.Size([3]))
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
    mode = check_gradient(gradient)
    check_optimizer(optimizer)
    check_params(params)
    names = list(params) if adapts is None else list(adapts)
    if unknown := sorted(set(names) - set(params)):
        raise ValueError(f"no parameter is named {unknown}; the parameters are {sorted(params)}")
    if steps == 0:
        return [params]
    compiler = active_compiler()  # once: all steps and their derivatives run as the first does
    adapted = expand_per_task({k: params[k] for k in names}, data, compiler)
    fixed = {k: p for k, p in params.items() if k not in adapted}
    loop = Loop(loss, tuple(params), fixed, tuple(data), optimizer, rates, compiler)
    return [params, *(loop.join(p, fixed) for p in mode.unroll(loop, adapted, optimizer.init(adapted), steps, every))]


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
    """Adapt parameters by gradient steps on a loss, and return the parameters after the last step.

    It is the last entry of :func:`trajectory`, in less memory where the mode can do so, with the same arguments and
    errors.

    Args:
        loss: ``loss(params, *data)`` returns a scalar tensor.
        params: Initial parameters, ``{name: tensor}`` of any shapes.
        data: The further arguments of the loss: pytrees of tensors, usually one task's support set, such as inputs
            ``[shots, tokens, width]`` and targets ``[shots]``. For many tasks use :func:`torch.func.vmap`, or a
            :class:`Learner`.
        optimizer: The inner optimizer, such as ``sgd()``.
        rates: Its learning rates: a number, a tensor ``[]`` or ``[steps]``, or a dict of tensors; see
            :func:`metaattn.meta.rate`.
        steps: Number of steps, at least 0.
        adapts: Names of the parameters that change; ``None`` for all.
        gradient: How an outer derivative sees the steps, by name or as an object; see :func:`trajectory`.

    Returns:
        A dict with the names and shapes of ``params``.

    Raises:
        ValueError: As :func:`trajectory`.
        TypeError: As :func:`trajectory`.
        NotImplementedError: As :func:`trajectory`.

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
