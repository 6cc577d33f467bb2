"""One run on several processes, as ``torchrun`` starts them; in an ordinary process every function here does nothing.

The tasks of each meta-batch are split over the processes (ranks) and the means of their losses and gradients
taken over all, by gloo on CPUs and NCCL on GPUs. Which tasks they are depends on the whole batch alone, so
that a run is the same within rounding on any number of processes. The first rank writes, draws and prints.

Numbers and flags go by gloo even where gradients go by NCCL, and before them: gloo sees at once that a
process is gone, where NCCL would wait.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import Store
from torch.distributed.rendezvous import rendezvous
from torch.utils._pytree import tree_flatten, tree_unflatten

from ..errors import RunStoppedError, UserError
from .checkpoint import seed_everything

T = TypeVar("T")

_store: Store | None = None  # what torchrun keeps for all processes, while there are several


class LostProcessError(RunStoppedError):
    """Another process of the job ended before its time."""


@contextmanager
def processes() -> Iterator[None]:
    """Join the processes that ``torchrun`` started, if it did; on an error end at once, without waiting for them."""
    global _store
    if not dist.is_torchelastic_launched() or int(os.environ["WORLD_SIZE"]) == 1:
        yield
        return
    _store, rank, size = next(iter(rendezvous("env://")))
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
    dist.init_process_group(backend, store=_store, rank=rank, world_size=size)
    try:
        yield
    except SystemExit as end:
        if end.code:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(end.code if isinstance(end.code, int) else 1)  # NCCL's own end may wait for who is gone
    dist.destroy_process_group()
    _store = None


def rank() -> int:
    """Which of the processes this is, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_first() -> bool:
    """Whether this is the process that writes files, draws plots and shows progress."""
    return rank() == 0


def device(name: str) -> str:
    """The name of this process's own device: of several GPUs that of its ``LOCAL_RANK``.

    Raises:
        UserError: One GPU by name for several processes, or fewer GPUs than processes.
    """
    if size() == 1 or name == "cpu" or not torch.cuda.is_available():
        return name
    local, here, gpus = int(os.environ["LOCAL_RANK"]), os.environ["LOCAL_WORLD_SIZE"], torch.cuda.device_count()
    if name not in ("auto", "cuda"):
        raise UserError(f"device={name} is one device for {here} processes; give device=cuda, a GPU for each, or cpu")
    if local >= gpus:
        raise UserError(
            f"{here} processes need as many GPUs, and there are {gpus}; give --nproc-per-node={gpus}, or device=cpu"
        )
    torch.cuda.set_device(local)
    return f"cuda:{local}"


def share(tasks: int) -> tuple[int, int]:
    """The part of a batch of ``tasks`` that is this rank's: its first task, and how many; they differ by one at most.

    Raises:
        UserError: Fewer tasks than processes.
    """
    if tasks < size():
        raise UserError(
            f"train.tasks={tasks} cannot be split over {size()} processes, each of which needs a task; "
            f"give train.tasks={size()} or more, or start fewer: --nproc-per-node={tasks}"
        )
    start, stop = (tasks * r // size() for r in (rank(), rank() + 1))
    return start, stop - start


def seed(seed: int, step: int) -> None:
    """Seed the generators for a step, each rank's differently: dropout must not drop the same units of all tasks.

    By the step, so that a checkpoint need not hold the generators of every rank.
    """
    if size() > 1:
        seed_everything(int(np.random.SeedSequence([seed, step, rank()]).generate_state(1, np.uint64)[0]))


@contextmanager
def _contact() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        outlive_torchrun()
        raise LostProcessError("another process of this job has ended, or does not answer") from error


def outlive_torchrun() -> None:
    """Let the rest of this process be done: when one process ends badly ``torchrun`` ends the others by SIGTERM.

    It waits half a minute before it ends them by SIGKILL.
    """
    if size() > 1:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def mean(values: dict[str, float], weight: float) -> dict[str, float]:
    """The means over all tasks, from those over this rank's, which are the fraction ``weight`` of all.

    Raises:
        LostProcessError: Another process is gone; so do all functions below.
    """
    if size() == 1:
        return values
    weighted = weight * torch.tensor(list(values.values()), dtype=torch.float64)
    with _contact():
        dist.all_reduce(weighted)
    return dict(zip(values, weighted.tolist(), strict=True))


def mean_gradient(gradient: T, weight: float) -> T:
    """The same of a gradient, any tree of tensors of one dtype; summed in float32 at least, as one message."""
    if size() == 1:
        return gradient
    leaves, form = tree_flatten(gradient)
    flat = torch.cat([t.flatten() for t in leaves])
    flat = weight * flat.to(torch.promote_types(flat.dtype, torch.float32))
    with _contact():
        dist.all_reduce(flat)
    parts = flat.split([t.numel() for t in leaves])
    means = [part.view_as(t).to(t.dtype) for part, t in zip(parts, leaves, strict=True)]
    return tree_unflatten(means, form)


def largest(number: int) -> int:
    """The largest of the ranks' numbers, once all have come this far."""
    if size() == 1:
        return number
    largest = torch.tensor(number)
    with _contact():
        dist.all_reduce(largest, dist.ReduceOp.MAX)
    return int(largest)


def gather(part: list[T]) -> list[T]:
    """The ranks' lists, one behind the other. Tensors in them are on the CPU."""
    if size() == 1:
        return part
    parts: list[Any] = [None] * size()
    with _contact():
        dist.all_gather_object(parts, part)
    return [x for part in parts for x in part]


def of_first(value: T) -> T:
    """The first rank's value."""
    return gather([value])[0]


@contextmanager
def first_then_rest() -> Iterator[None]:
    """A block that the first rank goes through alone, then the others: they find in a cache what it put there."""
    if not is_first():
        largest(0)
    try:
        yield
    finally:
        if is_first():
            largest(0)


def speaks() -> bool:
    """Whether this is the first process of the job that has an end to report: a mistake is told once."""
    if _store is None:
        return True
    try:
        return _store.add("metaattn/reports", 1) == 1
    except RuntimeError:
        return True  # torchrun itself is gone
