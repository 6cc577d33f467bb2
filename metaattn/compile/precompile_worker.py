"""Process that compiles pieces for :mod:`.precompile`.

The process imports everything once, touches no GPU, and forks a child for each piece. It reads requests from its
standard input and writes to its standard output the number of each that is done: when the piece is compiled, and at the
latest when the child has ended, whether or not it succeeded.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import sys
from typing import Any

import torch

from . import inductor
from .precompile_protocol import ANSWER, HEADER, Request

TIME_LIMIT = 300  # seconds for a piece, after which a child that hangs is ended
KERNEL_COMPILERS = 4  # processes of each child, which compile the Triton kernels of a piece side by side


def compile_piece(request: Request) -> None:
    """Compile a piece for tensors of the requested specs; their numbers do not matter."""
    request.settings.apply()
    module = inductor.deserialize(request.module)
    inputs = [torch.empty_strided(s.shape, s.stride, dtype=s.dtype, device=s.device) for s in request.specs]
    with torch.no_grad():
        inductor.inductor_compiler(request.options)(module, inputs)


def main() -> None:
    """Compile pieces until the standard input ends."""
    inductor.preload()
    requests, answers = sys.stdin.buffer, os.dup(1)
    os.dup2(2, 1)  # what a compiler prints must not be read as an answer
    running: dict[int, int] = {}  # the number of a request, by the child that compiles it

    def reap(options: int) -> bool:
        """Answer for a child that has ended; without options, wait for one. Return whether there was one."""
        child, _ = os.waitpid(-1, options)
        if child:
            os.write(answers, ANSWER.pack(running.pop(child)))
        return child != 0

    def reap_all(signum: int, frame: Any) -> None:
        with contextlib.suppress(ChildProcessError):
            while reap(os.WNOHANG):
                pass

    signal.signal(signal.SIGCHLD, reap_all)
    while header := requests.read(HEADER.size):
        number, length = HEADER.unpack(header)
        data = requests.read(length)
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD])
        if (child := os.fork()) == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGCHLD])
            signal.alarm(TIME_LIMIT)
            try:
                with inductor.kernel_compilers(KERNEL_COMPILERS):
                    compile_piece(pickle.loads(data))
                    os.write(answers, ANSWER.pack(number))  # before the child ends, which takes a while
            finally:
                os._exit(0)
        running[child] = number
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGCHLD])
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    while running:
        reap(0)
