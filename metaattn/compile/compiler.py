"""Cache of compiled functions for one step, and the context in which they run.

Inside :meth:`MetaStepCompiler.activate`, a function that comes with a :class:`~metaattn.autodiff.FunctionKey` is
recorded and compiled when it is first called, and found again by its key and its inputs' specs. A function that cannot
be compiled runs eagerly, and a warning says once why.

Two threads may call the same step, or different ones, at once: an active compiler is seen by its own thread only (and
by the threads in which PyTorch runs that thread's backward passes), and one function is recorded at a time.
"""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from ..autodiff import (
    FunctionKey,
    Tensors,
    active_executor,
    check_outputs,
    in_dual_level,
    in_transform,
    innermost_dispatch_mode,
    is_wrapped,
    use_executor,
)
from .inductor import CompiledPiece, PieceCompiler, inductor_compiler
from .piecewise import PiecewiseFunction, as_recorded
from .precompile import Precompiler
from .recorder import Recording, UnrecordableError

# Functions, and recordings of each: a step that differs in every call would be compiled for ever.
MAX_GRAPHS = 32
# One function at a time is recorded in this process. PyTorch counts the levels of forward mode per process, not per
# thread (2.13): of two threads that record a jvp at once, the first to finish would end the level of both.
_recording = threading.Lock()
# True in the threads that call steps. PyTorch's own threads for backward passes must not wait for the lock, because the
# thread that holds it may wait for a backward pass of its own: there the function runs eagerly this time.
_may_wait: ContextVar[bool] = ContextVar("metaattn_may_wait", default=False)


class _Compiled(NamedTuple):
    """A compiled function, and the tensors that it takes after its inputs.

    Each of these is given by its place among the tensors of the key, or itself.
    """

    function: PiecewiseFunction
    captured: list[int | Tensor]


