"""Run a function again as it ran first: with the same random numbers, autocast, backend and replaced functions."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from ..backends import current_backend, use_backend
from ._executor import active_executor, use_executor
from ._function_mode import active_replacements
from ._functorch import outside_transforms
from ._torch_internals import outside_modes

_AutocastState = dict[str, tuple[bool, torch.dtype]]


class CallContext:
    """The context of a call, recorded when this object is created; calling the object runs a function in it.

    Args:
        tensors: Arguments of the call. Their devices, and the CPU, are the ones whose state is recorded.
        random: Also record the state of the random number generators.
    """

    def __init__(self, tensors: Sequence[Tensor], random: bool) -> None:
        self._backend = current_backend()
        self._replacements = active_replacements()
        self._cuda = sorted({t.get_device() for t in tensors if t.is_cuda})
        self._autocast = autocast_state({"cpu", *(t.device.type for t in tensors)})
        self._executor, self._no_draws = active_executor(), _no_draws.get()
        self._generators = _generator_states(self._cuda) if random else None

    def settle(self) -> bool:
        """Return whether the first run, which has just ended, drew random numbers; if not, drop the states."""
        if self._generators is None:
            return False
        now = _generator_states(self._cuda)
        with _plain_tensors():
            drew = not all(torch.equal(state, now[device]) for device, state in self._generators.items())
        if not drew:
            self._generators = None
        return drew

    def __call__(self, function: Callable[..., Any], *args: Any) -> Any:
        """Run a function in the recorded context, and leave the current one as it was."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(use_executor(active_executor(self._executor)))
            if self._no_draws:
                stack.enter_context(without_draws())
            stack.enter_context(self._same_random_numbers())
            stack.enter_context(_autocast(self._autocast))
            stack.enter_context(use_backend(self._backend))
            stack.enter_context(self._same_replacements())
            return function(*args)

    @contextlib.contextmanager
    def _same_replacements(self) -> Iterator[None]:
        active = active_replacements()
        with contextlib.ExitStack() as stack:
            for mode in self._replacements:
                if mode not in active:
                    stack.enter_context(mode)
            yield

    @contextlib.contextmanager
    def _same_random_numbers(self) -> Iterator[None]:
        if self._generators is None:
            yield
            return
        now = _generator_states(self._cuda)
        _set_generator_states(self._generators)
        try:
            yield
        finally:
            _set_generator_states(now)


def ambient_settings() -> Hashable:
    """Return all that operations depend on besides their arguments: equal where a function runs in the same way."""
    return (
        current_backend(),
        torch.get_default_dtype(),
        torch.get_float32_matmul_precision(),
        torch.are_deterministic_algorithms_enabled(),
        tuple(autocast_state({"cpu", "cuda"}).items()),
        tuple(mode.key for mode in active_replacements()),
    )


@contextlib.contextmanager
def _plain_tensors() -> Iterator[None]:
    """Leave all transforms and tracers inside the block, so that the state of a generator is a plain tensor.

    A transform would wrap it, and a tracer would take it for a part of the function.
    """
    with outside_transforms(), outside_modes():
        yield


_no_draws: ContextVar[bool] = ContextVar("metaattn_no_draws", default=False)


@contextlib.contextmanager
def without_draws() -> Iterator[None]:
    """Assert that nothing draws from a GPU's generator inside the block.

    Its state is not recorded there: it cannot be read while a CUDA graph is captured.
    """
    token = _no_draws.set(True)
    try:
        yield
    finally:
        _no_draws.reset(token)


def _generator_states(cuda: Sequence[int]) -> dict[int | None, Tensor]:
    """Return the states of the generators: of the CPU under ``None``, of a GPU under its index."""
    if cuda and torch.cuda.is_current_stream_capturing():
        if not _no_draws.get():
            raise NotImplementedError(
                "recomputed functions must draw the same random numbers again, and the state of the generator cannot "
                "be reset while a CUDA graph is captured. Use metaattn.meta.capture, which finds out whether a step "
                "draws any; or, for a graph that you capture yourself, checkpoint(…, preserve_rng_state=False) and "
                "gradient='reverse'"
            )
        cuda = ()
    with _plain_tensors():
        return {None: torch.get_rng_state(), **{i: torch.cuda.get_rng_state(i) for i in cuda}}


def _set_generator_states(states: dict[int | None, Tensor]) -> None:
    with _plain_tensors():
        for device, state in states.items():
            if device is None:
                torch.set_rng_state(state)
            else:
                torch.cuda.set_rng_state(state, device)


def autocast_state(devices: set[str]) -> _AutocastState:
    """Return whether autocast is on, and to which dtype, for each of these types of device that has autocast."""
    available = (d for d in devices if torch.amp.is_autocast_available(d))
    return {d: (torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in available}


@contextlib.contextmanager
def _autocast(requested: _AutocastState) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for device, state in requested.items():
            if state != autocast_state({device})[device]:
                stack.enter_context(torch.autocast(device, dtype=state[1], enabled=state[0]))
        yield
