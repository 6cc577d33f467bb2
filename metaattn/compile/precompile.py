"""Parts of a step compiled ahead of their turn, by other processes, where there are cores for them.

Inductor works on a part in one thread, waits for the compilers of its kernels, and only then begins the next; a step
has a dozen of them. What other processes have compiled, it finds in its cache on disk, where it looks in any case: if
a process fails, or a part comes in another form than was expected, it is compiled at its turn, as without them.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import os
import pickle
import queue
import struct
import subprocess
import sys
import threading
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import fx
from torch._dynamo.utils import counters
from torch._inductor import config

from ..autodiff import TensorSpec

MOST = 8  # processes
FREE = 2 << 30  # bytes of a GPU for each of them, besides what a part takes
PATIENCE = 120.0  # seconds to wait for one
HEAD = struct.Struct("<qq")  # before a part: its number, and the length of what follows
NUMBER = struct.Struct("<q")  # the answer
_log = logging.getLogger(__name__)


class Part(NamedTuple):
    """A module, and the forms of its inputs."""

    module: fx.GraphModule
    forms: Sequence[TensorSpec]


class Precompiler:
    """What is compiled ahead for one step.

    Args:
        options: Of Inductor.
    """

    def __init__(self, options: Mapping[str, Any]) -> None:
        self._options = dict(options)
        self._waiting: dict[Hashable, Part] = {}
        self._begun: dict[Hashable, threading.Event | None] = {}  # None: by the caller
        caches = {name: options.get(name, getattr(config, name)) for name in ("fx_graph_cache", "force_disable_caches")}
        self._most = processes() if caches["fx_graph_cache"] and not caches["force_disable_caches"] else 0
        if self._most:
            try:
                helpers()  # it takes as long as the first recording until they are there
            except Exception as error:
                self._give_up(f"no process can be started ({error})")

    def ask(self, parts: Mapping[Hashable, Part]) -> None:
        """Begin with as many as there are processes for, in their order; but the caller compiles the first."""
        if self._most:
            new = [(key, part) for key, part in parts.items() if key not in self._begun]
            self._waiting |= dict(new[1:])
            self._fill()

    @contextlib.contextmanager
    def turn(self, key: Hashable) -> Iterator[None]:
        """In which the caller compiles a part, after waiting for the process that is at it, if one is.

        If that was in vain, nothing is compiled ahead any more: a setting may differ that is part of Inductor's keys.
        """
        self._waiting.pop(key, None)
        self._fill()
        begun = self._begun.setdefault(key, None)
        if begun is not None and not begun.wait(PATIENCE):
            self._give_up("a process takes too long")
        before = counters["inductor"]["fxgraph_cache_hit"]
        yield
        if begun is not None and counters["inductor"]["fxgraph_cache_hit"] == before:
            self._give_up("what a process compiled is not found")

    def _give_up(self, reason: str) -> None:
        _log.debug("nothing is compiled ahead any more: %s", reason)
        self._most = 0
        self._waiting.clear()
        self._begun.clear()

    def _fill(self) -> None:
        at_work = sum(done is not None and not done.is_set() for done in self._begun.values())
        for count, key in enumerate(list(self._waiting)[: max(0, self._most - at_work)], at_work + 1):
            part = self._waiting.pop(key)
            needed = count * FREE + sum(form.bytes for form in part.forms)
            devices = {form.device for form in part.forms if form.device.type == "cuda"}
            try:
                if all(torch.cuda.mem_get_info(device)[0] >= needed for device in devices):
                    self._begun[key] = helpers().begin(part, self._options)
            except Exception:  # what cannot be pickled, say, is compiled at its turn
                _log.debug("a part is not compiled ahead", exc_info=True)


def processes() -> int:
    """How many may be at work: half of the cores that this process may use, of its share of them, up to a limit."""
    most = os.environ.get("METAATTN_COMPILE_PROCESSES", str(MOST))
    if not most.isdecimal():
        raise ValueError(f"METAATTN_COMPILE_PROCESSES must be a number, 0 for none; got {most!r}")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    count = min(int(most), cores // max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1"))) // 2)
    return count if count > 1 and hasattr(os, "fork") else 0


class WorkerPool:
    """The process that forks others, of :mod:`._ahead_worker`: it ends with this one, they with their work."""

    def __init__(self) -> None:
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
            "PYTORCH_NVML_BASED_CUDA_CHECK": "1",  # a GPU must not be touched before a fork, not even to count it
            "TORCH_WARM_POOL": "0",  # no processes on import
        }
        command = [sys.executable, "-P", "-c", "from metaattn.compile.precompile_worker import main; main()"]
        pipe, null = subprocess.PIPE, subprocess.DEVNULL
        # A session of its own: what interrupts this process alone is to end it.
        self._process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=null, env=environment, start_new_session=True
        )
        self._numbers = itertools.count()
        self._at_work: dict[int, threading.Event] = {}
        self._unsent: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=f, daemon=True) for f in (self._send, self._listen)]
        for thread in self._threads:
            thread.start()

    def begin(self, part: Part, options: Mapping[str, Any]) -> threading.Event | None:
        """Have a part compiled; what is set when it is, well or not. ``None`` if the process is gone."""
        from .precompile_worker import Settings, packed  # here, for it takes seconds

        number, done = next(self._numbers), threading.Event()
        data = pickle.dumps((packed(part.module), part.forms, options, Settings.now()))
        with self._lock:
            if self._process.poll() is not None:
                return None
            self._at_work[number] = done
        self._unsent.put(HEAD.pack(number, len(data)) + data)
        return done

    def end(self) -> None:
        """Take no more work, and wait until all is done."""
        self._unsent.put(None)
        for thread in self._threads:
            thread.join()

    def _send(self) -> None:  # in a thread of its own: it takes seconds until the process reads
        assert self._process.stdin is not None
        with contextlib.suppress(OSError), self._process.stdin as given:
            while (data := self._unsent.get()) is not None:
                given.write(data)
                given.flush()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as answers:
            while len(answer := answers.read(NUMBER.size)) == NUMBER.size:
                (number,) = NUMBER.unpack(answer)
                with self._lock:
                    done = self._at_work.pop(number, None)
                if done is not None:
                    done.set()
        with self._lock:
            self._process.wait()
            for done in self._at_work.values():
                done.set()


@functools.cache
def helpers() -> WorkerPool:
    """Those of this process."""
    return WorkerPool()
