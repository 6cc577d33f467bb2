"""The hook by which a compiler replaces the eager execution of functions.

This package is below :mod:`metaattn.compile` and cannot import it. While an :class:`Executor` of that package is
active, each function that has a :class:`FunctionKey` is offered to it first, and runs eagerly if the executor
declines.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from ._pytree import Tensors
from ._torch_internals import innermost_dispatch_mode


@dataclass(frozen=True)
class FunctionKey:
    """Identity of a function, under which its compiled form is stored.

    Args:
        key: Equal for two functions that compute the same, whatever numbers their inputs and ``captured`` hold.
        captured: The tensors that the function closes over.
        root: Key of the function from which this one was derived by transforms.
    """

    key: Hashable
    captured: tuple[Tensor, ...]
    root: Hashable

    def then(self, *transform: Hashable) -> FunctionKey:
        """Return the key of the function that a transform makes of this one."""
        return FunctionKey((self.key, *transform), self.captured, self.root)


class Executor(Protocol):
    """Runs functions in place of the eager interpreter.

    Attributes:
        structures: For each key, how to rebuild the tree that the function returns: its compiled form returns the
            tensors of that tree only.
    """

    structures: dict[Hashable, list[Any]]

    def run(self, key: FunctionKey, function: Callable[..., Tensors], inputs: Sequence[Tensor]) -> Tensors | None:
        """Return the function's outputs, or ``None`` if it is to run eagerly."""
        ...


class _Unset:
    """Value of the context variable in a thread that is in no :func:`use_executor` block."""


_UNSET = _Unset()
_active: ContextVar[Executor | _Unset | None] = ContextVar("metaattn_executor", default=_UNSET)


def active_executor(carried: Executor | None = None) -> Executor | None:
    """Return the executor of the :func:`use_executor` block that this thread is in.

    Args:
        carried: Returned in a thread that is in no such block. A backward pass may run in a thread of PyTorch's
            autograd engine, so what is differentiated carries the executor of its call.
    """
    active = _active.get()
    return carried if isinstance(active, _Unset) else active


@contextlib.contextmanager
def use_executor(executor: Executor | None) -> Iterator[None]:
    """Offer functions to this executor inside the block, or to none if it is ``None``."""
    token = _active.set(executor)
    try:
        yield
    finally:
        _active.reset(token)


def isolate(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return aliases that common-subexpression elimination treats as distinct, if a graph is being recorded.

    Otherwise it would merge recomputed values with the originals, which would then be stored, not recomputed.
    """
    mode: Any = innermost_dispatch_mode()
    isolated: list[Tensor] = mode.isolate(tensors) if hasattr(mode, "isolate") else list(tensors)
    return isolated
