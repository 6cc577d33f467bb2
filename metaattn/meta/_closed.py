"""Tensors that a function closes over: where it is computed again later, their derivatives would be lost."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from ..ops._function import in_forward_mode, tangent_at_hand
from ._recompute import Replay, tensors_of

_wrapped = torch._C._functorch.is_functorch_wrapped_tensor


def check_closed(name: str, function: Callable[..., Any], of: Callable[..., Any], *args: Any) -> bool:
    """Refuse a function that depends, differentiably, on more than its arguments.

    It is called once on constants: if its result can be differentiated nevertheless, then by a tensor that it
    closes over.

    Args:
        name: What the user calls the function.
        function: What is called.
        of: What the user gave.
        *args: What it is called on: trees.

    Returns:
        Whether the function draws random numbers.

    Raises:
        ValueError: If it does depend on such a tensor.
    """
    if any(_wrapped(t) for t in _tensors_in(of)):
        raise ValueError(_message(name, "a tensor that a torch.func transform (vmap, grad, jvp, …) is following"))
    replay = Replay(tensors_of(args)[0])
    with replay():
        out = function(*tree_map_only(Tensor, torch.Tensor.detach, args))
    if any(_differentiable(t) for t in tree_leaves(out) if isinstance(t, Tensor)):
        raise ValueError(_message(name, "a tensor that requires grad"))
    return replay.drew()


def _message(name: str, what: str) -> str:
    return (
        f"with this gradient, {name} must take all that a derivative may be wanted of as arguments; got one that "
        f"closes over {what}. Pass it in data, or detach it where it is a constant; or use gradient='reverse'"
    )


def _differentiable(t: Tensor) -> bool:
    """Whether any level of reverse mode, or the innermost one of forward mode, follows a tensor."""
    if in_forward_mode() and tangent_at_hand(t) is not None:
        return True
    while _wrapped(t):
        if t.requires_grad:
            return True
        t = torch._C._functorch.get_unwrapped(t)
    return t.requires_grad


def _tensors_in(thing: Any) -> Iterator[Tensor]:
    """Tensors in the closures of functions, as far as they are seen from outside.

    Those of modules are left out: :func:`torch.func.functional_call` replaces them.
    """
    seen: set[int] = set()
    todo = [thing]
    while todo:
        x = todo.pop()
        if id(x) in seen:
            continue
        seen.add(id(x))
        if isinstance(x, Tensor):
            yield x
        elif isinstance(x, types.FunctionType):
            todo += [c.cell_contents for c in x.__closure__ or () if _filled(c)]
            todo += [*(x.__defaults__ or ()), *(x.__kwdefaults__ or {}).values()]
        elif isinstance(x, types.MethodType):
            todo += [x.__func__, x.__self__]
        elif isinstance(x, functools.partial):
            todo += [x.func, *x.args, *x.keywords.values()]
        elif isinstance(x, dict | list | tuple):
            todo += tree_leaves(x) if tree_leaves(x) != [x] else []


def _filled(cell: types.CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018 - an empty cell raises
    except ValueError:
        return False
    return True
