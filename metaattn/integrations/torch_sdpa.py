"""PyTorch's attention replaced by ours, in a block of code or in the whole process; no change to the model."""

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
    """Context manager and decorator: PyTorch's attention inside is :func:`metaattn.sdpa`.

    So a model that somebody else wrote gets every derivative, in any mode and under every :mod:`torch.func`
    transform, without a change. Inside, these are replaced:

    * :func:`torch.nn.functional.scaled_dot_product_attention`, by whatever name it was imported, and
      ``torch.ops.aten.scaled_dot_product_attention``;
    * the attention of :class:`torch.nn.MultiheadAttention` with ``need_weights=False``, and so that of
      :class:`torch.nn.TransformerEncoder`, :class:`torch.nn.TransformerDecoder` and :class:`torch.nn.Transformer`,
      whose fast paths are off.

    A block is of its thread alone; blocks nest, and the innermost says the backend. Derivatives may be taken after the
    block, except those of :mod:`torch.utils.checkpoint`, which runs the model again. Open a block outside of
    :func:`torch.compile`'d functions, around their calls: each is compiled once for inside and once for outside.

    Left as they are: attention written out, as is :class:`torch.nn.MultiheadAttention` with ``need_weights=True``, for
    that has its derivatives; :mod:`torch.jit` scripts, whose calls cannot be seen.

    Args:
        backend: As in :func:`metaattn.sdpa`.

    Raises:
        ValueError: No backend has this name; inside, as :func:`metaattn.sdpa`.
        TypeError: What is decorated is a generator or coroutine function.
        NotImplementedError: Inside, at a call that cannot be replaced: of one fused kernel by its own name, or of
            ``flex_attention``; of a higher-order operator within one graph of :func:`torch.compile`.

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
        """Decorate a function: each call runs in a block."""
        if inspect.isgeneratorfunction(function) or inspect.iscoroutinefunction(function):
            raise TypeError(
                "replace_sdpa decorates functions; a generator or coroutine would leave its block open between steps: "
                "open one inside, around the model's call"
            )

        @functools.wraps(function)
        def replaced(*args: P.args, **kwargs: P.kwargs) -> R:
            with self:
                return function(*args, **kwargs)

        return replaced

    @staticmethod
    def install(*, backend: str | None = None) -> None:
        """Replace :func:`torch.nn.functional.scaled_dot_product_attention` in all threads, until :meth:`uninstall`.

        By name: in ``torch.nn.functional`` and in every module loaded by now that has imported it. A reference kept
        elsewhere (in an object, a closure, a local variable) is not found, nor are ``torch.ops.aten`` calls, and
        nothing is refused; a block sees all of them. Installing again changes the backend.

        Args:
            backend: As in :func:`metaattn.sdpa`; that of a block goes first.

        Raises:
            ValueError: No backend has this name.
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
        """Undo :meth:`install`; without one, do nothing."""
        if _names:
            for names, name in _names:
                if names.get(name) is installed:
                    names[name] = TORCH_SDPA
            _names.clear()
            _FastPaths.open()


def _check(backend: str | None) -> None:
    if backend is not None:
        check_backend(backend)


_names: list[tuple[dict[str, Any], str]] = []  # where PyTorch's function is replaced: namespaces, and the name in each


def _where_imported() -> Iterator[tuple[dict[str, Any], str]]:
    """The names of PyTorch's function in all modules, but for its own and our record of it."""
    for module in list(sys.modules.values()):
        names = vars(module) if isinstance(module, types.ModuleType) else {}
        if module is torch._C._nn or names.get("TORCH_SDPA") is TORCH_SDPA:
            continue
        yield from ((names, name) for name, value in list(names.items()) if value is TORCH_SDPA)


class _FastPaths:
    """PyTorch's switch of the fast paths of ``torch.nn``, for the whole process: off while anyone needs it off.

    They are single kernels past ``scaled_dot_product_attention``, with no forward mode.
    """

    lock = threading.Lock()
    closed = 0
    before = True

    @classmethod
    def close(cls) -> None:
        if torch.compiler.is_compiling():  # no locks there; the mode refuses the fast paths
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