class MetaStepCompiler:
    """Compiler of one step: the functions that it has compiled, and why others cannot be.

    It is an :class:`~metaattn.autodiff.Executor`.

    Args:
        options: Of Inductor.

    Attributes:
        compile_piece: Makes a function of a module and its inputs; by default Inductor.
        reasons: Why parts of the step run eagerly, by the key of a function or by the module of a piece. Each reason is
            a warning, once.
        structures: The structure of what each function returns, by its key.
    """

    def __init__(self, options: Mapping[str, Any] | None = None) -> None:
        self.compile_piece: PieceCompiler = inductor_compiler(options or {})
        self.reasons: dict[Hashable, str] = {}
        self.structures: dict[Hashable, list[Any]] = {}
        self._precompiler = Precompiler(options or {})
        self._functions: dict[Hashable, dict[Hashable, _Compiled]] = {}
        self._pieces: dict[Hashable, CompiledPiece] = {}
        self._checked: set[Hashable] = set()
        self._warned: set[str] = set()

    @contextlib.contextmanager
    def activate(self) -> Iterator[None]:
        """Context in which functions that have a key run compiled."""
        token = _may_wait.set(True)
        try:
            with use_executor(self):
                yield
        finally:
            _may_wait.reset(token)

    def admits(self, key: FunctionKey, check: Callable[[], str | None]) -> bool:
        """Return whether a function may run compiled.

        Args:
            key: Of the function.
            check: Called when a key is first seen. Returns why the function cannot be compiled, or ``None``; an error
                that it raises is the caller's.
        """
        if key.key not in self._checked:
            if len(self._checked) >= MAX_GRAPHS:
                self._warn(
                    f"there are more than {MAX_GRAPHS} functions like it, as where a number that a loss closes over "
                    "changes in every call; pass the number as a tensor"
                )
                return False
            reason = check()
            if reason is not None:
                self._reject(key, reason)
            self._checked.add(key.key)
        return key.root not in self.reasons

    def run(self, key: FunctionKey, function: Callable[..., Tensors], inputs: Sequence[Tensor]) -> Tensors | None:
        """Run a function compiled; return ``None`` where it must run eagerly.

        Args:
            key: Of the function.
            function: Takes the inputs and returns a tuple of tensors.
            inputs: Plain tensors; others, of a transform for example, run eagerly.
        """
        if key.root in self.reasons or not _are_plain(inputs) or _in_forward_mode():
            return None
        inputs = [t.contiguous() for t in inputs]  # otherwise their strides would be part of their specs
        specs = tuple((t.shape, t.dtype, t.device) for t in inputs)
        functions = self._functions.get(key.key)
        compiled = None if functions is None else functions.get(specs)
        if compiled is None:
            compiled = self._record(key, specs, function, inputs)
        if compiled is None:
            return None
        try:
            captured = [key.captured[c] if isinstance(c, int) else c for c in compiled.captured]
            return compiled.function(*inputs, *captured)
        except Exception as error:
            self._reject(key, f"it could not be run compiled ({_in_one_line(error)})")
            return None

    def _record(
        self, key: FunctionKey, specs: Hashable, function: Callable[..., Tensors], inputs: Sequence[Tensor]
    ) -> _Compiled | None:
        """Record a function that is not in the cache, and add it; return ``None`` if it must run eagerly."""
        if not _recording.acquire(blocking=_may_wait.get()):
            return None
        try:
            functions = self._functions.setdefault(key.key, {})
            if specs in functions:  # another thread recorded it while this one waited
                return functions[specs]
            if len(functions) >= MAX_GRAPHS:
                self._reject(key, f"it was called with more than {MAX_GRAPHS} different shapes or dtypes of its inputs")
                return None
            functions[specs] = self._compile(key, function, inputs)
            return functions[specs]
        except UnrecordableError as error:
            self._reject(key, f"it {error}")
        except Exception as error:
            self._reject(key, f"it could not be recorded ({_in_one_line(error)})")
        finally:
            _recording.release()
        return None  # an error of the function itself is raised again by the eager run

    def _compile(self, key: FunctionKey, function: Callable[..., Tensors], inputs: Sequence[Tensor]) -> _Compiled:
        with use_executor(None), torch.enable_grad():  # gradients are on where a function is recomputed
            recording = Recording(function, inputs)
        check_outputs(recording.outputs)
        places = {id(t): i for i, t in enumerate(key.captured)}
        captured: list[int | Tensor] = [places.get(id(t), t) for t in recording.captured]
        return _Compiled(PiecewiseFunction(recording, self._compile_piece, self._pieces, self._precompiler), captured)

    def _compile_piece(self, module: fx.GraphModule, inputs: Sequence[Tensor]) -> CompiledPiece:
        """Compile a piece. If that fails, the piece runs as it was recorded, and the others are compiled."""
        try:
            return self.compile_piece(module, inputs)
        except Exception as error:
            self.reasons[module] = f"it could not be compiled ({_in_one_line(error)})"
            self._warn(self.reasons[module])
            return as_recorded(module)

    def _reject(self, key: FunctionKey, reason: str) -> None:
        """Run a function, and all that transforms make of it, eagerly from now on, and warn."""
        self.reasons[key.root] = reason
        self._warn(reason)

    def _warn(self, reason: str) -> None:
        if reason not in self._warned:
            self._warned.add(reason)
            warnings.warn(f"a part of the step is not compiled: {reason}", stacklevel=2)


def _in_one_line(error: Exception) -> str:
    """Return an error's first line and its last, where a compiler names the cause. Lack of memory is raised again."""
    if isinstance(error, torch.OutOfMemoryError):
        raise error
    lines = [line.strip()[:200] for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' … '.join(dict.fromkeys((*lines[:1], *lines[-1:])))}"


def active_compiler() -> MetaStepCompiler | None:
    """Return the compiler of the step that this thread runs; ``None`` if the step is not compiled."""
    executor = active_executor()
    return executor if isinstance(executor, MetaStepCompiler) else None


def _in_forward_mode() -> bool:
    """Return whether a level of forward mode is open that is not another thread's recording."""
    return in_dual_level() and not _recording.locked()


def _are_plain(tensors: Sequence[Tensor]) -> bool:
    """Return whether tensors have no wrapper or tangent, and no transform or tracer is active."""
    return (
        not in_transform()
        and innermost_dispatch_mode() is None
        and not any(is_wrapped(t) for t in tensors)
        and all(type(t) is Tensor or type(t) is torch.nn.Parameter for t in tensors)
    )
