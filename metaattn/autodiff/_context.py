"""Running a function again as it ran at first: its random numbers, autocast, backend, and what replaces PyTorch's."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.utils._python_dispatch import _disable_current_modes

from ..backends import current_backend, use_backend
from ._executor import active_executor, use_executor
from ._function_mode import replacements

_Precision = dict[str, tuple[bool, torch.dtype]]


class CallContext:
    """What surrounds a call, taken down when made.

    Args:
        tensors: What the call is on: their devices count, and the CPU.
        random: Whether to take down the state of the generators too.
    """

    def __init__(self, tensors: Sequence[Tensor], random: bool) -> None:
        self._backend = current_backend()
        self._replacements = replacements()
        self._cuda = sorted({t.get_device() for t in tensors if t.is_cuda})
        self._precision = precision({"cpu", *(t.device.type for t in tensors)})
        self._executor, self._no_draws = active_executor(), _no_draws.get()
        self._generators = _generators(self._cuda) if random else None

    def settle(self) -> bool:
        """After the first run: whether it drew random numbers. If not, their state is forgotten."""
        if self._generators is None:
            return False
        now = _generators(self._cuda)
        with _outside():
            drew = not all(torch.equal(state, now[device]) for device, state in self._generators.items())
        if not drew:
            self._generators = None
        return drew

    def __call__(self, function: Callable[..., Any], *args: Any) -> Any:
        """Run a function in these ambient_settings, and leave the present ones as they were."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(use_executor(active_executor(self._executor)))
            if self._no_draws:
                stack.enter_context(without_draws())
            stack.enter_context(self._drawing_again())
            stack.enter_context(_autocast(self._precision))
            stack.enter_context(use_backend(self._backend))
            stack.enter_context(self._replacing())
            return function(*args)

    @contextlib.contextmanager
    def _replacing(self) -> Iterator[None]:
        at_work = replacements()
        with contextlib.ExitStack() as stack:
            for mode in self._replacements:
                if mode not in at_work:
                    stack.enter_context(mode)
            yield

    @contextlib.contextmanager
    def _drawing_again(self) -> Iterator[None]:
        if self._generators is None:
            yield
            return
        now = _generators(self._cuda)
        _set_generators(self._generators)
        try:
            yield
        finally:
            _set_generators(now)


def ambient_settings() -> Hashable:
    """What a function's operations depend on besides its arguments: equal where it runs alike."""
    return (
        current_backend(),
        torch.get_default_dtype(),
        torch.get_float32_matmul_precision(),
        torch.are_deterministic_algorithms_enabled(),
        tuple(precision({"cpu", "cuda"}).items()),
        tuple(mode.key for mode in replacements()),
    )


def tracing() -> bool:
    """Whether ``make_fx`` is at work, in whose graph a generator cannot be set back."""
    return get_proxy_mode() is not None


@contextlib.contextmanager
def _outside() -> Iterator[None]:
    """Where a state is a plain tensor: a transform would wrap it, and a tracer take it for part of the function."""
    with temporarily_clear_interpreter_stack(), _disable_current_modes():
        yield


_no_draws: ContextVar[bool] = ContextVar("metaattn_no_draws", default=False)


@contextlib.contextmanager
def without_draws() -> Iterator[None]:
    """Inside, nothing draws from a GPU's generator, whose state cannot be read while a CUDA graph is captured."""
    token = _no_draws.set(True)
    try:
        yield
    finally:
        _no_draws.reset(token)


def _generators(cuda: Sequence[int]) -> dict[int | None, Tensor]:
    """The states of the generators: ``None`` is the CPU's, the others go by the number of the device."""
    if cuda and torch.cuda.is_current_stream_capturing():
        if not _no_draws.get():
            raise NotImplementedError(
                "what is computed again must draw its random numbers again, and while a CUDA graph is captured their "
                "generator cannot be set back. metaattn.meta.capture finds out whether a step draws any; for a graph "
                "of your own use checkpoint(…, preserve_rng_state=False) and gradient='reverse'"
            )
        cuda = ()
    with _outside():
        return {None: torch.get_rng_state(), **{i: torch.cuda.get_rng_state(i) for i in cuda}}


def _set_generators(states: dict[int | None, Tensor]) -> None:
    with _outside():
        for device, state in states.items():
            if device is None:
                torch.set_rng_state(state)
            else:
                torch.cuda.set_rng_state(state, device)


def precision(devices: set[str]) -> _Precision:
    """For each type of device that has autocast, whether it is on and to which dtype."""
    there = (d for d in devices if torch.amp.is_autocast_available(d))
    return {d: (torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in there}


@contextlib.contextmanager
def _autocast(wanted: _Precision) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for device, state in wanted.items():
            if state != precision({device})[device]:
                stack.enter_context(torch.autocast(device, dtype=state[1], enabled=state[0]))
        yield
