"""What a run leaves to look at: metrics as CSV and TensorBoard, plots, JSON."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor
from torch.func import functional_call
from torch.utils._pytree import tree_map
from torch.utils.tensorboard import SummaryWriter

from metaattn.meta.algorithms import MetaParams
from metaattn.tasks import Episode
from metaattn.tasks.cache import replacing

from .setup import Setup

mpl.use("Agg")
from matplotlib import pyplot as plt

BLUE, RED, GREEN, GREY = "#1f77b4", "#d62728", "#2ca02c", "#7f7f7f"
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


def write_json(path: Path, content: Any) -> None:
    """Write JSON, whole or not at all; numbers that are not finite, which JSON does not have, as ``null``."""
    with replacing(path) as file:
        file.write(json.dumps(tree_map(_or_null, content), indent=2, allow_nan=False).encode())


def _or_null(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Metrics:
    """Rows of metrics in ``metrics.csv`` and in TensorBoard; going on after a resume, what came later is dropped.

    Args:
        out: The run's directory.
        step: The step that the run goes on from.
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
    """The rows of a ``metrics.csv``; none if there is no file. A last line cut short by a kill is dropped."""
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


def _numpy(t: Tensor) -> Any:
    return t.detach().float().cpu().numpy()


def _save(figure: Figure, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _legend_below(axis: Axes, columns: int = 2) -> None:
    """A legend under the axis, where it covers no data."""
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.15), ncol=columns, frameon=False, fontsize=8)


def _steps(axis: Axes) -> None:
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))


def learning(path: Path, rows: list[Row], metric: str, baseline: float | None, *, seen: bool = False) -> None:
    """Loss and metric against outer steps, before and after adaptation, in training and on held-out tasks.

    ``seen`` tells that in training a task adapts to its query set too, as Reptile's do: the curve is no held-out one.
    """
    names = ["loss"] if metric == "loss" else ["loss", "accuracy"]
    figure, axes = plt.subplots(1, len(names), figsize=(6.5 * len(names), 4.8), squeeze=False)
    for axis, name in zip(axes[0], names, strict=True):
        for split, width in (("train", 1.0), ("validation", 2.0)):
            part = [r for r in rows if r["split"] == split]
            x = [r["step"] for r in part]
            marker = "o" if len(x) < 40 else None  # of a single row there is no line
            for when, colour in (("before", GREY), ("after", BLUE if split == "train" else RED)):
                y = [r[f"{name}_{when}"] for r in part]
                style = ":" if when == "before" else "-"
                label = f"{split}, {when} adaptation"
                if seen and (split, when) == ("train", "after"):
                    label = "train, adapted to these samples too"
                axis.plot(x, y, style, color=colour, lw=width, marker=marker, ms=3, label=label, alpha=0.9)
        if name == "accuracy" and baseline is not None:
            axis.axhline(baseline, color="black", lw=0.8, ls="--", label="chance")
        axis.set(xlabel="outer step", ylabel=name, title=f"{name} on the query sets")
        axis.grid(alpha=0.3)
        _steps(axis)
        _legend_below(axis)
    _save(figure, path)


def adaptation(path: Path, values: Tensor, metric: str, trained: int, neighbour: float, chance: float | None) -> None:
    """The metric at each inner step on held-out tasks, ``values`` ``[tasks, steps + 1]``, with its 95% band.

    Past the ``trained`` number of steps the inner loop may diverge: the axis keeps near what is before, and marks where
    the mean is beyond it.
    """
    figure, axis = plt.subplots(figsize=(6.5, 4.8))
    steps, mean = range(values.shape[1]), values.mean(0).numpy()
    half = 1.96 * (values.std(0) / len(values) ** 0.5).numpy()
    kept = (neighbour, chance, *mean[: trained + 1], *(mean + half)[: trained + 1])
    finite = [y for y in kept if y is not None and math.isfinite(y)]
    top = 2 * max(finite) - min(finite)  # room for as much again
    beyond = {s: y if math.isfinite(y) else math.inf for s, y in zip(steps, mean, strict=True) if not y <= top}
    mean[list(beyond)] = math.nan
    axis.plot(steps, mean, "-o", color=BLUE, ms=4, label=f"mean of {len(values)} held-out tasks")
    axis.fill_between(steps, mean - half, mean + half, color=BLUE, alpha=0.25, lw=0, label="95% interval of the mean")
    axis.axvline(trained, color=GREEN, lw=1, ls=":", label=f"trained for {trained} step{'s' * (trained != 1)}")
    axis.axhline(neighbour, color=RED, lw=1, ls="--", label="nearest neighbour")
    if chance is not None:
        axis.axhline(chance, color="black", lw=0.8, ls="--", label="chance")
    if beyond:
        label = f"beyond the axis, up to {max(beyond.values()):.2g}"
        axis.set_ylim(top=top)
        at_top = {"transform": axis.get_xaxis_transform(), "clip_on": False}
        axis.plot(list(beyond), [1.0] * len(beyond), "^", color=RED, label=label, **at_top)
    axis.set(xlabel="inner step", ylabel=metric, title="Adaptation to a new task")
    axis.grid(alpha=0.3)
    _steps(axis)
    _legend_below(axis)
    _save(figure, path)


