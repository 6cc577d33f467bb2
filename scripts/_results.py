"""Results of a benchmark by machine. A run replaces the rows that it measures again, and keeps the others."""

import json
from collections.abc import Callable, Hashable, Iterable
from pathlib import Path
from typing import Any

Row = dict[str, Any]
Run = dict[str, Any]  # on one machine: {"machine": {"device": ..., versions}, "rows": [...], ...}


def of_machine(path: Path, machine: dict[str, Any], *, versions: Iterable[str] = ("torch",)) -> tuple[list[Run], Run]:
    """Return all runs in a file, and the one of the same device and versions, which is added if it is missing."""
    runs: list[Run] = json.loads(path.read_text()) if path.exists() else []
    same = ("device", *versions)
    for run in runs:
        if all(run["machine"].get(name) == machine[name] for name in same):
            run["machine"] = machine
            return runs, run
    runs.append({"machine": machine, "rows": []})
    return runs, runs[-1]


def replaced(before: list[Row], rows: list[Row], by: Callable[[Row], Hashable]) -> list[Row]:
    """Return ``before`` without the rows that have a key of ``rows``, then ``rows``.

    A key says what was measured but not on which implementation, so that compared numbers are of the same run.
    """
    again = {by(row) for row in rows}
    return [row for row in before if by(row) not in again] + rows
