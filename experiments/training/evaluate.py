"""Held-out tasks: what adaptation gains at each inner step, beside guessing and nearest neighbours."""

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

from . import checkpoint, distributed, report
from .setup import Setup

Curves = dict[str, Tensor]  # of each metric, [tasks, inner steps + 1]


def adaptation(run: Setup, meta: MetaParams, episodes: Episode, steps: int) -> Curves:
    """Every metric on the query sets before, between and after ``steps`` inner steps."""

    def task(support: Batch, query: Batch) -> Curves:
        passed = [run.learner.loss(p, *query) for p in run.learner.trajectory(meta, support, steps)]
        metrics = [{"loss": loss, **rest} for loss, rest in passed]
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
    """:func:`adaptation` on the first ``tasks`` tasks of a split, and the nearest-neighbour baseline on the same."""
    mine = range(0, tasks, chunk_size)[distributed.rank() :: distributed.size()]
    parts = []
    for start in tqdm(mine, desc=f"{split} tasks", disable=not (progress and distributed.is_first()), leave=False):
        episodes = run.tasks(split, start, min(chunk_size, tasks - start))
        curves = {k: v.double().cpu() for k, v in adaptation(run, meta, episodes, steps).items()}
        parts.append((start, curves, nearest_neighbour(episodes, run.chance is not None).double().cpu()))
    _, all_curves, baseline = zip(*sorted(distributed.gather(parts), key=lambda part: part[0]), strict=True)
    return {k: torch.cat([c[k] for c in all_curves]) for k in all_curves[0]}, torch.cat(baseline)


def nearest_neighbour(episodes: Episode, classify: bool) -> Tensor:
    """Each query takes the target of the support sample with the nearest input: accuracy, or squared error."""
    (support, known), (query, wanted) = episodes
    nearest = torch.cdist(query.flatten(2).float(), support.flatten(2).float()).argmin(-1)
    if classify:
        return (known.gather(1, nearest) == wanted).float().mean(1)
    guess = known.gather(1, nearest.unsqueeze(-1).expand_as(wanted))
    return (guess - wanted).square().flatten(1).mean(1)


def interval(values: Tensor) -> tuple[float, float]:
    """Mean over tasks, and half the width of its 95% confidence interval."""
    n = len(values)
    return values.mean().item(), 1.96 * values.std().item() / math.sqrt(n) if n > 1 else math.nan


def test(run: Setup, meta: MetaParams, out: Path, step: int) -> dict[str, Any]:
    """Evaluate on held-out test tasks; the first rank writes the plots and ``summary.json``; the summary."""
    c = run.config
    steps = max(c.algorithm.steps, 10) if c.test.steps is None else c.test.steps
    steps = steps if c.algorithm.steps else 0  # where prototypes are all the adaptation that there is
    curves, baseline = held_out(run, meta, "test", c.test.tasks, c.test.chunk_size, steps, progress=True)
    trained = min(c.algorithm.steps, steps)
    before, after = interval(curves[run.metric][:, 0]), interval(curves[run.metric][:, trained])
    neighbour = interval(baseline)
    summary: dict[str, Any] = {
        "step": step,
        "metric": run.metric,
        "tasks": c.test.tasks,
        "inner_steps": trained,
        "before": {"mean": before[0], "ci95": before[1]},
        "after": {"mean": after[0], "ci95": after[1]},
        "nearest_neighbour": {"mean": neighbour[0], "ci95": neighbour[1]},
        "chance": run.chance,
        "at_each_step": [interval(curves[run.metric][:, s])[0] for s in range(steps + 1)],
    }
    if not distributed.is_first():
        return summary
    if steps:
        report.adaptation(out / "adaptation.png", curves[run.metric], run.metric, trained, neighbour[0], run.chance)
    one = run.tasks("test", 0, 1)
    report.episode(out / "episode.png", run, meta, one)
    report.write_json(out / "summary.json", summary)
    return summary


def table(summary: dict[str, Any], out: Path) -> str:
    """The summary for people."""
    percent = summary["metric"] == "accuracy"

    def show(name: str, entry: dict[str, float]) -> str:
        factor, unit = (100, "%") if percent else (1, "")
        mean, ci = factor * entry["mean"], factor * entry["ci95"]
        return f"  {name:<31} {mean:7.2f}{unit} ± {ci:.2f}"

    steps = summary["inner_steps"]
    lines = [
        f"{summary['metric']} on {summary['tasks']} held-out test tasks, mean and 95% interval, step {summary['step']}"
    ]
    if steps:
        lines.append(show(f"after {steps} inner step{'s' * (steps != 1)}", summary["after"]))
        lines.append(show("before adaptation", summary["before"]))
    else:
        lines.append(show("from prototypes, no inner steps", summary["after"]))
    lines.append(show("nearest neighbour", summary["nearest_neighbour"]))
    if summary["chance"] is not None:
        lines.append(f"  {'chance':<31} {100 * summary['chance']:7.2f}%")
    return "\n".join([*lines, f"  written to {out}"])


def run_evaluation(run: Setup, path: Path, out: Path) -> dict[str, Any]:
    """Evaluate the checkpoint at ``path``."""
    content = checkpoint.load(path, meta=dict, step=int)
    meta = restore_meta(run, content["meta"])
    return test(run, meta, out, content["step"])


def restore_meta(run: Setup, saved: MetaParams) -> MetaParams:
    """Meta-parameters from a checkpoint, on the run's device."""
    return {g: {k: t.to(run.device).requires_grad_() for k, t in group.items()} for g, group in saved.items()}
