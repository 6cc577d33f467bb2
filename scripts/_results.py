"""What a benchmark has measured, by machine: a run replaces what it measures again, and leaves the rest."""

import json
from collections.abc import Callable, Hashable, Iterable
from pathlib import Path
from typing import Any

Row = dict[str, Any]
Run = dict[str, Any]  # of a machine: {"machine": {"device": ..., versions}, "rows": [...], ...}


def of_machine(path: Path, machine: dict[str, Any], *, versions: Iterable[str] = ("torch",)) -> tuple[list[Run], Run]:
    """All runs in a file, and among them that of the same device and versions: an empty one, if there was none."""
    runs: list[Run] = json.loads(path.read_text()) if path.exists() else []
    same = ("device", *versions)
    for run in runs:
        if all(run["machine"].get(name) == machine[name] for name in same):
            run["machine"] = machine
            return runs, run
    runs.append({"machine": machine, "rows": []})
    return runs, runs[-1]


def replaced(before: list[Row], rows: list[Row], by: Callable[[Row], Hashable]) -> list[Row]:
    """The rows with earlier ones of what was measured again left out, everyone's: what is compared is of one run."""
    again = {by(row) for row in rows}
    return [row for row in before if by(row) not in again] + rows
