"""How far results are from what they should be, how long a call takes, and how much memory."""

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
    """In the 2-norm, over all tensors of two trees with the same leaves."""
    pairs = list(zip(tree_leaves(got), tree_leaves(want), strict=True))
    top = sum((a.detach().to(b.device, torch.float64) - b).square().sum().item() for a, b in pairs)
    return math.sqrt(top / max(1e-300, sum(b.double().square().sum().item() for _, b in pairs)))


def largest_error(got: Sequence[Tensor], want: Sequence[Tensor]) -> float:
    """The largest relative error of results one by one; NaN if one of them is."""
    return torch.tensor([relative_error(a, b) for a, b in zip(got, want, strict=True)]).max().item()


def milliseconds(call: Callable[[], Any], least: float) -> float:
    """The least of calls for ``least`` seconds, after one that warms up; for four times that where they scatter."""
    call()
    timer = Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
    return 1e3 * min(timer.adaptive_autorange(min_run_time=least, max_run_time=4 * least).times)


def peak_bytes(call: Callable[[], Any], device: torch.device | None = None) -> int:
    """The most bytes alive at once during a call, beyond those before it; on the CPU by default."""
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    # Without acc_events torch 2.11 warns that events go between cycles, of which there is one.
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
    """Without what PyTorch's profiler itself writes to the process's stderr (2.13) when it starts and stops."""
    stderr, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(nowhere)
