"""What a loss and an optimizer close over: where they are computed again later, its derivatives would be lost."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

from ..autodiff import CallContext, is_differentiated, split_tensors, transformed_tensors
from ._inner_loop import Loop, detach
from .optim import Params, State


def check_loop(loop: Loop, adapted: Params, state: State) -> bool:
    """Refuse a loss or an optimizer that depends, differentiably, on more than its arguments.

    Each is called once on constants: if its result can be differentiated nevertheless, then by a tensor that it closes
    over. Random numbers are left as they were.

    Returns:
        Whether either draws random numbers.

    Raises:
        ValueError: One does depend on such a tensor.
    """

    def update(adapted: Params, state: State) -> Any:
        return loop.optimizer.update(adapted, state, adapted, detach(loop.rates), 0)  # any gradient would do

    drew = _check("the optimizer", update, loop.optimizer.update, adapted, state)
    return _check("the loss", loop.objective, loop.loss, adapted, loop.fixed, loop.data) or drew


def check_loss(loss: Callable[..., Any], params: Params, batch: Any) -> bool:
    """The same of a loss on its own."""
    return _check("the loss", lambda params, batch: loss(params, *batch), loss, params, tuple(batch))


def _check(name: str, function: Callable[..., Any], of: Callable[..., Any], *args: Any) -> bool:
    # The tensors of modules are left to the call: functional_call replaces them.
    for where, t in transformed_tensors(of, name, modules=False):
        held = f"a tensor ({where}, {list(t.shape)})"
        raise ValueError(_message(name, f"{held} that a torch.func transform (vmap, grad, jvp, …) is following"))
    replay = CallContext(split_tensors(args)[0], random=True)

    def noted(*args: Any) -> tuple[Any, bool]:
        return function(*args), replay.settle()

    out, drew = replay(noted, *detach(args))
    if any(is_differentiated(t) for t in tree_leaves(out) if isinstance(t, Tensor)):
        raise ValueError(_message(name, "a tensor that requires grad"))
    return drew


def _message(name: str, what: str) -> str:
    return (
        f"with this gradient, {name} must take all that a derivative may be wanted of as arguments; got one that "
        f"closes over {what}. Pass it in data, or detach it where it is a constant; or use gradient='reverse'"
    )
