"""A mode that replaces functions of PyTorch inside a block; the integrations are made of it.

PyTorch disables a ``TorchFunctionMode`` while its handler runs. Some functions that the handler receives run user
code: a backward pass runs what a checkpoint recomputes, a higher-order operator runs its branches. That code would
silently run without the replacements, so :class:`Replacement` re-enters itself around such functions.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from ._torch_internals import HigherOrderOperator, call_without_function_mode, function_mode_stack

BACKWARD_FUNCTIONS = (torch.Tensor.backward, torch.autograd.backward, torch.autograd.grad)


def callables_of(name: str, library: Any = torch.ops.aten) -> set[Any]:
    """Return every callable that runs an operator: its packet, its overloads, and the function in :mod:`torch`."""
    packet = getattr(library, name, None)
    if packet is None:  # not in this version of PyTorch
        return set()
    binding = {getattr(torch, name)} if hasattr(torch, name) else set()
    return {packet, *(getattr(packet, overload) for overload in packet.overloads()), *binding}


class Replacement(TorchFunctionMode):
    """Replace functions of PyTorch in this block and thread, including in backward passes that run there.

    What :func:`metaattn.meta.checkpoint` recomputes is replaced as in the first run, whether or not the block is still
    open.

    Args:
        replacements: For each function, the one that is called instead, with the same arguments.
        name: Name of the block in error messages.

    Raises:
        NotImplementedError: Inside the block, from a higher-order operator under :func:`torch.compile`.
    """

    def __init__(self, replacements: Mapping[Callable[..., Any], Callable[..., Any]], name: str) -> None:
        super().__init__()
        self.replacements = replacements
        self.name = name

    @property
    def key(self) -> Hashable:
        """Equal for two modes that replace the same functions by the same ones."""
        return type(self), tuple(self.replacements.items())

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in BACKWARD_FUNCTIONS or isinstance(func, HigherOrderOperator):
            return self._call_reentered(func, types, args, kwargs)
        return self.replacements.get(func, func)(*args, **kwargs)

    def _call_reentered(self, func: Callable[..., Any], types: Any, args: Any, kwargs: Any) -> Any:
        """Call a function that runs user code, with this mode enabled."""
        if not torch.compiler.is_compiling():
            with self:
                return call_without_function_mode(func, types, args, kwargs)
        if func in BACKWARD_FUNCTIONS:
            return func(*args, **kwargs)
        raise NotImplementedError(
            f"torch.compile cannot keep {self.name} on inside of a higher-order operator (a checkpoint, torch.cond); "
            "without fullgraph=True it runs a checkpoint uncompiled"
        )


def active_replacements() -> list[Replacement]:
    """Return the active :class:`Replacement` modes, the outermost first."""
    return [mode for mode in function_mode_stack() if isinstance(mode, Replacement)]
