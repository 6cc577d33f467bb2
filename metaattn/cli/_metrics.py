"""Measure the error of results, and the time and the memory of a call."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._pytree import tree_leaves
from torch.utils.benchmark import Timer


def relative_error(got: Any, want: Any) -> float:
    """Return the relative error of ``got`` in the 2-norm, over all tensors of two pytrees of the same structure."""
    pairs = list(zip(tree_leaves(got), tree_leaves(want), strict=True))
    squared = sum((a.detach().to(b.device, torch.float64) - b).square().sum().item() for a, b in pairs)
    return math.sqrt(squared / max(1e-300, sum(b.double().square().sum().item() for _, b in pairs)))


def largest_error(got: Sequence[Tensor], want: Sequence[Tensor]) -> float:
    """Return the largest of the relative errors of single results; NaN if one of them is NaN."""
    return torch.tensor([relative_error(a, b) for a, b in zip(got, want, strict=True)]).max().item()


def milliseconds(call: Callable[[], Any], min_seconds: float) -> float:
    """Time a call.

    Args:
        call: What to time; it is called once before, to warm up.
        min_seconds: How long to repeat it; up to four times as long if the times scatter.

    Returns:
        The shortest time, in milliseconds.
    """
    call()
    timer = Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
    return 1e3 * min(timer.adaptive_autorange(min_run_time=min_seconds, max_run_time=4 * min_seconds).times)


def peak_bytes(call: Callable[[], Any], device: torch.device | None = None) -> int:
    """Return the peak memory of a call beyond what was allocated before it.

    Args:
        call: What to measure.
        device: Where it allocates; by default the CPU.

    Returns:
        The peak, in bytes.
    """
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    # Without acc_events torch 2.11 warns that events are lost between cycles, although there is only one cycle.
    with _quiet(), profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as p:
        call()
    live = peak = 0
    for event in sorted(p.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak


@contextmanager
def _quiet() -> Iterator[None]:
    """Discard the process's stderr: in torch 2.13 the profiler writes to it when it starts and stops."""
    stderr, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(nowhere)
