"""The hook by which another package takes over functions that this one would run.

:mod:`metaattn.compile` is above this package. While one of its compilers is active, functions with a
:class:`FunctionKey` are offered to it first, and run eagerly where it declines.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from ._pytree import Tensors


@dataclass(frozen=True)
class FunctionKey:
    """Identity of a function, by which a compiled form of it is found again.

    Args:
        key: Equal for two functions that do the same, whatever the numbers in their inputs and in ``captured``.
        captured: The tensors that it closes over.
        root: The key of the function that it was made from by transforms.
    """

    key: Hashable
    captured: tuple[Tensor, ...]
    root: Hashable

    def then(self, *transform: Hashable) -> FunctionKey:
        """Return the key of what a transform makes of the function."""
        return FunctionKey((self.key, *transform), self.captured, self.root)


class Executor(Protocol):
    """Runs functions in place of the eager interpreter.

    Attributes:
        structures: By key, the structure of what a function returns: a compiled form returns its tensors alone.
    """

    structures: dict[Hashable, list[Any]]

    def run(self, key: FunctionKey, function: Callable[..., Tensors], inputs: Sequence[Tensor]) -> Tensors | None:
        """Return the function's outputs, or ``None`` where it is to run eagerly."""
        ...


class _Unset:
    """No block around, in this thread."""


_UNSET = _Unset()
_active: ContextVar[Executor | _Unset | None] = ContextVar("metaattn_executor", default=_UNSET)


def active_executor(carried: Executor | None = None) -> Executor | None:
    """Return the executor of the block around, in this thread; where there is no block, the one that was carried here.

    A backward pass may run in a thread of PyTorch's own: what is differentiated carries the executor of its call.
    """
    active = _active.get()
    return carried if isinstance(active, _Unset) else active


@contextlib.contextmanager
def use_executor(executor: Executor | None) -> Iterator[None]:
    """Offer functions to this executor inside the block; to none for ``None``."""
    token = _active.set(executor)
    try:
        yield
    finally:
        _active.reset(token)


def isolate(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return aliases that common-subexpression elimination treats as distinct, if a graph is being recorded.

    Recomputed values would otherwise be merged with the originals, and these kept for them.
    """
    mode: Any = _get_current_dispatch_mode()
    isolated: list[Tensor] = mode.isolate(tensors) if hasattr(mode, "isolate") else list(tensors)
    return isolated