def episode(path: Path, run: Setup, meta: MetaParams, one: Episode) -> None:
    """One held-out task: what it was learned from, and what was predicted before and after adaptation."""
    support, query = ([t[0] for t in part] for part in one)
    run.model.eval()
    before, *_, after = [*run.learner.trajectory(meta, support, 0), *run.learner.trajectory(meta, support)]
    params = [{k: p.detach() for k, p in w.items()} for w in (before, after)]
    if run.chance is None:
        grid = torch.linspace(-5, 5, 200, device=run.device, dtype=run.dtype)[:, None]
        curves = [functional_call(run.model, p, (grid,)) for p in params]
        _regression(path, support, query, grid, curves)
    else:
        guesses = functional_call(run.model, params[1], (query[0],)).argmax(-1)
        _classification(path, support, query, guesses, run.config.task.way)
    run.model.train()


def _regression(path: Path, support: list[Tensor], query: list[Tensor], grid: Tensor, curves: list[Tensor]) -> None:
    figure, axis = plt.subplots(figsize=(6.5, 4.2))
    axis.plot(_numpy(grid), _numpy(curves[0]), ":", color=GREY, label="before adaptation")
    axis.plot(_numpy(grid), _numpy(curves[1]), "-", color=BLUE, label="after adaptation")
    axis.plot(*map(_numpy, query), "o", color=GREEN, ms=4, alpha=0.6, label="query")
    axis.plot(*map(_numpy, support), "^", color=RED, ms=8, label="support")
    axis.set(xlabel="x", ylabel="y", title="One held-out task")
    axis.grid(alpha=0.3)
    _legend_below(axis, 4)
    _save(figure, path)


def _classification(path: Path, support: list[Tensor], query: list[Tensor], guesses: Tensor, way: int) -> None:
    """A row for each class: its support samples, then its queries, framed by whether the guess is right."""
    shown = min(way, 10)
    shots, queries = len(support[0]) // way, len(query[0]) // way
    shots_shown, queries_shown = min(shots, 5), min(queries, 10)
    columns = shots_shown + queries_shown
    figure, axes = plt.subplots(shown, columns, figsize=(0.95 * columns + 0.6, 1.05 * shown + 0.9), squeeze=False)
    for row in range(shown):
        for column in range(columns):
            axis = axes[row, column]
            axis.set(xticks=[], yticks=[])
            from_support = column < shots_shown
            index = row * shots + column if from_support else row * queries + column - shots_shown
            image = (support if from_support else query)[0][index]
            axis.imshow(_numpy(image), cmap="gray_r", vmin=0, vmax=1)
            guess = None if from_support else int(guesses[index])
            colour = BLUE if guess is None else GREEN if guess == row else RED
            for spine in axis.spines.values():
                spine.set(color=colour, linewidth=2.5)
            if guess is not None and guess != row:
                axis.set_xlabel(f"guessed {guess}", fontsize=7, labelpad=1, color=RED)
        axes[row, 0].set_ylabel(f"class {row}", fontsize=8)
    axes[0, 0].set_title("support", fontsize=9, color=BLUE)
    axes[0, shots_shown].set_title("query", fontsize=9)
    right = (guesses == query[1]).float().mean().item()
    title = f"One held-out task, adapted: {right:.0%} of the queries right"
    figure.suptitle(title + f"\n({shown} of {way} classes shown)" * (shown < way), fontsize=10)
    _save(figure, path)
