"""Tensors that a function uses and is not given, through which a derivative would be lost in silence.

A function that is run below the transforms at work sees of a tensor that it closes over only what is left
there: PyTorch takes the wrapper of a transform off, and with it the derivative. So they are looked for.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._C import _functorch
from torch._functorch.pyfunctorch import retrieve_all_functorch_interpreters, retrieve_current_functorch_interpreter
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from ._custom_function import current_tangent, in_forward_mode

_REMEDY = "pass it as an argument (of a module: the module itself, or its parameters to functional_call)"


def levels(t: Tensor) -> Iterator[tuple[int, bool]]:
    """The levels of the transforms that have wrapped a tensor, and whether each is a vmap."""
    while _functorch.is_functorch_wrapped_tensor(t):
        yield _functorch.maybe_get_level(t), _functorch.is_batchedtensor(t)
        t = _functorch.get_unwrapped(t)


def check_captured(function: Any, constants: Any) -> None:
    """Neither what a function closes over nor the constants among its arguments hold a tensor under a transform.

    Raises:
        ValueError: One does; the message has its name.
    """
    for name, t in (*transformed(function, "the function"), *transformed(constants, "constant arguments")):
        raise ValueError(
            f"the function uses a tensor that it is not given ({name}, {list(t.shape)}) and that a torch.func "
            f"transform differentiates or maps: its derivative would be lost; {_REMEDY}"
        )


def transformed(thing: Any, name: str, *, modules: bool = True) -> Iterator[tuple[str, Tensor]]:
    """The tensors under a transform within reach of a function, by the names it has for them.

    Args:
        thing: The function, or what holds tensors.
        name: What it is called.
        modules: Whether the parameters and buffers of modules count.
    """
    skipped = (type, types.ModuleType) if modules else (type, types.ModuleType, nn.Module)
    for path, t in _held(thing, set(), name, 1, skipped):
        if any(level > 0 for level, _ in levels(t)):
            yield path, t


def _held(
    thing: Any, seen: set[int], name: str, objects: int, skipped: tuple[type, ...]
) -> Iterator[tuple[str, Tensor]]:
    """All tensors within reach; of an object, its attributes alone."""
    if id(thing) in seen or isinstance(thing, skipped):
        return
    seen.add(id(thing))
    parts: dict[Any, Any] = {}
    if isinstance(thing, Tensor):
        yield name, thing
    elif isinstance(thing, nn.Module):
        parts = {**dict(thing.named_parameters()), **dict(thing.named_buffers())}
    elif isinstance(thing, types.FunctionType):
        parts = closure(thing)
    elif isinstance(thing, types.MethodType):
        parts = {"code": thing.__func__, "self": thing.__self__}
    elif isinstance(thing, functools.partial):
        parts = {"code": thing.func, **dict(enumerate(thing.args)), **thing.keywords}
    elif isinstance(thing, (list, tuple, dict)):
        parts = dict(enumerate(tree_leaves(thing)))
    elif objects and hasattr(thing, "__dict__"):
        parts, objects = vars(thing), objects - 1
    for key, part in parts.items():
        yield from _held(part, seen, f"{name}.{key}", objects, skipped)


def closure(function: Any) -> dict[str, Any]:
    """Cells and defaults of a Python function."""
    held = {}
    for key, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            held[key] = cell.cell_contents
        except ValueError:  # not yet filled
            continue
    defaults = {f"default {i}": d for i, d in enumerate(function.__defaults__ or ())}
    return {**held, **defaults, **(function.__kwdefaults__ or {})}


class Watch(TorchFunctionMode):
    """Refuses tensors of transforms that are not at work: what :func:`check_captured` cannot see, as globals.

    Likewise those with a tangent of a ``dual_level``, where none would be propagated.
    """

    def __enter__(self) -> Watch:
        self.forward_mode = torch._C._is_fwd_grad_enabled()
        super().__enter__()
        return self

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for t in _tensors_among((*args, *(kwargs or {}).values())):
            if _stranger(t) or self._lost_tangent(t):
                raise ValueError(
                    f"the function uses a tensor that it is not given, {list(t.shape)}, and that a torch.func "
                    f"transform differentiates or maps: its derivative would be lost; {_REMEDY}"
                )
        return func(*args, **(kwargs or {}))

    def _lost_tangent(self, t: Tensor) -> bool:
        if self.forward_mode or torch._C._is_fwd_grad_enabled() or not in_forward_mode():
            return False
        with forward_ad._set_fwd_grad_enabled(True):  # else it does not show
            return current_tangent(t) is not None


def _tensors_among(arguments: Sequence[Any]) -> Iterator[Tensor]:
    """Of an operation, which takes them one by one or in sequences."""
    for a in arguments:
        if isinstance(a, Tensor):
            yield a
        elif isinstance(a, (list, tuple)):
            yield from _tensors_among(a)


def _stranger(t: Tensor) -> bool:
    if not _functorch.is_functorch_wrapped_tensor(t):
        return False
    stack = _functorch.get_interpreter_stack() or []
    vmap = _functorch.TransformType.Vmap
    return any(
        level > len(stack) or (level > 0 and (stack[level - 1].key() == vmap) != mapped) for level, mapped in levels(t)
    )


def check_outputs(outputs: tuple[Tensor, ...]) -> None:
    """Of a function run on tensors that require no gradient, no output requires one, nor is of a level above.

    Raises:
        ValueError: One does: the function uses another tensor that does.
    """
    if any(o.requires_grad or _stranger(o) for o in outputs):
        raise ValueError(
            "the function uses a tensor that it is not given and that requires a gradient, which would be lost; "
            + _REMEDY
        )


def followed(t: Tensor) -> bool:
    """Whether any level, of reverse or of forward mode, differentiates a tensor."""
    t = _functorch.unwrap_if_dead(t)
    if t.requires_grad or (in_forward_mode() and current_tangent(t) is not None):
        return True
    if _functorch.peek_interpreter_stack() is None:
        return False
    innermost = retrieve_current_functorch_interpreter()
    while _functorch.maybe_get_level(t) >= innermost.level():
        t = _functorch.get_unwrapped(t)
    with innermost.lower():
        return followed(t)


def unmapped(tensors: tuple[Tensor, ...]) -> bool:
    """Whether there is a vmap at work that has none of the tensors mapped and draws not one number for all."""
    mapped = {level for t in tensors for level, batched in levels(t) if batched}
    vmaps = [i for i in retrieve_all_functorch_interpreters() if hasattr(i, "randomness")]
    return any(i.randomness() != "same" and i.level() not in mapped for i in vmaps)
