"""Find the tensors that a function captures: those that it uses and does not receive as arguments.

Functions that are recomputed below the active transforms see captured tensors unwrapped: PyTorch removes the wrapper of
each transform that is not active there, and with it the derivative, silently. So captured tensors under a transform are
looked for and reported as errors. :func:`visit` walks through what a function closes over; it also gives
:mod:`metaattn.compile.cache_key` what it makes keys of.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from enum import Enum
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_is_leaf, tree_leaves

from ._custom_function import current_tangent, in_forward_mode
from ._functorch import (
    TransformType,
    active_transforms,
    all_interpreters,
    in_transform,
    innermost_interpreter,
    is_forward_mode_enabled,
    is_wrapped,
    set_forward_mode_enabled,
    unwrap_if_dead,
    unwrap_once,
    wrapper_level,
    wrapper_levels,
)

_PLAIN_TYPES = (int, float, complex, str, bytes, type(None), torch.dtype, torch.device, Enum, range)
_LIBRARIES = ("torch", "metaattn")  # their globals do not change
_REMEDY = "pass it as an argument (of a module: the module itself, or its parameters to functional_call)"


class Visited(NamedTuple):
    """One step of :func:`visit`.

    Attributes:
        path: How the function refers to the object, such as ``"the function.model.weight"``.
        thing: The object.
        parts: Its parts by name, which are visited next; ``None`` if it is not looked into.
        repeats: If it was visited before: the number of that visit, counting objects only. Then it has no parts.
    """

    path: str
    thing: Any
    parts: Mapping[Any, Any] | None = None
    repeats: int | None = None


def visit(
    thing: Any, name: str, *, opaque: tuple[type, ...] = (), follow_globals: bool = False, depth: int = 1
) -> list[Visited]:
    """Visit an object and all that it refers to, each before its parts.

    Functions are followed into their closure and defaults, modules into parameters and buffers, containers into their
    elements, and other objects into their attributes.

    Args:
        thing: A function, or any object.
        name: How paths refer to it.
        opaque: Types that are visited, but not looked into.
        follow_globals: Also follow the global names that a function uses, except in PyTorch and this library.
        depth: Follow attributes of objects that are attributes of objects, up to this many levels.
    """
    visits: list[Visited] = []
    _visit(thing, name, (types.ModuleType, type, *opaque), follow_globals, depth, {}, visits)
    return visits


def _visit(
    thing: Any,
    path: str,
    opaque: tuple[type, ...],
    follow_globals: bool,
    depth: int,
    seen: dict[int, int],
    visits: list[Visited],  # keeps the objects alive: another one could get the same id
) -> None:
    if isinstance(thing, _PLAIN_TYPES):
        visits.append(Visited(path, thing))
        return
    if id(thing) in seen:
        visits.append(Visited(path, thing, repeats=seen[id(thing)]))
        return
    seen[id(thing)] = len(seen)
    parts: Mapping[Any, Any] | None = None
    if isinstance(thing, (Tensor, *opaque)):
        pass
    elif isinstance(thing, nn.Module):
        parts = {**dict(thing.named_parameters()), **dict(thing.named_buffers())}
    elif isinstance(thing, types.FunctionType):
        parts = closed_over(thing) | (_globals_of(thing) if follow_globals else {})
    elif isinstance(thing, types.MethodType):
        parts = {"code": thing.__func__, "self": thing.__self__}
    elif isinstance(thing, functools.partial):
        parts = {"code": thing.func, **dict(enumerate(thing.args)), **thing.keywords}
    elif isinstance(thing, dict):
        parts = thing
    elif isinstance(thing, (list, tuple)):
        parts = dict(enumerate(thing))
    else:
        is_tree = not tree_is_leaf(thing)  # of a type that is registered as a pytree
        if hasattr(thing, "__dict__") and (is_tree or depth):
            parts, depth = vars(thing), depth - (not is_tree)
        if is_tree:
            parts = {**(parts or {}), **{f"leaf {i}": leaf for i, leaf in enumerate(tree_leaves(thing))}}
    visits.append(Visited(path, thing, parts))
    if parts:
        for key, part in parts.items():
            _visit(part, f"{path}.{key}", opaque, follow_globals, depth, seen, visits)


def is_plain(thing: Any) -> bool:
    """Return whether an object is a plain value, such as a number or a string, which has no parts."""
    return isinstance(thing, _PLAIN_TYPES)


def closed_over(function: Any) -> dict[str, Any]:
    """Return what a Python function closes over, and its defaults, by name."""
    found = {}
    for key, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            found[key] = cell.cell_contents
        except ValueError:  # not yet filled
            continue
    defaults = {f"default {i}": d for i, d in enumerate(function.__defaults__ or ())}
    return {**found, **defaults, **(function.__kwdefaults__ or {})}


def _globals_of(function: types.FunctionType) -> dict[str, Any]:
    """Return the global values that a function names."""
    if (function.__module__ or "").split(".")[0] in _LIBRARIES:
        return {}
    values = function.__globals__
    return {f"global {name}": values[name] for name in _global_names(function.__code__) if name in values}


def _global_names(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _global_names(constant)


def transformed_tensors(thing: Any, name: str, *, modules: bool = True) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors under a transform that a function captures, each with the path by which it is found.

    Args:
        thing: The function, or an object that holds tensors.
        name: How paths refer to it.
        modules: Include the parameters and buffers of modules.
    """
    for visited in visit(thing, name, opaque=() if modules else (nn.Module,)):
        t = visited.thing
        if isinstance(t, Tensor) and visited.repeats is None and any(level > 0 for level, _ in wrapper_levels(t)):
            yield visited.path, t


