"""What a function is made of: by what a compiled form of it is found again, and the tensors that it closes over.

A loss is often a new closure at each call, of the same code over the same things. So it is known by its code and by
what it holds: plain values by value, modules and objects by identity, tensors by their form alone. Their numbers, and
which tensors they are, may change: a compiled form takes them as inputs.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Hashable, Iterator
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

from ..autodiff import FunctionKey, ambient_settings, closure

_PLAIN = (int, float, complex, str, bytes, type(None), torch.dtype, torch.device, Enum, range)
_OURS = ("torch", "metaattn")  # libraries, whose globals do not change


def function_key(*things: Any) -> FunctionKey:
    """The source of functions, constants, and what else a program depends on; and of the ambient_settings now."""
    walk = _Walk()
    for thing in things:
        walk.on(thing, 1)
    key = (tuple(walk.key), ambient_settings())
    return FunctionKey(key, tuple(walk.held), key)


class _Same:
    """A thing, equal to itself alone; and alive, so that no other can be taken for it."""

    def __init__(self, thing: Any) -> None:
        self.thing = thing

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.thing is self.thing

    def __hash__(self) -> int:
        return id(self.thing)


class _Walk:
    def __init__(self) -> None:
        self.key: list[Hashable] = []
        self.held: list[Tensor] = []
        self._seen: dict[int, int] = {}
        self._alive: list[Any] = []

    def on(self, thing: Any, objects: int) -> None:
        """Take down a thing; of an object its attributes, ``objects`` deep."""
        if isinstance(thing, _PLAIN):
            self.key.append((type(thing), thing))
            return
        if id(thing) in self._seen:
            self.key.append(("again", self._seen[id(thing)]))
            return
        self._seen[id(thing)] = len(self._seen)
        self._alive.append(thing)
        if isinstance(thing, Tensor):
            self.key.append((thing.shape, thing.stride(), thing.dtype, thing.device))
            self.held.append(thing)
        elif isinstance(thing, nn.Module):
            self.key.append((_Same(thing), tuple(m.training for m in thing.modules())))
            self._all([*thing.parameters(), *thing.buffers()], objects)
        elif isinstance(thing, types.FunctionType):
            self.key.append(thing.__code__)
            self._all(closure(thing), objects)
            self._all(_globals(thing), objects)
        elif isinstance(thing, types.MethodType):
            self._all((thing.__func__, thing.__self__), objects)
        elif isinstance(thing, functools.partial):
            self._all((thing.func, thing.args, thing.keywords), objects)
        elif isinstance(thing, (list, tuple, dict)):
            self._all(thing, objects)
        elif isinstance(thing, (set, frozenset)) and all(isinstance(part, _PLAIN) for part in thing):
            self.key.append(frozenset(thing))
        elif objects and hasattr(thing, "__dict__") and not isinstance(thing, (type, types.ModuleType)):
            self.key.append(_Same(type(thing)))
            self._all(vars(thing), objects - 1)
        else:
            self.key.append(_Same(thing))

    def _all(self, parts: Any, objects: int) -> None:
        self.key.append((type(parts), len(parts)))
        for part in parts:
            if isinstance(parts, dict):
                self.key.append(part)
            self.on(parts[part] if isinstance(parts, dict) else part, objects)


def _globals(function: types.FunctionType) -> dict[str, Any]:
    """The globals that a function names."""
    if (function.__module__ or "").split(".")[0] in _OURS:
        return {}
    there = function.__globals__
    return {name: there[name] for name in _names(function.__code__) if name in there}


def _names(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)
