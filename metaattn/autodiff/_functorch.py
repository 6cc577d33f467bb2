"""Every private functorch and forward-mode function of PyTorch that the project uses, under a plain name.

:mod:`torch.func` has no public interface for rules that run level by level, which :mod:`._dispatch` needs, nor for
asking which transforms are active or which of them wrapped a tensor. PyTorch makes no promise about these names, so
they stand in this file only. ``tests/test_private_names.py`` checks each of them, with its parameters, and fails with a
list when a new PyTorch has changed some. Other private names, of the dispatcher and of modes, are in
:mod:`._torch_internals`.

The terms are those of functorch. Each active transform is a *level* with a number, counted from 1 at the outermost, and
an *interpreter* that runs operations at that level; the stack holds the interpreters, innermost last. A transform wraps
the tensors that it differentiates or maps, and a wrapper knows the number of its level.

Functions are aliases rather than wrappers where possible: they run at each level of every call, and Dynamo recognises
some of them by identity.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch
from torch._functorch import eager_transforms
from torch._functorch.autograd_function import VmapInfo
from torch._functorch.pyfunctorch import (
    FuncTorchInterpreter as Interpreter,
)
from torch._functorch.pyfunctorch import (
    retrieve_all_functorch_interpreters as all_interpreters,
)
from torch._functorch.pyfunctorch import (
    retrieve_current_functorch_interpreter as innermost_interpreter,
)
from torch._functorch.pyfunctorch import (
    temporarily_clear_interpreter_stack as outside_transforms,
)
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.autograd.forward_ad import _set_fwd_grad_enabled as set_forward_mode_enabled
from torch.autograd.function import _SingleLevelFunction

__all__ = [
    "Interpreter",
    "SingleLevelFunction",
    "TransformType",
    "VmapInfo",
    "active_transforms",
    "all_interpreters",
    "apply_at_one_level",
    "in_dual_level",
    "in_transform",
    "innermost_interpreter",
    "innermost_transform",
    "is_forward_mode_enabled",
    "is_legacy_batched",
    "is_wrapped",
    "jvp_is_active",
    "outside_transforms",
    "set_forward_mode_enabled",
    "unwrap_batched",
    "unwrap_dead_wrappers",
    "unwrap_for_grad",
    "unwrap_if_dead",
    "unwrap_once",
    "wrap_batched",
    "wrap_for_grad",
    "wrapper_level",
    "wrapper_levels",
]


class SingleLevelFunction(_SingleLevelFunction):
    """A custom function as a node in the graph of one level, instead of all levels at once."""


TransformType = _functorch.TransformType  # Grad, Jvp, Vmap, Functionalize

# Wrappers of tensors. "Legacy" is the vmap of ``is_grads_batched`` and of ``vectorize=True``, which has no level.
is_wrapped: Callable[[Tensor], bool] = _functorch.is_functorch_wrapped_tensor
is_legacy_batched: Callable[[Tensor], bool] = _functorch.is_legacy_batchedtensor
wrapper_level: Callable[[Tensor], int] = _functorch.maybe_get_level  # -1 for a plain tensor
unwrap_once: Callable[[Tensor], Tensor] = _functorch.get_unwrapped
unwrap_if_dead: Callable[[Tensor], Tensor] = _functorch.unwrap_if_dead
wrap_for_grad: Callable[[Tensor, int], Tensor] = _functorch._wrap_for_grad
unwrap_for_grad: Callable[[Tensor, int], Tensor] = _functorch._unwrap_for_grad
wrap_batched: Callable[[Tensor, int, int], Tensor] = _functorch._add_batch_dim
unwrap_batched: Callable[[Tensor, int], tuple[Tensor, int | None]] = _functorch._unwrap_batched

# ``None``, or the C++ half of the innermost interpreter: cheaper to ask for than the interpreter itself.
innermost_transform: Callable[[], Any] = _functorch.peek_interpreter_stack
is_forward_mode_enabled: Callable[[], bool] = torch._C._is_fwd_grad_enabled


def apply_at_one_level(function: type[SingleLevelFunction], *args: Any) -> Any:
    """Apply a :class:`SingleLevelFunction`."""
    with enable_single_level_autograd_function():
        return function.apply(*args)  # type: ignore[attr-defined]


def active_transforms() -> tuple[Any, ...]:
    """Return the :data:`TransformType` of each active transform of :mod:`torch.func`, the outermost first."""
    return tuple(level.key() for level in _functorch.get_interpreter_stack() or ())


def in_transform() -> bool:
    """Return whether a transform of :mod:`torch.func` is active."""
    return _functorch.peek_interpreter_stack() is not None


def in_dual_level() -> bool:
    """Return whether a ``forward_ad.dual_level`` is open, be it by the user or by :func:`torch.func.jvp`."""
    return forward_ad._current_level >= 0


def jvp_is_active() -> bool:
    """Return whether :func:`torch.func.jvp` opened the current ``dual_level``."""
    return eager_transforms.JVP_NESTING > 0


def unwrap_dead_wrappers(tensors: Iterable[Tensor]) -> tuple[Tensor, ...]:
    """Return tensors without the wrappers of transforms that have ended."""
    return tuple(map(unwrap_if_dead, tensors))


def wrapper_levels(t: Tensor) -> Iterator[tuple[int, bool]]:
    """Yield the level of each transform that wraps a tensor, and whether that transform is a vmap."""
    while _functorch.is_functorch_wrapped_tensor(t):
        yield _functorch.maybe_get_level(t), _functorch.is_batchedtensor(t)
        t = _functorch.get_unwrapped(t)
