"""Pieces compiled before they first run, by other processes, where there are cores for them.

Inductor works on a piece in one thread, waits for the compilers of its kernels, and only then begins the next; a step
has a dozen pieces. What another process has compiled, Inductor finds in its cache on disk, where it looks in any case.
If a process fails, or a piece is called with other inputs than were expected, it is compiled when it first runs, as
without these processes.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import pickle
import queue
import subprocess
import sys
import threading
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import fx

from ..autodiff import TensorSpec
from .inductor import disk_cache_hits, serialize, uses_disk_cache
from .precompile_protocol import ANSWER, HEADER, Request, Settings

MAX_PROCESSES = 8
GPU_BYTES = 2 << 30  # memory of a GPU that a process takes, besides the inputs of its piece
TIMEOUT = 120.0  # seconds to wait for a process
_log = logging.getLogger(__name__)


class Piece(NamedTuple):
    """A module to compile, and the specs of its inputs."""

    module: fx.GraphModule
    specs: Sequence[TensorSpec]


class Precompiler:
    """Compiles the pieces of one step in other processes.

    Args:
        options: Of Inductor.
    """

    def __init__(self, options: Mapping[str, Any]) -> None:
        self._options = dict(options)
        self._lock = threading.RLock()
        self._waiting: dict[Hashable, Piece] = {}
        self._begun: dict[Hashable, threading.Event | None] = {}  # None: the caller compiles it
        self._max_processes = process_count() if uses_disk_cache(options) else 0
        if self._max_processes:
            try:
                worker_pool()  # it needs as long to start as the first recording takes
            except Exception as error:
                self._give_up(f"no process can be started ({error})")

    def submit(self, pieces: Mapping[Hashable, Piece]) -> None:
        """Have pieces compiled, in their order, except for the first, which the caller compiles at once."""
        with self._lock:
            if self._max_processes:
                new = [(key, piece) for key, piece in pieces.items() if key not in self._begun]
                self._waiting |= dict(new[1:])
                self._begin_waiting()

    @contextlib.contextmanager
    def compiling(self, key: Hashable) -> Iterator[None]:
        """Context in which the caller compiles a piece: on entry, wait for the process that compiles it, if one does.

        If the process was of no use, no other piece is sent to one: it may lack a setting that is part of Inductor's
        keys, so that what it compiles is never found.
        """
        with self._lock:
            self._waiting.pop(key, None)
            self._begin_waiting()
            done = self._begun.setdefault(key, None)
        if done is not None and not done.wait(TIMEOUT):
            self._give_up("a process takes too long")
        hits = disk_cache_hits() if done is not None else 0
        yield
        if done is not None and disk_cache_hits() == hits:
            self._give_up("what a process compiled is not found")

    def _give_up(self, reason: str) -> None:
        _log.debug("no more pieces are compiled by other processes: %s", reason)
        with self._lock:
            self._max_processes = 0
            self._waiting.clear()
            self._begun.clear()

    def _begin_waiting(self) -> None:
        """Send waiting pieces to the processes that are free, as far as the memory of the GPU allows."""
        running = sum(done is not None and not done.is_set() for done in self._begun.values())
        free = max(0, self._max_processes - running)
        for count, key in enumerate(list(self._waiting)[:free], running + 1):
            piece = self._waiting.pop(key)
            needed = count * GPU_BYTES + sum(spec.bytes for spec in piece.specs)
            devices = {spec.device for spec in piece.specs if spec.device.type == "cuda"}
            try:
                if all(torch.cuda.mem_get_info(device)[0] >= needed for device in devices):
                    self._begun[key] = worker_pool().begin(piece, self._options)
            except Exception:  # one that cannot be pickled, for example: the caller compiles it
                _log.debug("a piece cannot be compiled by another process", exc_info=True)


def process_count() -> int:
    """Return how many processes may compile: half of the cores of this process, up to a limit; 0 for less than two.

    Where several ranks share a machine, each counts its share of the cores.

    Raises:
        ValueError: ``METAATTN_COMPILE_PROCESSES`` is set and no number.
    """
    limit = os.environ.get("METAATTN_COMPILE_PROCESSES", str(MAX_PROCESSES))
    if not limit.isdecimal():
        raise ValueError(f"METAATTN_COMPILE_PROCESSES must be a number, 0 for none; got {limit!r}")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    count = min(int(limit), cores // max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1"))) // 2)
    return count if count > 1 and hasattr(os, "fork") else 0


class WorkerPool:
    """A process of :mod:`.precompile_worker`, which forks one for each piece.

    It ends with this process; the processes that it forked end with their work.
    """

    def __init__(self) -> None:
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
            "PYTORCH_NVML_BASED_CUDA_CHECK": "1",  # a GPU must not be touched before a fork, not even to count it
            "TORCH_WARM_POOL": "0",  # Inductor starts no processes when it is imported
        }
        command = [sys.executable, "-P", "-c", "from metaattn.compile.precompile_worker import main; main()"]
        pipe, null = subprocess.PIPE, subprocess.DEVNULL
        # In a session of its own, so that an interrupt from the keyboard reaches only this process.
        self._process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=null, env=environment, start_new_session=True
        )
        self._numbers = itertools.count()
        self._running: dict[int, threading.Event] = {}
        self._unsent: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=f, daemon=True) for f in (self._send, self._receive)]
        for thread in self._threads:
            thread.start()

    def begin(self, piece: Piece, options: Mapping[str, Any]) -> threading.Event | None:
        """Have a piece compiled.

        Returns:
            An event that is set when the piece is done, whether or not it succeeded; ``None`` if the process has ended.
        """
        number, done = next(self._numbers), threading.Event()
        data = pickle.dumps(Request(serialize(piece.module), piece.specs, options, Settings.current()))
        with self._lock:
            if self._process.poll() is not None:
                return None
            self._running[number] = done
        self._unsent.put(HEADER.pack(number, len(data)) + data)
        return done

    def end(self) -> None:
        """Accept no more pieces, and wait until all are done."""
        self._unsent.put(None)
        for thread in self._threads:
            thread.join()

    def _send(self) -> None:  # in a thread, because the process needs seconds until it reads
        assert self._process.stdin is not None
        with contextlib.suppress(OSError), self._process.stdin as requests:
            while (data := self._unsent.get()) is not None:
                requests.write(data)
                requests.flush()

    def _receive(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as answers:
            while len(answer := answers.read(ANSWER.size)) == ANSWER.size:
                (number,) = ANSWER.unpack(answer)
                with self._lock:
                    done = self._running.pop(number, None)
                if done is not None:
                    done.set()
        with self._lock:
            self._process.wait()
            for done in self._running.values():
                done.set()


_pool: WorkerPool | None = None
_pool_lock = threading.Lock()


def worker_pool() -> WorkerPool:
    """Return the pool of this process; the first call starts it."""
    global _pool
    with _pool_lock:
        if _pool is None:
            _pool = WorkerPool()
        return _pool
