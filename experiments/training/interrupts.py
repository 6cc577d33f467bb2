"""Ctrl-C and SIGTERM during training: finish the current step, save, then stop."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from . import distributed


class StoppedBySignal(Exception):  # noqa: N818 - not an error: the user or the machine asked for it
    """A signal ended the run after its state was saved.

    Args:
        number: The signal's number; the exit code ``code`` is 128 more, as in a shell.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.code = 128 + number


@contextmanager
def collect_signals() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM instead of acting on them.

    Yields:
        The list of received signals, empty or of one number: a second signal raises ``KeyboardInterrupt``, so that an
        impatient user need not wait for the step to end.
    """
    received: list[int] = []

    def collect(number: int, _: Any) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)

    handlers = {s: signal.signal(s, collect) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        try:
            yield received
        finally:
            for s, handler in handlers.items():
                signal.signal(s, handler)
    except BaseException:
        distributed.outlive_torchrun()
        raise
