"""The inner loop itself, whichever way it is differentiated."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from ._checks import check_scalar
from .optim import InnerOptimizer, Params, Rates, State

Loss = Callable[..., Tensor]
GradientOf = Callable[[Params, Params, tuple[Any, ...]], Params]  # of adapted, fixed, data
# Of adapted, state, fixed, data, rates and the step's index, to the next adapted and state.
StepOf = Callable[[Params, State, Params, tuple[Any, ...], Rates, int], tuple[Params, State]]


@dataclass(frozen=True)
class Loop:
    """What the steps are made of.

    Args:
        loss: ``loss(params, *data)``.
        names: Of all parameters, in their order.
        fixed: Those that do not change.
        data: What the loss takes after the parameters.
        optimizer: Of the steps.
        rates: Its learning rates.
    """

    loss: Loss
    names: tuple[str, ...]
    fixed: Params
    data: tuple[Any, ...]
    optimizer: InnerOptimizer
    rates: Rates

    def join(self, adapted: Params, fixed: Params) -> Params:
        """All parameters, in their order."""
        return {k: adapted[k] if k in adapted else fixed[k] for k in self.names}

    def objective(self, adapted: Params, fixed: Params, data: tuple[Any, ...]) -> Tensor:
        """The loss, as a function of all that it depends on."""
        loss = self.loss(self.join(adapted, fixed), *data)
        check_scalar(loss)
        return loss

    def run(
        self, gradient: GradientOf, adapted: Params, state: State, first: int, last: int, *, step: StepOf | None = None
    ) -> tuple[list[Params], State]:
        """Steps ``first`` to ``last - 1``: what the parameters were after each, and the optimizer's state.

        Each is by ``step``, if there is one, else by the ``gradient`` and the optimizer.
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
        """The same, of constants."""
        return replace(self, fixed=detach(self.fixed), data=detach(self.data), rates=detach(self.rates))


def detach(tree: Any) -> Any:
    """A tree of constants."""
    return tree_map_only(Tensor, torch.Tensor.detach, tree)
