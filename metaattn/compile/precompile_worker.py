"""The processes of :mod:`._ahead`: one that imports all and touches no GPU, and forks another for each part.

Run as a program. On its standard input it takes parts, each as a number, a length and a pickle; on its standard output
the number of each comes back when it is done, and when its process has ended, well or not.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import fx
from torch._inductor import async_compile, compile_fx, config  # noqa: F401  # before the fork: it takes seconds
from torch._subclasses import FakeTensorMode
from torch.fx._graph_pickler import GraphPickler, Options
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from ..autodiff import TensorSpec
from .piecewise import inductor
from .precompile import HEAD, NUMBER

LIMIT = 300  # seconds for a part
THREADS = 4  # processes of each that compile a part's kernels of Triton side by side


def packed(module: fx.GraphModule) -> bytes:
    """A graph, with whatever operators it has."""
    return GraphPickler.dumps(module, Options(ops_filter=None))


class Settings(NamedTuple):
    """What code depends on beside a part. Most of it is in Inductor's keys."""

    dtype: torch.dtype
    precision: str
    matmul: str
    deterministic: bool
    threads: int

    @classmethod
    def now(cls) -> Settings:
        """Those of this process."""
        return cls(
            torch.get_default_dtype(),
            torch.get_float32_matmul_precision(),
            torch.backends.cuda.matmul.fp32_precision,
            torch.are_deterministic_algorithms_enabled(),
            torch.get_num_threads(),
        )

    def set(self) -> None:
        """Have them here."""
        torch.set_default_dtype(self.dtype)
        torch.set_float32_matmul_precision(self.precision)
        torch.backends.cuda.matmul.fp32_precision = self.matmul  # differs where a precision was set and set back
        torch.use_deterministic_algorithms(self.deterministic)
        torch.set_num_threads(self.threads)


def compile_part(module: bytes, forms: Sequence[TensorSpec], options: Mapping[str, Any], settings: Settings) -> None:
    """Compile a part for tensors of the forms, whose numbers do not matter."""
    config.compile_threads, config.worker_start_method = THREADS, "fork"
    settings.set()
    graph: Any = GraphPickler.loads(module, FakeTensorMode(shape_env=ShapeEnv()))
    with torch.no_grad():
        inductor(options)(
            graph, [torch.empty_strided(f.shape, f.stride, dtype=f.dtype, device=f.device) for f in forms]
        )


def main() -> None:
    """Take parts until there are no more."""
    given, answers = sys.stdin.buffer, os.dup(1)
    os.dup2(2, 1)  # what a compiler prints is no answer
    at_work: dict[int, int] = {}

    def answer(options: int) -> bool:
        """Say of a child that it has ended, if one has; or, without options, when one has."""
        child, _ = os.waitpid(-1, options)
        if child:
            os.write(answers, NUMBER.pack(at_work.pop(child)))
        return child != 0

    def ended(signum: int, frame: Any) -> None:
        with contextlib.suppress(ChildProcessError):
            while answer(os.WNOHANG):
                pass

    signal.signal(signal.SIGCHLD, ended)
    while head := given.read(HEAD.size):
        number, length = HEAD.unpack(head)
        data = given.read(length)
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD])
        if (child := os.fork()) == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGCHLD])
            signal.alarm(LIMIT)  # one that hangs ends
            try:
                compile_part(*pickle.loads(data))
                os.write(answers, NUMBER.pack(number))  # the end takes a while
            finally:
                async_compile.shutdown_compile_workers()
                os._exit(0)
        at_work[child] = number
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGCHLD])
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    while at_work:
        answer(0)
