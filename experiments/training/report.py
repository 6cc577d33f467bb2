"""Plots of a run: the learning curve, the adaptation curve and one episode."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from matplotlib import pyplot as plt
from torch import Tensor
from torch.func import functional_call

from metaattn.meta.algorithms import MetaParams
from metaattn.tasks import Episode

from ..output import BLUE, GREEN, GREY, RED, integer_ticks, legend_below, save_figure
from .metrics import Row
from .setup import Setup


def _numpy(t: Tensor) -> Any:
    return t.detach().float().cpu().numpy()


def learning(path: Path, rows: list[Row], metric: str, chance: float | None, *, adapts_to_query: bool = False) -> None:
    """Plot loss and metric against outer steps, before and after adaptation, in training and validation.

    Args:
        path: The image to write.
        rows: The rows of ``metrics.csv``.
        metric: ``"loss"`` or ``"accuracy"``.
        chance: The accuracy of guessing.
        adapts_to_query: Say in the legend that in training a task adapts to its query set too, as in Reptile: its
            training curve does not show generalization.
    """
    names = ["loss"] if metric == "loss" else ["loss", "accuracy"]
    figure, axes = plt.subplots(1, len(names), figsize=(6.5 * len(names), 4.8), squeeze=False)
    for axis, name in zip(axes[0], names, strict=True):
        for split, width in (("train", 1.0), ("validation", 2.0)):
            of_split = [r for r in rows if r["split"] == split]
            x = [r["step"] for r in of_split]
            marker = "o" if len(x) < 40 else None  # a single row has no line
            for when, colour in (("before", GREY), ("after", BLUE if split == "train" else RED)):
                y = [r[f"{name}_{when}"] for r in of_split]
                style = ":" if when == "before" else "-"
                label = f"{split}, {when} adaptation"
                if adapts_to_query and (split, when) == ("train", "after"):
                    label = "train, adapted to these samples too"
                axis.plot(x, y, style, color=colour, lw=width, marker=marker, ms=3, label=label, alpha=0.9)
        if name == "accuracy" and chance is not None:
            axis.axhline(chance, color="black", lw=0.8, ls="--", label="chance")
        axis.set(xlabel="outer step", ylabel=name, title=f"{name} on the query sets")
        axis.grid(alpha=0.3)
        integer_ticks(axis)
        legend_below(axis)
    save_figure(figure, path)


def adaptation(path: Path, values: Tensor, metric: str, trained: int, neighbour: float, chance: float | None) -> None:
    """Plot the metric at each inner step on held-out tasks, with its 95% interval.

    Beyond the trained number of steps the inner loop may diverge: the axis fits the trained steps, and markers at its
    top show where the mean is larger.

    Args:
        path: The image to write.
        values: The metric, ``[tasks, steps + 1]``.
        metric: Its name.
        trained: The number of inner steps in training.
        neighbour: The metric of the nearest-neighbour baseline.
        chance: The accuracy of guessing.
    """
    figure, axis = plt.subplots(figsize=(6.5, 4.8))
    steps, mean = range(values.shape[1]), values.mean(0).numpy()
    half = 1.96 * (values.std(0) / len(values) ** 0.5).numpy()
    visible = (neighbour, chance, *mean[: trained + 1], *(mean + half)[: trained + 1])
    finite = [y for y in visible if y is not None and math.isfinite(y)]
    top = 2 * max(finite) - min(finite)  # twice the range of the visible values
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
    integer_ticks(axis)
    legend_below(axis)
    save_figure(figure, path)


def episode(path: Path, run: Setup, meta: MetaParams, one: Episode) -> None:
    """Plot one held-out task: its support set, and the predictions before and after adaptation."""
    support, query = ([t[0] for t in part] for part in one)
    run.model.eval()
    before, *_, after = [*run.learner.trajectory(meta, support, 0), *run.learner.trajectory(meta, support)]
    params = [{k: p.detach() for k, p in tensors.items()} for tensors in (before, after)]
    if run.chance is None:
        grid = torch.linspace(-5, 5, 200, device=run.device, dtype=run.dtype)[:, None]
        curves = [functional_call(run.model, p, (grid,)) for p in params]
        _regression(path, support, query, grid, curves)
    else:
        predicted = functional_call(run.model, params[1], (query[0],)).argmax(-1)
        _classification(path, support, query, predicted, run.config.task.way)
    run.model.train()


def _regression(path: Path, support: list[Tensor], query: list[Tensor], grid: Tensor, curves: list[Tensor]) -> None:
    figure, axis = plt.subplots(figsize=(6.5, 4.2))
    axis.plot(_numpy(grid), _numpy(curves[0]), ":", color=GREY, label="before adaptation")
    axis.plot(_numpy(grid), _numpy(curves[1]), "-", color=BLUE, label="after adaptation")
    axis.plot(*map(_numpy, query), "o", color=GREEN, ms=4, alpha=0.6, label="query")
    axis.plot(*map(_numpy, support), "^", color=RED, ms=8, label="support")
    axis.set(xlabel="x", ylabel="y", title="One held-out task")
    axis.grid(alpha=0.3)
    legend_below(axis, 4)
    save_figure(figure, path)


def _classification(path: Path, support: list[Tensor], query: list[Tensor], predicted: Tensor, way: int) -> None:
    """Plot a row for each class: support samples, then queries in a green (correct) or red (wrong) frame."""
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
            label = None if from_support else int(predicted[index])
            colour = BLUE if label is None else GREEN if label == row else RED
            for spine in axis.spines.values():
                spine.set(color=colour, linewidth=2.5)
            if label is not None and label != row:
                axis.set_xlabel(f"predicted {label}", fontsize=7, labelpad=1, color=RED)
        axes[row, 0].set_ylabel(f"class {row}", fontsize=8)
    axes[0, 0].set_title("support", fontsize=9, color=BLUE)
    axes[0, shots_shown].set_title("query", fontsize=9)
    accuracy = (predicted == query[1]).float().mean().item()
    title = f"One held-out task after adaptation: {accuracy:.0%} of the queries correct"
    figure.suptitle(title + f"\n({shown} of {way} classes shown)" * (shown < way), fontsize=10)
    save_figure(figure, path)
