"""Checks of what a loss and an optimizer close over.

Where they are computed again later, PyTorch does not see the tensors that they close over, and the derivatives with
respect to these would be lost silently.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

from ..autodiff import CallContext, is_differentiated, split_tensors, transformed_tensors
from ._inner_loop import Loop, detach
from .optim import Params, State


def check_loop(loop: Loop, adapted: Params, state: State) -> bool:
    """Check that the loss and the optimizer of a loop depend, differentiably, on nothing but their arguments.

    Each is called once on constants. If its result can be differentiated nevertheless, it closes over a tensor that is
    differentiated. The states of the random number generators are left as they were.

    Args:
        loop: The inner loop.
        adapted: The parameters that it starts from.
        state: The state of the optimizer that it starts from.

    Returns:
        Whether the loss or the optimizer draws random numbers.

    Raises:
        ValueError: One of them closes over a tensor that is differentiated.
    """

    def update(adapted: Params, state: State) -> Any:
        gradient = adapted  # any gradient would do
        return loop.optimizer.update(gradient, state, adapted, detach(loop.rates), 0)

    drew = _check("the optimizer", update, loop.optimizer.update, adapted, state)
    return _check("the loss", loop.objective, loop.loss, adapted, loop.fixed, loop.data) or drew


def check_loss(loss: Callable[..., Any], params: Params, batch: Any) -> bool:
    """Check a single loss in the way of :func:`check_loop`, with the same result and error."""
    return _check("the loss", lambda params, batch: loss(params, *batch), loss, params, tuple(batch))


def _check(name: str, function: Callable[..., Any], user_function: Callable[..., Any], *args: Any) -> bool:
    """Run a function on constants, and look through what the user's function inside of it closes over."""
    # Tensors of modules are found by the call below instead: functional_call replaces them.
    for path, t in transformed_tensors(user_function, name, modules=False):
        tensor = f"a tensor ({path}, {list(t.shape)})"
        raise ValueError(_message(name, f"{tensor} that a torch.func transform (vmap, grad, jvp, …) is following"))
    context = CallContext(split_tensors(args)[0], random=True)

    def run(*args: Any) -> tuple[Any, bool]:
        return function(*args), context.settle()

    out, drew = context(run, *detach(args))
    if any(is_differentiated(t) for t in tree_leaves(out) if isinstance(t, Tensor)):
        raise ValueError(_message(name, "a tensor that requires grad"))
    return drew


def _message(name: str, tensor: str) -> str:
    return (
        f"with this gradient, {name} must take all tensors that are differentiated as arguments; got one that closes "
        f"over {tensor}. Pass it in data, or detach it where it is a constant; or use gradient='reverse'"
    )
