"""Private names of PyTorch's dispatcher, modes and pytrees that the project uses, under a plain name.

As for those in :mod:`._functorch`, PyTorch makes no promise about them, and ``tests/test_private_names.py`` lists them.
The private names of Dynamo and Inductor are in :mod:`metaattn.compile`.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.util
import sys
import types
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._ops import HigherOrderOperator
from torch.overrides import _get_current_function_mode_stack as function_mode_stack
from torch.utils import _pytree
from torch.utils._python_dispatch import _disable_current_modes as outside_modes
from torch.utils._python_dispatch import _get_current_dispatch_mode as innermost_dispatch_mode

__all__ = [
    "HigherOrderOperator",
    "allow_in_graph",
    "call_without_function_mode",
    "function_mode_stack",
    "innermost_dispatch_mode",
    "is_tracing",
    "is_zero_tensor",
    "outside_modes",
    "redispatch_below_autograd",
    "skip_torch_function",
    "tree_flatten",
    "without_autocast",
]

F = TypeVar("F", bound=Callable[..., Any])

# The tests by which PyTorch's Python functions decide whether to call ``__torch_function__``.
_TORCH_FUNCTION_TESTS = ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic")
_redispatch_function = getattr(torch.overrides, "redispatch_function", None)  # not in PyTorch 2.11


def without_autocast() -> AbstractContextManager[None]:
    """Turn autocast off on every device inside the block."""
    context: AbstractContextManager[None] = torch._C._DisableAutocast()
    return context


def redispatch_below_autograd(operator: Any, keys: Any, *args: Any) -> Any:
    """Run an operator's kernel below autograd; ``keys`` is the keyset that its autograd kernel received."""
    with torch._C._AutoDispatchBelowAutograd():
        return operator.redispatch(keys & torch._C._after_autograd_keyset, *args)


# Whether a tangent is one of the zeros that autograd creates without memory for them.
is_zero_tensor: Callable[[Tensor], bool] = Tensor._is_zerotensor


def is_tracing() -> bool:
    """Return whether ``make_fx`` is tracing."""
    # A tracer that is active has imported its module. The import takes long in some versions of PyTorch.
    tracer = sys.modules.get("torch.fx.experimental.proxy_tensor")
    return tracer is not None and tracer.get_proxy_mode() is not None


# -- torch function modes ------------------------------------------------------------------------------------------


def skip_torch_function(function: Any, **changed: Any) -> Callable[..., Any]:
    """Return a copy of a Python function of PyTorch that does not call ``__torch_function__``; what it calls does.

    Args:
        function: The function.
        **changed: Replacements for other global names that the function uses.
    """
    names = {**function.__globals__, **dict.fromkeys(_TORCH_FUNCTION_TESTS, lambda *_: False), **changed}
    copy = types.FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


_skip_torch_function = functools.cache(skip_torch_function)


def call_without_function_mode(func: Any, types: Any, args: Any, kwargs: Any) -> Any:
    """Call a function that a mode has received, without handing it to a mode again; functions that it calls are."""
    if _redispatch_function is not None:
        return _redispatch_function(func, types, args, kwargs)
    if isinstance(func, HigherOrderOperator):  # what its __call__ does after the test for modes
        keys = torch._ops._compute_keyset(args, kwargs, func.non_fallthrough_keys)
        return func.dispatch(keys.highestPriorityTypeId(), *args, **kwargs)
    return _skip_torch_function(func)(*args, **kwargs)


# -- pytrees -------------------------------------------------------------------------------------------------------


def tree_flatten(tree: Any) -> tuple[list[Any], Any]:
    """Return the leaves of a tree and its structure, as :func:`torch.utils._pytree.tree_flatten` does.

    That one recurses in a nested function, which refers to itself: each call leaves a reference cycle to the garbage
    collector (held by ``tests/boundaries``).
    """
    leaves: list[Any] = []
    return leaves, _flatten(tree, leaves)


def _flatten(node: Any, leaves: list[Any]) -> Any:
    if _pytree.tree_is_leaf(node):
        leaves.append(node)
        return _pytree._LEAF_SPEC
    kind = _pytree._get_node_type(node)
    children, context = _pytree.SUPPORTED_NODES[kind].flatten_fn(node)
    return _pytree.TreeSpec(kind, context, [_flatten(child, leaves) for child in children])


# -- modules of PyTorch that take long to import --------------------------------------------------------------------


class _AfterImport(importlib.abc.MetaPathFinder):
    """Finds some modules as the other finders do, and runs callbacks right after one of them has run."""

    def __init__(self) -> None:
        self.callbacks: dict[str, list[Callable[[], None]]] = {}
        self._searching: set[str] = set()

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name not in self.callbacks or name in self._searching:
            return None
        self._searching.add(name)
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self._searching.remove(name)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module: types.ModuleType) -> None:
            execute(module)
            for callback in self.callbacks.pop(name, ()):
                callback()

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


_finder = _AfterImport()
sys.meta_path.insert(0, _finder)


def after_import(module: str, callback: Callable[[], None]) -> None:
    """Run a callback right after a module is imported for the first time; now, if it is imported already.

    Some modules of PyTorch take longer to import than all the rest of it. What concerns them waits until something else
    imports them.
    """
    if module in sys.modules:
        callback()
    else:
        _finder.callbacks.setdefault(module, []).append(callback)


def allow_in_graph(function: F) -> F:
    """Mark a function as :func:`torch.compiler.allow_in_graph` does, without importing Dynamo.

    ``torch.compiler.allow_in_graph`` imports Dynamo. Here the function is marked right after something else imports it,
    as :func:`torch.compile` does: before Dynamo can trace any function.
    """

    def mark() -> None:
        torch.compiler.allow_in_graph(function)

    after_import("torch._dynamo", mark)
    return function
