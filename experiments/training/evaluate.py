"""Evaluation on held-out tasks: the metrics at each inner step, beside chance and a nearest-neighbour baseline."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap
from tqdm import tqdm

from metaattn.meta.algorithms import MetaParams
from metaattn.tasks import Batch, Episode

from ..output import write_json
from . import distributed, report
from .setup import Setup

Curves = dict[str, Tensor]  # for each metric [tasks, inner steps + 1]


def adaptation(run: Setup, meta: MetaParams, episodes: Episode, steps: int) -> Curves:
    """Adapt to each support set and measure on its query set.

    Args:
        run: The model and the learner.
        meta: The meta-parameters.
        episodes: A batch of tasks.
        steps: The number of inner steps.

    Returns:
        Each metric before, between and after the inner steps, ``[tasks, steps + 1]``.
    """

    def task(support: Batch, query: Batch) -> Curves:
        measured = [run.learner.loss(p, *query) for p in run.learner.trajectory(meta, support, steps)]
        metrics = [{"loss": loss, **others} for loss, others in measured]
        return {k: torch.stack([m[k] for m in metrics]) for k in metrics[0]}

    run.model.eval()
    try:
        with torch.no_grad():
            return vmap(task, randomness="different")(episodes.support, episodes.query)
    finally:
        run.model.train()


def held_out(
    run: Setup, meta: MetaParams, split: str, tasks: int, chunk_size: int, steps: int, *, progress: bool = False
) -> tuple[Curves, Tensor]:
    """Evaluate the first tasks of a split, divided over all processes.

    Args:
        run: The model and the learner.
        meta: The meta-parameters.
        split: ``"train"``, ``"validation"`` or ``"test"``.
        tasks: The number of tasks.
        chunk_size: How many tasks are evaluated at once.
        steps: The number of inner steps.
        progress: Show a progress bar.

    Returns:
        The curves of :func:`adaptation`, and the metric of the nearest-neighbour baseline ``[tasks]``; both in float64
        on the CPU.
    """
    own_starts = range(0, tasks, chunk_size)[distributed.rank() :: distributed.size()]
    hidden = not (progress and distributed.is_first())
    parts = []
    for start in tqdm(own_starts, desc=f"{split} tasks", disable=hidden, leave=False):
        episodes = run.tasks(split, start, min(chunk_size, tasks - start))
        curves = {k: v.double().cpu() for k, v in adaptation(run, meta, episodes, steps).items()}
        parts.append((start, curves, nearest_neighbour(episodes, run.chance is not None).double().cpu()))
    _, all_curves, baseline = zip(*sorted(distributed.gather(parts), key=lambda part: part[0]), strict=True)
    return {k: torch.cat([c[k] for c in all_curves]) for k in all_curves[0]}, torch.cat(baseline)


def nearest_neighbour(episodes: Episode, classify: bool) -> Tensor:
    """Predict for each query the target of the support sample with the nearest input.

    Args:
        episodes: A batch of tasks.
        classify: Return the accuracy; otherwise the mean squared error.

    Returns:
        The metric of each task, ``[tasks]``.
    """
    support, query = episodes
    distances = torch.cdist(query.inputs.flatten(2).float(), support.inputs.flatten(2).float())
    nearest = distances.argmin(-1)
    if classify:
        return (support.targets.gather(1, nearest) == query.targets).float().mean(1)
    predicted = support.targets.gather(1, nearest.unsqueeze(-1).expand_as(query.targets))
    return (predicted - query.targets).square().flatten(1).mean(1)


def interval(values: Tensor) -> tuple[float, float]:
    """Return the mean over tasks, and half the width of its 95% confidence interval."""
    n = len(values)
    return values.mean().item(), 1.96 * values.std().item() / math.sqrt(n) if n > 1 else math.nan


def test(run: Setup, meta: MetaParams, out: Path, step: int, **facts: Any) -> dict[str, Any]:
    """Evaluate meta-parameters on held-out test tasks.

    Args:
        run: The model and the learner.
        meta: The meta-parameters.
        out: The directory to which the first process writes the plots and ``summary.json``.
        step: The training step of ``meta``.
        **facts: Further entries of the summary.

    Returns:
        The summary.
    """
    c = run.config
    steps = max(c.algorithm.steps, 10) if c.test.steps is None else c.test.steps
    steps = steps if c.algorithm.steps else 0  # prototypical networks adapt without inner steps
    curves, baseline = held_out(run, meta, "test", c.test.tasks, c.test.chunk_size, steps, progress=True)
    values, trained = curves[run.metric], min(c.algorithm.steps, steps)

    def entry(of_tasks: Tensor) -> dict[str, float]:
        return dict(zip(("mean", "ci95"), interval(of_tasks), strict=True))

    summary: dict[str, Any] = {
        "step": step,
        "metric": run.metric,
        "tasks": c.test.tasks,
        "inner_steps": trained,
        "before": entry(values[:, 0]),
        "after": entry(values[:, trained]),
        "nearest_neighbour": entry(baseline),
        "chance": run.chance,
        "at_each_step": [interval(values[:, s])[0] for s in range(steps + 1)],
        **facts,
    }
    if distributed.is_first():
        neighbour = summary["nearest_neighbour"]["mean"]
        if steps:
            report.adaptation(out / "adaptation.png", values, run.metric, trained, neighbour, run.chance)
        report.episode(out / "episode.png", run, meta, run.tasks("test", 0, 1))
        write_json(out / "summary.json", summary)
    return summary


def table(summary: dict[str, Any], out: Path) -> str:
    """Format the summary of :func:`test` for the terminal."""
    percent = summary["metric"] == "accuracy"

    def line(name: str, entry: dict[str, float]) -> str:
        factor, unit = (100, "%") if percent else (1, "")
        mean, ci = factor * entry["mean"], factor * entry["ci95"]
        return f"  {name:<31} {mean:7.2f}{unit} ± {ci:.2f}"

    steps = summary["inner_steps"]
    lines = [
        f"{summary['metric']} on {summary['tasks']} held-out test tasks, mean and 95% interval, step {summary['step']}"
    ]
    if steps:
        lines.append(line(f"after {steps} inner step{'s' * (steps != 1)}", summary["after"]))
        lines.append(line("before adaptation", summary["before"]))
    else:
        lines.append(line("from prototypes, no inner steps", summary["after"]))
    lines.append(line("nearest neighbour", summary["nearest_neighbour"]))
    if summary["chance"] is not None:
        lines.append(f"  {'chance':<31} {100 * summary['chance']:7.2f}%")
    return "\n".join([*lines, f"  written to {out}"])
