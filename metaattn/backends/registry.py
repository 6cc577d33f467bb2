"""Which backend serves a call: by name or by context."""

from __future__ import annotations

import os
import types
from contextvars import ContextVar, Token

from . import auto, blockwise, reference
from .base import Backend, Operands, Problem

BACKENDS: dict[str, Backend] = {"auto": auto, "reference": reference, "blockwise": blockwise}
LAZY = ("triton", "vendor")  # imported when first asked for: they need the package triton
NAMES = (*BACKENDS, *LAZY)

_current: ContextVar[str] = ContextVar("metaattn_backend", default="auto")
# How many `use_backend` blocks are open, in any thread. torch.compile guards on it: it cannot trace the
# read of a context variable, and does not need to while no block is open.
_open = 0


def check_name(name: object) -> str:
    """``name``, if it is a backend's; ``ValueError`` otherwise."""
    if name not in NAMES:
        raise ValueError(f"backend must be one of {', '.join(map(repr, NAMES))}; got {name!r}")
    return str(name)


class use_backend:  # noqa: N801 - a context manager, named like those of torch
    """Context manager: calls inside that name no backend use this one.

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
        _open += 1

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: types.TracebackType | None,
    ) -> None:
        global _open
        _open -= 1
        _current.reset(self._tokens.pop())


def current_backend() -> str:
    """The backend of calls here that name none: that of the innermost ``use_backend``, or ``"auto"``."""
    return _current.get() if _open else "auto"


def _backend(name: str) -> Backend | str:
    """The backend of a name, or why it cannot be had."""
    return BACKENDS[name] if name in BACKENDS else auto.load(name)


def refuses(name: str, problem: Problem, x: Operands) -> str | None:
    """Why the named backend cannot serve the call, and what to do; ``None`` if it can."""
    if name in LAZY and not x.query.is_cuda and not (name == "triton" and _interpreted()):
        # Said before the import: without a GPU there may be no Triton either.
        tried = " (to try the kernels on a CPU, slowly: TRITON_INTERPRET=1)" if name == "triton" else ""
        return (
            f"backend={name!r} needs a CUDA device; the tensors are on {x.query.device}. Move them to a GPU, or ask "
            f"for backend='blockwise' or 'auto'{tried}"
        )
    backend = _backend(name)
    return backend if isinstance(backend, str) else backend.refuses(problem, x)


def _interpreted() -> bool:
    """Whether Triton runs in its interpreter, for tests without a GPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def select(name: str, problem: Problem, x: Operands) -> Backend:
    """The backend that serves the call; one asked for by name is the one given."""
    backend = _backend(name)
    if isinstance(backend, str):
        raise NotImplementedError(backend)
    return backend
