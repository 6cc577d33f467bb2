"""Inner gradients that keep no activations: their derivative is computed forward over reverse."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor
from torch.func import grad

from ..autodiff import recompute, split_tensors
from ._hvp import Vector, hessian_product
from ._inner_loop import GradientFunction, Loop, StepFunction
from .optim import Params, Rates, State


def mixed_gradient(objective: Callable[..., Tensor]) -> GradientFunction:
    """Return the gradient of ``objective(adapted, fixed, data)`` with respect to its first argument.

    With ``w`` the cotangent of the gradient and ``x`` any of the arguments, the symmetry of second derivatives
    gives ``d/dx <w, dL/d adapted> = d/de dL/dx (adapted + e w)``: one jvp of the gradient in all arguments.

    Source:
        Kemaev et al. 2025, MixFlow-MG (arXiv 2505.00793).
    """

    def gradient(adapted: Params, fixed: Params, data: tuple[Any, ...]) -> Params:
        _, restore = split_tensors((adapted, fixed, data))

        def pullback(x: Vector, w: Vector, wrt: Sequence[int], outputs: Sequence[int]) -> Vector:
            # The adapted parameters are the first tensors, and the outputs are their gradients, in the same order: the
            # places of the outputs are those of the parameters that move.
            first_data = len(adapted) + len(fixed)
            return hessian_product(lambda *x: objective(*restore(x)), x, outputs, w, wrt, first_data=first_data)

        return recompute(grad(objective), adapted, fixed, data, pullback=pullback)

    return gradient


def run_segment(
    loop: Loop,
    gradient: GradientFunction,
    adapted: Params,
    state: State,
    first: int,
    last: int,
    every: bool,
    step: StepFunction | None,
) -> tuple[list[Params], State]:
    """Take steps as :meth:`Loop.run`, of which only the start is kept: the derivative runs them again.

    Args:
        loop: See :meth:`Loop.run`, as for all arguments but ``every``.
        gradient: See there.
        adapted: See there.
        state: See there.
        first: See there.
        last: See there.
        every: Return the parameters after every step, not only after the last.
        step: See there.

    Returns:
        The adapted parameters after each step or after the last, and the optimizer's state after the last.
    """

    def steps(adapted: Params, state: State, fixed: Params, data: tuple[Any, ...], rates: Rates) -> Any:
        segment = replace(loop, fixed=fixed, data=data, rates=rates)
        passed, state = segment.run(gradient, adapted, state, first, last, step=step)
        return passed if every else passed[-1:], state

    return recompute(steps, adapted, state, loop.fixed, loop.data, loop.rates)
