"""The inner loop, apart from how it is differentiated."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from ..compile.compiler import MetaStepCompiler
from ._checks import check_scalar
from .optim import InnerOptimizer, Params, Rates, State

Loss = Callable[..., Tensor]
GradientFunction = Callable[[Params, Params, tuple[Any, ...]], Params]  # of adapted, fixed, data
# Of adapted, state, fixed, data, rates and the number of the step, from 0, to the next adapted and state.
StepFunction = Callable[[Params, State, Params, tuple[Any, ...], Rates, int], tuple[Params, State]]


@dataclass(frozen=True)
class Loop:
    """The inner loop of one task.

    Args:
        loss: ``loss(params, *data)``, a scalar.
        names: Names of all parameters, in their order.
        fixed: The parameters that do not change.
        data: What the loss takes after the parameters.
        optimizer: The inner optimizer.
        rates: Its learning rates.
        compiler: Compiler of the meta-step, if it is compiled: the one that was active when the loop was made.
    """

    loss: Loss
    names: tuple[str, ...]
    fixed: Params
    data: tuple[Any, ...]
    optimizer: InnerOptimizer
    rates: Rates
    compiler: MetaStepCompiler | None = None

    def join(self, adapted: Params, fixed: Params) -> Params:
        """Return all parameters, in their order."""
        return {k: adapted[k] if k in adapted else fixed[k] for k in self.names}

    def objective(self, adapted: Params, fixed: Params, data: tuple[Any, ...]) -> Tensor:
        """Return the loss, as a function of every tensor that it depends on.

        Raises:
            TypeError: The loss returns no tensor.
            ValueError: The loss returns a tensor that is not a scalar.
        """
        loss = self.loss(self.join(adapted, fixed), *data)
        check_scalar(loss)
        return loss

    def run(
        self,
        gradient: GradientFunction,
        adapted: Params,
        state: State,
        first: int,
        last: int,
        *,
        step: StepFunction | None = None,
    ) -> tuple[list[Params], State]:
        """Take the steps ``first`` to ``last - 1``.

        Args:
            gradient: The inner gradient, for the optimizer.
            adapted: The parameters that change.
            state: The optimizer's.
            first: Number of the first step.
            last: Number after that of the last step.
            step: A whole step, in place of the gradient and the optimizer.

        Returns:
            The adapted parameters after each step, and the optimizer's state after the last.
        """
        passed = []
        for index in range(first, last):
            if step is not None:
                adapted, state = step(adapted, state, self.fixed, self.data, self.rates, index)
            else:
                g = gradient(adapted, self.fixed, self.data)
                adapted, state = self.optimizer.update(g, state, adapted, self.rates, index)
            passed.append(adapted)
        return passed, state

    def detached(self) -> Loop:
        """Return the same loop with constants for its tensors."""
        return replace(self, fixed=detach(self.fixed), data=detach(self.data), rates=detach(self.rates))


def detach(tree: Any) -> Any:
    """Return a tree with all of its tensors detached."""
    return tree_map_only(Tensor, torch.Tensor.detach, tree)
