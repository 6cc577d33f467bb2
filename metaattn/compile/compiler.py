"""Compiled programs: which are at work, and what they are known by."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any

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
from .piecewise import Lower, Lowered, Run, as_recorded, inductor
from .precompile import Precompiler
from .recorder import Recording, UnrecordableError

MOST = 32  # programs, and forms of each: a step that is another one at every call is not to be compiled for ever


class MetaStepCompiler:
    """What has been compiled, and what could not be.

    Args:
        options: Of Inductor.

    Attributes:
        lower: What makes a function of a module and its inputs: Inductor.
        reasons: Why parts of the step run eagerly, each said once as a warning.
        structures: Of what the functions of sources return.
    """

    def __init__(self, options: Mapping[str, Any] | None = None) -> None:
        self.lower: Lower = inductor(options or {})
        self._ahead = Precompiler(options or {})
        self.reasons: dict[Hashable, str] = {}
        self.structures: dict[Hashable, list[Any]] = {}
        self._made: dict[Hashable, dict[Hashable, tuple[Lowered, list[tuple[bool, Any]]]]] = {}
        self._known: dict[Hashable, Run] = {}
        self._said: set[str] = set()
        self._checked: set[Hashable] = set()

    @contextlib.contextmanager
    def at_work(self) -> Iterator[None]:
        """Inside, programs that have a source run compiled."""
        with use_executor(self):
            yield

    def refuse(self, source: FunctionKey, reason: str) -> None:
        """Run what has this source, and all that is made of it, eagerly from now on, and say why."""
        self.reasons[source.root] = reason
        self._say(reason)

    def admits(self, source: FunctionKey, check: Callable[[], str | None]) -> bool:
        """Whether a source may run compiled. At first sight it is checked: for a reason why not, or an error."""
        if source.key not in self._checked:
            if len(self._checked) >= MOST:
                self._say(f"there are more than {MOST} of its kind, as where a number that a loss closes over changes")
                return False
            reason = check()
            if reason is not None:
                self.refuse(source, reason)
            self._checked.add(source.key)
        return source.root not in self.reasons

    def _say(self, reason: str) -> None:
        if reason not in self._said:
            self._said.add(reason)
            warnings.warn(f"a part of the step is not compiled: {reason}", stacklevel=2)

    def run(self, source: FunctionKey, function: Callable[..., Tensors], inputs: Sequence[Tensor]) -> Tensors | None:
        """The function of a source on plain tensors; ``None`` where it is to run eagerly."""
        if source.root in self.reasons or not _plain(inputs):
            return None
        inputs = [t.contiguous() for t in inputs]  # else their strides would be part of their form
        form = tuple((t.shape, t.dtype, t.device) for t in inputs)
        made = self._made.setdefault(source.key, {})
        if form not in made:
            if len(made) >= MOST:
                self.refuse(source, f"it came in more than {MOST} forms (shapes, dtypes)")
                return None
            try:
                made[form] = self._make(source, function, inputs)
            except UnrecordableError as error:
                self.refuse(source, f"it {error}")
                return None
            except Exception as error:
                self.refuse(source, f"it could not be recorded ({_told(error)})")
                return None  # an eager run raises what is the function's own
        lowered, found = made[form]
        try:
            return lowered(*inputs, *(source.captured[at] if held else at for held, at in found))
        except Exception as error:
            self.refuse(source, f"it could not be run compiled ({_told(error)})")
            return None

    def _make(
        self, source: FunctionKey, function: Callable[..., Tensors], inputs: Sequence[Tensor]
    ) -> tuple[Lowered, list[tuple[bool, Any]]]:
        """The lowered function; and the tensors that it takes besides: one that is held by its place, or itself."""
        with use_executor(None), torch.enable_grad():  # as Recompute runs it
            recording = Recording(function, inputs)
        check_outputs(recording.outputs)
        places = {id(t): i for i, t in enumerate(source.captured)}
        found = [(id(t) in places, places.get(id(t), t)) for t in recording.found]
        return Lowered(recording, self._lower, self._known, self._ahead), found

    def _lower(self, module: fx.GraphModule, inputs: Sequence[Tensor]) -> Run:
        """What is between two leaves, compiled; as it was recorded if that fails, and the rest is compiled still."""
        try:
            return self.lower(module, inputs)
        except Exception as error:
            self.reasons[module] = f"it could not be compiled ({_told(error)})"
            self._say(self.reasons[module])
            return as_recorded(module)


def _told(error: Exception) -> str:
    """An error in one line, with its last line, where a compiler's says the cause; out of memory is out of memory."""
    if isinstance(error, torch.OutOfMemoryError):
        raise error
    lines = [line.strip()[:200] for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' … '.join(dict.fromkeys((*lines[:1], *lines[-1:])))}"


def active_compiler() -> MetaStepCompiler | None:
    """Return the compiler of the step that runs now, if it is compiled."""
    executor = active_executor()
    return executor if isinstance(executor, MetaStepCompiler) else None


def _plain(tensors: Sequence[Tensor]) -> bool:
    """Whether tensors are plain ones, with no transform or tracer at work."""
    return (
        not in_transform()
        and not in_dual_level()
        and innermost_dispatch_mode() is None
        and not any(is_wrapped(t) for t in tensors)
        and all(type(t) is Tensor or type(t) is torch.nn.Parameter for t in tensors)
    )
