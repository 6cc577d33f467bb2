"""Data parallelism over the processes that ``torchrun`` starts.

The tasks of each meta-batch are split over the processes (ranks), and losses and gradients are averaged over all of
them, by gloo on CPUs and NCCL on GPUs. The tasks of a step do not depend on the number of processes, so that a run is
the same on any number of them, within rounding. Only the first rank writes files, draws plots and prints. In an
ordinary process the functions here communicate with nobody and return their input.

Numbers and flags are sent by gloo, before the gradients, even where those are sent by NCCL: gloo reports at once that a
process has ended, whereas NCCL would wait for it.
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

_store: Store | None = None  # the key-value store of torchrun, shared by all processes; None in an ordinary process


class LostProcessError(RunStoppedError):
    """Another process of the job has ended unexpectedly."""


@contextmanager
def processes() -> Iterator[None]:
    """Join the processes that ``torchrun`` started, if it did; exit from an error without waiting for the others."""
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
            # Not sys.exit: NCCL's shutdown may wait for a process that has ended.
            os._exit(end.code if isinstance(end.code, int) else 1)
    dist.destroy_process_group()
    _store = None


def rank() -> int:
    """Return the index of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def size() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_first() -> bool:
    """Return whether this process writes files, draws plots and shows progress."""
    return rank() == 0


def device(name: str) -> str:
    """Return the device of this process.

    Args:
        name: The device of the run: ``"auto"``, ``"cpu"``, ``"cuda"`` or ``"cuda:N"``.

    Returns:
        ``name``, or the GPU number ``LOCAL_RANK`` where several processes use GPUs.

    Raises:
        UserError: Several processes were given one GPU, or there are fewer GPUs than processes.
    """
    if size() == 1 or name == "cpu" or not torch.cuda.is_available():
        return name
    local, here, gpus = int(os.environ["LOCAL_RANK"]), os.environ["LOCAL_WORLD_SIZE"], torch.cuda.device_count()
    if name not in ("auto", "cuda"):
        raise UserError(
            f"device={name} is one device for {here} processes; give device=cuda (a GPU for each) or device=cpu"
        )
    if local >= gpus:
        raise UserError(
            f"{here} processes need as many GPUs, but there are {gpus}; give --nproc-per-node={gpus} or device=cpu"
        )
    torch.cuda.set_device(local)
    return f"cuda:{local}"


def share(tasks: int) -> tuple[int, int]:
    """Return this rank's part of a batch: its first task and its number of tasks.

    The parts of two ranks differ in size by at most one.

    Raises:
        UserError: There are fewer tasks than processes.
    """
    if tasks < size():
        raise UserError(
            f"train.tasks={tasks} cannot be split over {size()} processes, each of which needs a task; "
            f"give train.tasks={size()} or more, or start fewer processes: --nproc-per-node={tasks}"
        )
    start, stop = (tasks * r // size() for r in (rank(), rank() + 1))
    return start, stop - start


def seed(seed: int, step: int) -> None:
    """Seed the random number generators of each rank differently; an ordinary process is left as it is.

    Otherwise dropout would drop the same units on every rank. The seed depends on the step, so that a checkpoint need
    not hold the generators of every rank.
    """
    if size() > 1:
        seed_everything(int(np.random.SeedSequence([seed, step, rank()]).generate_state(1, np.uint64)[0]))


@contextmanager
def _lost_process() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        outlive_torchrun()
        raise LostProcessError("another process of this job has ended or does not answer") from error


def outlive_torchrun() -> None:
    """Ignore SIGTERM, so that this process can finish its cleanup.

    When one process fails, ``torchrun`` sends SIGTERM to the others, and SIGKILL half a minute later.
    """
    if size() > 1:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def mean(values: dict[str, float], weight: float) -> dict[str, float]:
    """Return means over all ranks.

    Args:
        values: The means over this rank's tasks.
        weight: This rank's fraction of all tasks.

    Raises:
        LostProcessError: Another process has ended; all functions below raise it too.
    """
    if size() == 1:
        return values
    weighted = weight * torch.tensor(list(values.values()), dtype=torch.float64)
    with _lost_process():
        dist.all_reduce(weighted)
    return dict(zip(values, weighted.tolist(), strict=True))


def mean_gradient(gradient: T, weight: float) -> T:
    """Return the mean of a gradient over all ranks, like :func:`mean`.

    Args:
        gradient: A pytree of tensors of one dtype; they are summed in float32 or wider, as one message.
        weight: This rank's fraction of all tasks.
    """
    if size() == 1:
        return gradient
    tensors, spec = tree_flatten(gradient)
    flat = torch.cat([t.flatten() for t in tensors])
    flat = weight * flat.to(torch.promote_types(flat.dtype, torch.float32))
    with _lost_process():
        dist.all_reduce(flat)
    parts = flat.split([t.numel() for t in tensors])
    means = [part.view_as(t).to(t.dtype) for part, t in zip(parts, tensors, strict=True)]
    return tree_unflatten(means, spec)


def largest(number: int) -> int:
    """Return the largest of the ranks' numbers; this is also a barrier."""
    if size() == 1:
        return number
    result = torch.tensor(number)
    with _lost_process():
        dist.all_reduce(result, dist.ReduceOp.MAX)
    return int(result)


def gather(part: list[T]) -> list[T]:
    """Return the concatenation of the ranks' lists. Tensors in them must be on the CPU."""
    if size() == 1:
        return part
    parts: list[Any] = [None] * size()
    with _lost_process():
        dist.all_gather_object(parts, part)
    return [x for part in parts for x in part]


def from_first(value: T) -> T:
    """Return the first rank's value."""
    return gather([value])[0]


@contextmanager
def first_then_rest() -> Iterator[None]:
    """Run a block on the first rank, then on the others, which find in a cache what the first one put there."""
    if not is_first():
        largest(0)
    try:
        yield
    finally:
        if is_first():
            largest(0)


def is_first_to_report() -> bool:
    """Return whether this process is the first of the job to ask: an error is printed by one process only."""
    if _store is None:
        return True
    try:
        return _store.add("metaattn/reports", 1) == 1
    except RuntimeError:
        return True  # torchrun itself has ended
