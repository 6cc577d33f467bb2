"""Functions of PyTorch's that run as others in a block: what the integrations are made of.

PyTorch takes a mode off for the time of a function that the mode was shown. Where models run in that function (in a
backward pass those computed again, in a higher-order operator its branches) they would run as they are, without a word.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import torch
from torch._ops import HigherOrderOperator
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

BACKWARD = (torch.Tensor.backward, torch.autograd.backward, torch.autograd.grad)
# The tests by which PyTorch's Python functions find out whether to show themselves.
_TESTS = ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic")
_REDISPATCH = getattr(torch.overrides, "redispatch_function", None)  # not in torch 2.11


def called_as(name: str, library: Any = torch.ops.aten) -> set[Any]:
    """All that an operator of PyTorch can be called as."""
    packet = getattr(library, name, None)
    if packet is None:  # not in this version
        return set()
    binding = {getattr(torch, name)} if hasattr(torch, name) else set()
    return {packet, *(getattr(packet, overload) for overload in packet.overloads()), *binding}


class Replacement(TorchFunctionMode):
    """In its block and thread, functions of PyTorch's run as others, in backward passes too.

    What :func:`metaattn.meta.checkpoint` computes again is computed as at first, in a block or not.

    Args:
        by: What each function is replaced by, which takes its arguments.
        name: Of the block, for errors.

    Raises:
        NotImplementedError: In the block, under :func:`torch.compile`: from a higher-order operator.
    """

    def __init__(self, by: Mapping[Callable[..., Any], Callable[..., Any]], name: str) -> None:
        super().__init__()
        self.by = by
        self.name = name

    @property
    def key(self) -> Hashable:
        """Equal for two that do the same."""
        return type(self), tuple(self.by.items())

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in BACKWARD or isinstance(func, HigherOrderOperator):
            return self._run_a_model(func, types, args, kwargs)
        return self.by.get(func, func)(*args, **kwargs)

    def _run_a_model(self, func: Callable[..., Any], types: Any, args: Any, kwargs: Any) -> Any:
        """Call what runs models in its turn, with the mode on."""
        if not torch.compiler.is_compiling():
            with self:
                return _call_unshown(func, types, args, kwargs)
        if func in BACKWARD:
            return func(*args, **kwargs)
        raise NotImplementedError(
            f"torch.compile cannot keep {self.name} on inside of a higher-order operator (a checkpoint, torch.cond); "
            "without fullgraph=True it runs a checkpoint uncompiled"
        )


def replacements() -> list[Replacement]:
    """Those at work, the outermost first."""
    return [mode for mode in _get_current_function_mode_stack() if isinstance(mode, Replacement)]


def unshown(function: Any, **changed: Any) -> Callable[..., Any]:
    """A copy of a Python function of PyTorch's that does not show itself to modes, only what it calls.

    Args:
        function: The function.
        **changed: Other global names that it is to see otherwise.
    """
    names = {**function.__globals__, **dict.fromkeys(_TESTS, lambda *_: False), **changed}
    copy = types.FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


_unshown = functools.cache(unshown)


def _call_unshown(func: Any, types: Any, args: Any, kwargs: Any) -> Any:
    """Call a function that PyTorch has shown to a mode, without showing it again; what it calls is shown."""
    if _REDISPATCH is not None:
        return _REDISPATCH(func, types, args, kwargs)
    if isinstance(func, HigherOrderOperator):  # what its __call__ does after its test
        keys = torch._ops._compute_keyset(args, kwargs, func.non_fallthrough_keys)
        return func.dispatch(keys.highestPriorityTypeId(), *args, **kwargs)
    return _unshown(func)(*args, **kwargs)
