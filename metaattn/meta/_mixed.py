"""The inner gradient that keeps nothing: its derivative is forward over reverse."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import compress
from typing import Any

from torch import Tensor
from torch.func import grad

from ._closed import check_closed
from ._loop import GradientOf, Loop
from ._recompute import Mask, Replay, Tensors, along, merge, recompute, tensors_of
from .optim import Params, Rates, State


def mixed_gradient(objective: Callable[..., Tensor], random: bool) -> GradientOf:
    """The gradient of ``objective(adapted, fixed, data)`` in its first argument.

    With ``w`` the cotangent of the gradient and ``x`` any of the arguments, the symmetry of second derivatives
    gives ``d/dx <w, dL/d adapted> = d/de dL/dx (adapted + e w)``: one jvp of the gradient in all arguments.

    Args:
        objective: The loss.
        random: Whether it draws random numbers: then the same ones again in all derivatives.
    """

    def gradient(adapted: Params, fixed: Params, data: tuple[Any, ...]) -> Params:
        tensors, restore = tensors_of((adapted, fixed, data))
        count = len(adapted) + len(fixed)  # of the tensors, before those of the data

        def pullback(tensors: Tensors, cotangents: Sequence[Tensor | None], need: Mask) -> tuple[Tensor, ...]:
            def gradients(*here: Tensor) -> tuple[Tensor, ...]:
                return grad(lambda x: objective(*restore(merge(here, need, x))))(tuple(compress(here, need)))

            return along(gradients, tensors, cotangents, still=count)

        if not random:
            return recompute(grad(objective), adapted, fixed, data, pullback=pullback)
        replay = Replay(tensors)
        out = recompute(replayed(replay, grad(objective)), adapted, fixed, data, pullback=replayed(replay, pullback))
        replay.advance()
        return out

    return gradient


def replayed(replay: Replay, function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that draws the same random numbers at each call."""

    def call(*args: Any) -> Any:
        with replay():
            return function(*args)

    return call


def check_loop(loop: Loop, adapted: Params, state: State) -> bool:
    """Refuse a loss or an optimizer that closes over what is differentiated; whether the loss is random."""

    def update(adapted: Params, state: State) -> Any:
        constants = loop.detached()
        return loop.optimizer.update(adapted, state, adapted, constants.rates, 0)  # any gradient would do

    check_closed("the optimizer", update, loop.optimizer.update, adapted, state)
    return check_closed("the loss", loop.objective, loop.loss, adapted, loop.fixed, loop.data)


def segment(
    loop: Loop, gradient: GradientOf, random: bool, adapted: Params, state: State, first: int, last: int, every: bool
) -> tuple[list[Params], State]:
    """:meth:`Loop.run`, of which the graph keeps the start alone: its steps are run again for the derivative.

    Of the parameters those after the last step, or after ``every`` step.
    """

    def steps(adapted: Params, state: State, fixed: Params, data: tuple[Any, ...], rates: Rates) -> Any:
        again = replace(loop, fixed=fixed, data=data, rates=rates)
        passed, state = again.run(gradient, adapted, state, first, last)
        return passed if every else passed[-1:], state

    args = (adapted, state, loop.fixed, loop.data, loop.rates)
    if not random:
        return recompute(steps, *args)
    replay = Replay(tensors_of(args)[0])
    out = recompute(replayed(replay, steps), *args)
    replay.advance()
    return out
