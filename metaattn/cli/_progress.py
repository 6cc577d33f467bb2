"""Progress bars, where tqdm is installed: it belongs to the extra ``train``, and the commands work without it."""

from __future__ import annotations

from types import TracebackType

try:
    from tqdm import tqdm
except ModuleNotFoundError:
    tqdm = None  # type: ignore[assignment, misc]


class Progress:
    """A progress bar on a terminal; a context manager, which removes the bar at its end.

    Args:
        total: The number of steps.
        label: The text before the bar.
    """

    def __init__(self, total: int, label: str) -> None:
        self._bar = None if tqdm is None else tqdm(total=total, desc=label, leave=False, disable=None)

    def advance(self) -> None:
        """Count one step."""
        if self._bar is not None:
            self._bar.update()

    def print(self, text: str) -> None:
        """Print a line above the bar."""
        if self._bar is None:
            print(text)
        else:
            self._bar.write(text)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.close()
