"""Metrics of a run while it trains: ``metrics.csv``, TensorBoard and the progress bar."""

from __future__ import annotations

import csv
import io
import os
import re
import warnings
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from metaattn.tasks.cache import replacing

from . import distributed
from .directory import set_aside

COLUMNS = [
    "step",
    "split",
    "loss_before",
    "loss_after",
    "accuracy_before",
    "accuracy_after",
    "learning_rate",
    "steps_per_second",
]
Row = dict[str, Any]
SPLITS = ("train", "validation")
MOST_BYTES = 2**28  # of a metrics.csv; a run of a million steps writes a tenth of it


class Metrics:
    """Rows of metrics in ``metrics.csv`` and in TensorBoard.

    Args:
        out: The run's directory. If it has a ``metrics.csv``, the rows up to ``step`` are kept and later ones are
            dropped, because a resumed run writes them again. A damaged file is set aside, and the rows that can be
            read are kept, with a warning.
        step: The step at which the run starts or resumes.
        expected: How many rows up to ``step`` the run has written; fewer in the file are a warning.
    """

    def __init__(self, out: Path, step: int, expected: int = 0) -> None:
        self.path = out / "metrics.csv"
        found, problem = _read(self.path)
        self.rows: list[Row] = [r for r in found if r["step"] <= step]
        if problem:
            aside = set_aside(self.path, keep=True)
            warnings.warn(f"{self.path} is damaged ({problem}): its readable rows are kept; see {aside}", stacklevel=2)
        if (lost := expected - len(self.rows)) > 0:
            warnings.warn(f"{self.path} lacks {lost} of the {expected} rows up to step {step}", stacklevel=2)
        text = _text(self.rows, header=True)
        if not self.path.is_file() or self.path.read_bytes() != text:
            with replacing(self.path) as file:
                file.write(text)
        self.board = SummaryWriter(out / "tensorboard", purge_step=step + 1 if step else None)

    def add(self, row: Row) -> None:
        """Write a row.

        Raises:
            OSError: It cannot be written completely; the file is left as it was.
        """
        _append(self.path, _text([row]))
        self.rows.append(row)
        for key, value in row.items():
            if key not in ("step", "split") and value is not None:
                self.board.add_scalar(f"{key}/{row['split']}", value, row["step"])

    def close(self) -> None:
        """Flush TensorBoard's file."""
        self.board.close()


def read_metrics(path: Path) -> list[Row]:
    """Read the rows of a ``metrics.csv``.

    Returns:
        The rows; none if there is no file. A last line that a kill cut short is dropped, and so is what cannot be read.
    """
    return _read(path)[0]


def _text(rows: list[Row], *, header: bool = False) -> bytes:
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, COLUMNS)
    if header:
        writer.writeheader()
    writer.writerows(rows)
    return file.getvalue().encode()


def _append(path: Path, text: bytes) -> None:
    with path.open("ab", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        try:
            while text:  # a file system that is almost full writes a part
                text = text[file.write(text) :]
            os.fsync(file.fileno())
        except OSError:
            with suppress(OSError):
                file.truncate(size)
            raise


def _read(path: Path) -> tuple[list[Row], str]:
    """Return the rows that can be read, in order, and what is wrong with the file, or ``""``."""
    if not path.exists():
        return [], ""
    if not path.is_file() or path.stat().st_size > MOST_BYTES:
        return [], "it is not a file of metrics"
    *lines, rest = path.read_bytes().split(b"\n")  # what follows the last line break was cut short
    if not lines:
        return [], "" if _text([], header=True).startswith(rest) else "it has no line"
    columns = lines[0].decode("ascii", errors="replace").rstrip("\r").split(",")
    problem = ""
    if len(set(columns)) == len(columns) and {"step", "split"} <= {*columns} <= {*COLUMNS}:
        start = 1
    else:
        columns, problem, start = COLUMNS, "its first line does not name the columns", 0
    rows: dict[tuple[int, str], Row] = {}
    for number, line in enumerate(lines[start:], start + 1):
        row = _row(columns, line)
        if row is not None and (row["step"], row["split"]) not in rows:
            rows[row["step"], row["split"]] = row
        elif number > 1:
            problem = problem or f"line {number} is not a row, or a second row of one step"
    return [rows[key] for key in sorted(rows)], problem  # in one step training comes before validation


def _row(columns: list[str], line: bytes) -> Row | None:
    """Return a line as a row, or ``None`` if it is none."""
    try:
        values = line.decode("ascii").rstrip("\r").split(",")
        raw = dict(zip(columns, values, strict=True))
        if not re.fullmatch(r"[0-9]{1,18}", raw["step"]) or raw["split"] not in SPLITS:
            return None
        numbers = {k: _number(v) for k, v in raw.items() if k not in ("step", "split")}
    except ValueError:
        return None
    return {**numbers, "step": int(raw["step"]), "split": raw["split"]}


def _number(text: str) -> float | None:
    if not text:
        return None
    if re.fullmatch(r"-?([0-9.]+(e[-+]?[0-9]+)?|inf)|nan", text) is None:
        raise ValueError(text)
    return float(text)


class RunLog:
    """Everything that a run reports while it trains; a context manager.

    Only the first of several processes reports: the methods of the others do nothing.

    Args:
        out: The run's directory.
        step: The step at which the run starts or resumes.
        total: The number of steps.
        title: The label of the progress bar.
        expected: How many rows up to ``step`` the run has written.
    """

    def __init__(self, out: Path, step: int, total: int, title: str, expected: int = 0) -> None:
        self._first = distributed.is_first()
        self._metrics = Metrics(out, step, expected) if self._first else None
        self._bar = tqdm(total=total, initial=step, desc=title, disable=not self._first)

    @property
    def rows(self) -> list[Row]:
        """All rows so far, those before a resume included."""
        return [] if self._metrics is None else self._metrics.rows

    def advance(self) -> None:
        """Count one step on the progress bar."""
        self._bar.update()

    def training(self, step: int, row: dict[str, float]) -> None:
        """Report the metrics of a training step."""
        self._add(step, "train", row)
        self._bar.set_postfix_str(_summary(row))

    def validation(self, step: int, row: dict[str, float]) -> None:
        """Report the metrics of a validation."""
        self._add(step, "validation", row)
        if self._first:
            tqdm.write(f"step {step:>6}  validation  {_summary(row)}")

    def _add(self, step: int, split: str, row: dict[str, float]) -> None:
        if self._metrics is not None:
            self._metrics.add({"step": step, "split": split, **row})

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._bar.close()
        if self._metrics is not None:
            self._metrics.close()


def _summary(row: dict[str, float]) -> str:
    text = f"loss {row['loss_before']:.3f} → {row['loss_after']:.3f}"
    if "accuracy_after" in row:
        text += f", accuracy {row['accuracy_before']:.1%} → {row['accuracy_after']:.1%}"
    return text
