"""Backends by name, and the name that calls use by default."""

from __future__ import annotations

import os
import threading
import types
from contextvars import ContextVar, Token

from . import auto, blockwise, reference
from .base import Backend, Operands, Problem

BACKENDS: dict[str, Backend] = {b.name: b for b in (auto.backend, reference.backend, blockwise.backend)}
LAZY = ("triton", "vendor")  # imported on first use, because they need the package triton
NAMES = (*BACKENDS, *LAZY)

_current: ContextVar[str] = ContextVar("metaattn_backend", default="auto")
# Number of open `use_backend` blocks in all threads. torch.compile guards on it: it cannot trace the read of a context
# variable, and does not need to while no block is open.
_open = 0
_lock = threading.Lock()  # of two threads that count at once, one would be lost


def check_name(name: object) -> str:
    """Return ``name`` if it is the name of a backend; raise ``ValueError`` otherwise."""
    if name not in NAMES:
        raise ValueError(f"backend must be one of {', '.join(map(repr, NAMES))}; got {name!r}")
    return str(name)


class use_backend:  # noqa: N801 - a context manager, named like those of torch
    """Context manager that sets the backend of all calls inside that name none.

    Blocks nest, and each thread (and each asyncio task) has its own. Derivatives use the backend of the
    call that they differentiate, wherever they are taken.

    Args:
        name: ``"auto"``, ``"reference"``, ``"blockwise"``, ``"triton"`` or ``"vendor"``.

    Raises:
        ValueError: No backend has this name.

    Example:
        >>> import torch, metaattn
        >>> q = k = v = torch.randn(1, 2, 8, 4)
        >>> with metaattn.use_backend("reference"):
        ...     out = metaattn.sdpa(q, k, v)
    """

    def __init__(self, name: str) -> None:
        self._name = check_name(name)
        self._tokens: list[Token[str]] = []

    def __enter__(self) -> None:
        global _open
        self._tokens.append(_current.set(self._name))
        with _lock:
            _open += 1

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: types.TracebackType | None,
    ) -> None:
        global _open
        with _lock:
            _open -= 1
        _current.reset(self._tokens.pop())


def current_backend() -> str:
    """Return the backend of calls that name none: that of the innermost ``use_backend`` block, or ``"auto"``."""
    return _current.get() if _open else "auto"


def _find(name: str) -> Backend | str:
    """Return the backend of a name, or a message that says why it cannot be imported."""
    if name in BACKENDS:
        return BACKENDS[name]
    module = auto.import_with_triton(name)
    return module if isinstance(module, str) else module.backend


def unsupported_reason(name: str, problem: Problem, x: Operands) -> str | None:
    """Return why the named backend does not support the call and what to do; ``None`` if it supports the call."""
    if name in LAZY and not x.query.is_cuda and not (name == "triton" and _interpreted()):
        # Before the import: a machine without a GPU may have no Triton either.
        hint = " (to try the kernels on a CPU, slowly: TRITON_INTERPRET=1)" if name == "triton" else ""
        return (
            f"backend={name!r} needs a CUDA device; the tensors are on {x.query.device}. Move them to a GPU, or ask "
            f"for backend='blockwise' or 'auto'{hint}"
        )
    backend = _find(name)
    return backend if isinstance(backend, str) else backend.unsupported_reason(problem, x)


def _interpreted() -> bool:
    """Return whether Triton runs in its interpreter, as in tests without a GPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def select(name: str, problem: Problem, x: Operands) -> Backend:
    """Return the backend that computes a call of the named one; raise ``NotImplementedError`` if that has no import.

    The softmax of one key is constant. ``reference`` computes the zeros that its derivatives are, with memory linear in
    the length; the differences of sums that the others compute would leave rounding errors.
    """
    backend = _find(name)
    if isinstance(backend, str):
        raise NotImplementedError(backend)
    return reference.backend if x.key.shape[-2] == 1 else backend
