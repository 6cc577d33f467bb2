"""Metrics of a run while it trains: ``metrics.csv``, TensorBoard and the progress bar."""

from __future__ import annotations

import csv
from pathlib import Path
from types import TracebackType
from typing import Any

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from . import distributed

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


class Metrics:
    """Rows of metrics in ``metrics.csv`` and in TensorBoard.

    Args:
        out: The run's directory. If it has a ``metrics.csv``, the rows up to ``step`` are kept and later ones are
            dropped, because a resumed run writes them again.
        step: The step at which the run starts or resumes.
    """

    def __init__(self, out: Path, step: int) -> None:
        self.path = out / "metrics.csv"
        self.rows: list[Row] = [r for r in read_metrics(self.path) if r["step"] <= step]
        with self.path.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(self.rows)
        self.board = SummaryWriter(out / "tensorboard", purge_step=step + 1 if step else None)

    def add(self, row: Row) -> None:
        """Write a row."""
        self.rows.append(row)
        with self.path.open("a", newline="") as file:
            csv.DictWriter(file, COLUMNS).writerow(row)
        for key, value in row.items():
            if key not in ("step", "split") and value is not None:
                self.board.add_scalar(f"{key}/{row['split']}", value, row["step"])

    def close(self) -> None:
        """Flush TensorBoard's file."""
        self.board.close()


def read_metrics(path: Path) -> list[Row]:
    """Read the rows of a ``metrics.csv``.

    Returns:
        The rows; none if there is no file. A last line that a kill cut short is dropped.
    """
    if not path.exists():
        return []
    rows = []
    with path.open(newline="") as file:
        for raw in csv.DictReader(file):
            if None in raw.values() or None in raw:
                continue
            numbers = {k: float(v) if v else None for k, v in raw.items() if k != "split"}
            rows.append({**numbers, "step": int(raw["step"]), "split": raw["split"]})
    return rows


class RunLog:
    """Everything that a run reports while it trains; a context manager.

    Only the first of several processes reports: the methods of the others do nothing.

    Args:
        out: The run's directory.
        step: The step at which the run starts or resumes.
        total: The number of steps.
        title: The label of the progress bar.
    """

    def __init__(self, out: Path, step: int, total: int, title: str) -> None:
        self._first = distributed.is_first()
        self._metrics = Metrics(out, step) if self._first else None
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
