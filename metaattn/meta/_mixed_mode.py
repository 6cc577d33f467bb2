"""The inner gradient that keeps nothing: its derivative is forward over reverse."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor
from torch.func import grad

from ..autodiff import recompute, split_tensors
from ._hvp import Vector, gradient_along
from ._inner_loop import GradientOf, Loop, StepOf
from .optim import Params, Rates, State


def mixed_gradient(objective: Callable[..., Tensor]) -> GradientOf:
    """The gradient of ``objective(adapted, fixed, data)`` in its first argument.

    With ``w`` the cotangent of the gradient and ``x`` any of the arguments, the symmetry of second derivatives
    gives ``d/dx <w, dL/d adapted> = d/de dL/dx (adapted + e w)``: one jvp of the gradient in all arguments.
    """

    def gradient(adapted: Params, fixed: Params, data: tuple[Any, ...]) -> Params:
        _, restore = split_tensors((adapted, fixed, data))

        def pullback(x: Vector, w: Vector, wrt: Sequence[int], of: Sequence[int]) -> Vector:
            # The adapted are the first of the tensors: the outputs are their gradients, in their order.
            still = len(adapted) + len(fixed)
            return gradient_along(lambda *here: objective(*restore(here)), x, of, w, wrt, still=still)

        return recompute(grad(objective), adapted, fixed, data, pullback=pullback)

    return gradient


def segment(
    loop: Loop,
    gradient: GradientOf,
    adapted: Params,
    state: State,
    first: int,
    last: int,
    every: bool,
    step: StepOf | None,
) -> tuple[list[Params], State]:
    """:meth:`Loop.run`, of which the graph keeps the start alone: its steps are run again for the derivative.

    Of the parameters those after the last step, or after ``every`` step.
    """

    def steps(adapted: Params, state: State, fixed: Params, data: tuple[Any, ...], rates: Rates) -> Any:
        again = replace(loop, fixed=fixed, data=data, rates=rates)
        passed, state = again.run(gradient, adapted, state, first, last, step=step)
        return passed if every else passed[-1:], state

    return recompute(steps, adapted, state, loop.fixed, loop.data, loop.rates)