def check_captured(function: Any, constants: Any) -> None:
    """Check that neither a function's closure nor the constants among its arguments hold a tensor under a transform.

    Raises:
        ValueError: One of them does; the message has its path.
    """
    found = (*transformed_tensors(function, "the function"), *transformed_tensors(constants, "constant arguments"))
    for name, t in found:
        raise ValueError(
            f"the function uses a tensor that it is not given ({name}, {list(t.shape)}) and that a torch.func "
            f"transform differentiates or maps: its derivative would be lost; {_REMEDY}"
        )


class CapturedTensorGuard(TorchFunctionMode):
    """Reject operations on captured tensors whose derivative would be lost.

    These are tensors of transforms that are not active inside the block, which :func:`check_captured` cannot see where
    they are global variables, and tensors with a tangent of a ``dual_level`` where forward mode is off.
    """

    def __enter__(self) -> CapturedTensorGuard:
        self.forward_mode = is_forward_mode_enabled()
        super().__enter__()
        return self

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for t in _tensors_among((*args, *(kwargs or {}).values())):
            if _escaped_transform(t) or self._loses_tangent(t):
                raise ValueError(
                    f"the function uses a tensor that it is not given, {list(t.shape)}, and that a torch.func "
                    f"transform differentiates or maps: its derivative would be lost; {_REMEDY}"
                )
        return func(*args, **(kwargs or {}))

    def _loses_tangent(self, t: Tensor) -> bool:
        if self.forward_mode or is_forward_mode_enabled() or not in_forward_mode():
            return False
        with set_forward_mode_enabled(True):  # otherwise the tensor does not show its tangent
            return current_tangent(t) is not None


def _tensors_among(arguments: Sequence[Any]) -> Iterator[Tensor]:
    """Yield the tensors among the arguments of an operation, which may be in sequences."""
    for a in arguments:
        if isinstance(a, Tensor):
            yield a
        elif isinstance(a, (list, tuple)):
            yield from _tensors_among(a)


def _escaped_transform(t: Tensor) -> bool:
    """Return whether a transform wrapped this tensor that is not active here."""
    if not is_wrapped(t):
        return False
    active, vmap = active_transforms(), TransformType.Vmap
    return any(
        level > len(active) or (level > 0 and (active[level - 1] == vmap) != mapped)
        for level, mapped in wrapper_levels(t)
    )


def check_outputs(outputs: tuple[Tensor, ...]) -> None:
    """Check that no output of a function of constants is differentiable, or wrapped by a transform from outside.

    Raises:
        ValueError: One is: the function captures a tensor that is differentiated.
    """
    if any(o.requires_grad or _escaped_transform(o) for o in outputs):
        raise ValueError(
            "the function uses a tensor that it is not given and that requires a gradient, which would be lost; "
            + _REMEDY
        )


def is_differentiated(t: Tensor) -> bool:
    """Return whether reverse or forward mode differentiates a tensor, at any level."""
    t = unwrap_if_dead(t)
    if t.requires_grad or (in_forward_mode() and current_tangent(t) is not None):
        return True
    if not in_transform():
        return False
    innermost = innermost_interpreter()
    while wrapper_level(t) >= innermost.level():
        t = unwrap_once(t)
    with innermost.lower():
        return is_differentiated(t)


def draws_cannot_be_repeated(tensors: tuple[Tensor, ...]) -> bool:
    """Return whether a vmap is active that maps none of the tensors and draws different random numbers per entry."""
    mapped = {level for t in tensors for level, is_vmap in wrapper_levels(t) if is_vmap}
    vmaps = [i for i in all_interpreters() if hasattr(i, "randomness")]
    return any(i.randomness() != "same" and i.level() not in mapped for i in vmaps)
