"""Keys under which compiled forms of functions are stored.

A loss is often a new closure at each call, of the same code over the same objects. So a key covers the function's code
and what it closes over: plain values by value, modules and objects by identity, tensors by their spec. The numbers in
captured tensors, and which tensors they are, may change between calls: compiled forms take them as extra inputs.
"""

from __future__ import annotations

import types
from collections.abc import Hashable
from typing import Any

from torch import Tensor, nn

from ..autodiff import FunctionKey, Visited, ambient_settings, is_plain, tensor_spec, visit


def function_key(*things: Any) -> FunctionKey:
    """Return the key of a program that depends on these functions, constants and objects, in the current settings."""
    entries: list[Hashable] = []
    captured: list[Tensor] = []
    for visited in visit(things, "", follow_globals=True):
        entries.append((_label(visited), None if visited.parts is None else tuple(visited.parts)))
        if isinstance(visited.thing, Tensor) and visited.repeats is None:
            captured.append(visited.thing)
    key = (tuple(entries), ambient_settings())
    return FunctionKey(key, tuple(captured), key)


class _Identity:
    """An object that equals only itself, kept alive so that no other object can get its id."""

    def __init__(self, thing: Any) -> None:
        self.thing = thing

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Identity) and other.thing is self.thing

    def __hash__(self) -> int:
        return id(self.thing)


def _label(visited: Visited) -> Hashable:
    """Return the entry of an object in the key; its parts have separate entries."""
    thing = visited.thing
    if visited.repeats is not None:
        return "repeats", visited.repeats
    if isinstance(thing, Tensor):
        return tensor_spec(thing)
    if is_plain(thing):
        return type(thing), thing
    if isinstance(thing, nn.Module):
        return _Identity(thing), tuple(m.training for m in thing.modules())
    if isinstance(thing, types.FunctionType):
        return thing.__code__
    if isinstance(thing, (set, frozenset)) and all(map(is_plain, thing)):
        return frozenset(thing)
    if visited.parts is not None and (isinstance(thing, (list, tuple, dict)) or hasattr(thing, "__dict__")):
        return _Identity(type(thing))
    return _Identity(thing)
