"""Replacement of PyTorch's attention by :func:`metaattn.sdpa`, in a block of code or in the whole process."""

from __future__ import annotations

import functools
import inspect
import sys
import threading
import types
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec, TypeVar

import torch

from ..ops import check_backend
from ._torch_mode import TORCH_SDPA, Installed, Mode, installed

P = ParamSpec("P")
R = TypeVar("R")


class replace_sdpa:  # noqa: N801 - a context manager, named like those of torch
    """Context manager and decorator that replaces PyTorch's attention by :func:`metaattn.sdpa`.

    Any PyTorch model gets every derivative of attention, in any mode and under every :mod:`torch.func` transform,
    without a change to the model. Inside the block, it replaces:

    * :func:`torch.nn.functional.scaled_dot_product_attention`, by whatever name it was imported, and
      ``torch.ops.aten.scaled_dot_product_attention``;
    * the attention of :class:`torch.nn.MultiheadAttention` with ``need_weights=False``, and with it that of
      :class:`torch.nn.TransformerEncoder`, :class:`torch.nn.TransformerDecoder` and :class:`torch.nn.Transformer`,
      whose fast paths are disabled.

    A block affects its own thread only. Blocks nest, and the innermost determines the backend. Derivatives may be taken
    after the block, except through :mod:`torch.utils.checkpoint`, which runs the model again. Open a block outside of
    functions compiled by :func:`torch.compile`, around their calls: each function is compiled once for calls inside and
    once for calls outside.

    It does not replace attention that is written in elementary operations, because that has its derivatives
    (:class:`torch.nn.MultiheadAttention` with ``need_weights=True``), and calls in :mod:`torch.jit` scripts, which it
    cannot see.

    Args:
        backend: Backend of :func:`metaattn.sdpa`, by name; ``None`` for the default.

    Raises:
        ValueError: There is no backend with this name; inside the block, as :func:`metaattn.sdpa`.
        TypeError: The decorated function is a generator or coroutine function.
        NotImplementedError: Inside the block, at a call that cannot be replaced: a direct call of a fused kernel, or of
            ``flex_attention``; a higher-order operator within one graph of :func:`torch.compile`.

    Example:
        >>> import torch, metaattn
        >>> layer = torch.nn.TransformerEncoderLayer(16, 4, 32, batch_first=True).eval()
        >>> x, t = torch.randn(2, 2, 5, 16)
        >>> with metaattn.replace_sdpa():
        ...     out, tangent = torch.func.jvp(layer, (x,), (t,))
        >>> tangent.shape
        torch.Size([2, 5, 16])
    """

    def __init__(self, *, backend: str | None = None) -> None:
        _check(backend)
        self._mode = Mode(backend)

    def __enter__(self) -> None:
        _FastPaths.close()
        self._mode.__enter__()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: types.TracebackType | None,
    ) -> None:
        self._mode.__exit__(kind, error, trace)
        _FastPaths.open()

    def __call__(self, function: Callable[P, R]) -> Callable[P, R]:
        """Decorate a function, so that each call runs in a block.

        Args:
            function: Any function except a generator or coroutine function.

        Returns:
            A function with the same arguments and result.

        Raises:
            TypeError: ``function`` is a generator or coroutine function.
        """
        if inspect.isgeneratorfunction(function) or inspect.iscoroutinefunction(function):
            raise TypeError(
                f"replace_sdpa decorates ordinary functions; got the generator or coroutine function {function!r}, "
                "whose block would stay open between its steps. Open one inside, around the model's call"
            )

        @functools.wraps(function)
        def replaced(*args: P.args, **kwargs: P.kwargs) -> R:
            with self:
                return function(*args, **kwargs)

        return replaced

    @staticmethod
    def install(*, backend: str | None = None) -> None:
        """Replace :func:`torch.nn.functional.scaled_dot_product_attention` in all threads, until :meth:`uninstall`.

        It replaces the name in ``torch.nn.functional``, and in every module that is loaded and has imported it. Other
        references (in an object, a closure, a local variable) and calls of ``torch.ops.aten`` are not found, and no
        call is rejected; a block sees all of them. Installing again changes the backend.

        Args:
            backend: Backend of :func:`metaattn.sdpa`, by name; that of a block takes precedence.

        Raises:
            ValueError: There is no backend with this name.
        """
        _check(backend)
        Installed.backend = backend
        if not _names:
            _FastPaths.close()
            _names.extend(_where_imported())
            for names, name in _names:
                names[name] = installed

    @staticmethod
    def uninstall() -> None:
        """Undo :meth:`install`, if it was called."""
        if _names:
            for names, name in _names:
                if names.get(name) is installed:
                    names[name] = TORCH_SDPA
            _names.clear()
            _FastPaths.open()


def _check(backend: str | None) -> None:
    if backend is not None:
        check_backend(backend)


_names: list[tuple[dict[str, Any], str]] = []  # the replaced names of PyTorch's function: a namespace and a name each


def _where_imported() -> Iterator[tuple[dict[str, Any], str]]:
    """Find the names of PyTorch's function in all modules except the original and our own reference to it."""
    for module in list(sys.modules.values()):
        names = vars(module) if isinstance(module, types.ModuleType) else {}
        if module is torch._C._nn or names.get("TORCH_SDPA") is TORCH_SDPA:
            continue
        yield from ((names, name) for name, value in list(names.items()) if value is TORCH_SDPA)


class _FastPaths:
    """Counted lock on the fast paths of ``torch.nn``: they are disabled in the process while any block is open.

    The fast paths are fused kernels without forward mode, which do not call ``scaled_dot_product_attention``.
    """

    lock = threading.Lock()
    closed = 0
    before = True

    @classmethod
    def close(cls) -> None:
        if torch.compiler.is_compiling():  # Dynamo cannot trace locks; the mode rejects the fast paths
            return
        with cls.lock:
            if not cls.closed:
                cls.before = torch.backends.mha.get_fastpath_enabled()
                torch.backends.mha.set_fastpath_enabled(False)
            cls.closed += 1

    @classmethod
    def open(cls) -> None:
        if torch.compiler.is_compiling():
            return
        with cls.lock:
            cls.closed -= 1
            if not cls.closed:
                torch.backends.mha.set_fastpath_enabled(cls.before)
