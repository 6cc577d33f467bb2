"""Compute spectra of the inner loss's Hessian before, between and after the inner steps.

For held-out tasks of a meta-trained Transformer: the Hessian of the loss on the support set in the parameters that the
task adapts, in float64. curvlinops computes its products, forward over reverse through the attention. A small model
gets all eigenvalues, a large one a Lanczos quadrature. Prints a table, writes JSON and a plot; exits with code 1 if the
products are not those of a symmetric matrix.

It takes a minute on a CPU, most of it to train a small model on sinusoids. For a run of train_maml.py:
  python -m experiments.curvature checkpoint=outputs/glyphs/DATE lanczos=60 tasks=2

It needs curvlinops; in a clone of the repository:
  pip install -r requirements.txt -c requirements-integrations.txt -e ".[curvlinops]"

Source: Papyan 2020 (JMLR 21, 20-933), algorithm 2, for the Lanczos quadrature of a Hessian's spectrum; Cohen et al.
2021 (arXiv 2103.00065), section 2: gradient descent at the learning rate a is stable up to the eigenvalue 2/a.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib import pyplot as plt
from omegaconf import OmegaConf
from torch import Tensor, nn
from tqdm import tqdm

from ..errors import UserError
from ..output import BLUE, GREEN, GREY, RED, integer_ticks, legend_below, save_figure, write_json
from ..training import checkpoint, loop, state
from ..training.config import (
    ONE,
    AlgorithmConfig,
    Config,
    InnerName,
    Kind,
    Learns,
    Limit,
    ModelConfig,
    Precision,
    TaskConfig,
    TaskName,
    TestConfig,
    TrainConfig,
    check_limits,
    checked,
)
from ..training.interrupts import StoppedBySignal
from ..training.setup import Setup, setup
from ._settings import fail, parse, plain

MAX_PARAMETERS = 4000  # for all eigenvalues: a matrix of 128 MB, and half a minute for its eigenvalues
COLUMNS = 256  # columns of the Hessian that are computed at once, which bounds the memory
MAX_ASYMMETRY = 1e-9  # relative, in float64: rounding gives about 1e-15


@dataclass
class Settings:
    """The model and the tasks. ``lanczos``: the number of Lanczos vectors; without it, all eigenvalues are computed."""

    checkpoint: str | None = None
    tasks: int = 4
    lanczos: int | None = None
    meta_steps: int = 300
    device: str = "auto"
    threads: int = 1  # so small a model is not faster on more
    seed: int = 0
    out: str = "outputs/curvature"


LIMITS: dict[str, Limit] = {
    **dict.fromkeys(("tasks", "meta_steps", "threads"), ONE),
    "lanczos": (lambda x: x is None or x >= 2, "at least 2, or null"),
}


class Spectrum(NamedTuple):
    """Eigenvalues and the number that each represents, ``[n]`` both: one, or its weight in a Lanczos quadrature."""

    values: Tensor
    counts: Tensor


class Point(NamedTuple):
    """The losses of a task and the spectrum of its Hessian after some number of inner steps."""

    support_loss: float
    query_loss: float
    spectrum: Spectrum


def train_small(s: Settings, out: Path) -> Path:
    """Meta-train a small model on sinusoids with one fixed inner learning rate.

    Args:
        s: The settings.
        out: The directory of the run.

    Returns:
        ``out``.
    """
    config = Config(
        TaskConfig(TaskName.sinusoid, shot=10, queries=10),
        ModelConfig(dim=8, depth=1, heads=2),
        AlgorithmConfig("maml", steps=5, learning_rate=0.05),
        TrainConfig(steps=s.meta_steps, learning_rate=5e-3, validate_every=s.meta_steps),
        TestConfig(tasks=100),
        device=s.device,
        threads=s.threads,
        seed=s.seed,
    )
    out.mkdir(parents=True, exist_ok=True)
    loop.train(setup(config), out)
    return out


class Study:
    """A meta-trained model in float64, and the Hessians of its tasks.

    Args:
        path: The checkpoint.
        s: The settings.

    Raises:
        UserError: The checkpoint does not exist, the tasks of its algorithm adapt more than the model's parameters, or
            these are too many to compute all eigenvalues.
    """

    def __init__(self, path: Path, s: Settings) -> None:
        content = checkpoint.load(path, config=dict, meta=dict)
        stored = OmegaConf.merge(OmegaConf.structured(Config), content["config"])
        config = checked(stored)  # type: ignore[arg-type]
        if config.algorithm.kind in (Kind.cavia, Kind.prototypical):
            raise UserError(
                f"tasks of algorithm={config.algorithm.name} adapt more than the model's parameters; give a checkpoint "
                "of maml, anil, boil, meta_sgd, maml_plus_plus, imaml or reptile"
            )
        config = replace(config, device=s.device, threads=s.threads, seed=s.seed, precision=Precision.float64)
        self.run: Setup = setup(config)
        self.run.model.eval()
        saved = {g: {k: t.double() for k, t in group.items()} for g, group in content["meta"].items()}
        meta = state.restore_meta(self.run, saved)
        self.meta = {g: {k: t.detach() for k, t in group.items()} for g, group in meta.items()}
        self.parameters: dict[str, Tensor] = dict(self.run.model.named_parameters())
        self.adapted = [self.parameters[k] for k in self.run.learner.adapted(self.parameters)]
        self.size, self.lanczos = sum(p.numel() for p in self.adapted), s.lanczos
        if self.lanczos is None and self.size > MAX_PARAMETERS:
            raise UserError(
                f"a task adapts {self.size:,} parameters, too many for all eigenvalues (at most {MAX_PARAMETERS:,}); "
                "give the number of Lanczos vectors, such as lanczos=60"
            )
        self.asymmetry = 0.0

    def hessian(self, params: dict[str, Tensor], batch: Sequence[Tensor]) -> Any:
        """Return the Hessian of the loss on a batch as a linear operator.

        Args:
            params: The point at which it is taken. They are copied into the model, so that the operator is valid until
                the next call.
            batch: Inputs and targets.
        """
        from curvlinops import HessianLinearOperator

        with torch.no_grad():
            for k, p in self.parameters.items():
                p.copy_(params[k])
        loss = nn.MSELoss() if self.run.chance is None else nn.CrossEntropyLoss()
        # The model is in evaluation mode and deterministic: a check of that would cost several products.
        return HessianLinearOperator(self.run.model, loss, self.adapted, [tuple(batch)], check_deterministic=False)

    def spectrum(self, hessian: Any) -> Spectrum:
        """Return all eigenvalues, or a Lanczos quadrature; update ``asymmetry`` with that of two random products."""
        u, v = torch.randn(2, self.size, dtype=hessian.dtype, device=hessian.device)
        products = hessian @ torch.stack([u, v], 1)
        error = (v @ products[:, 0] - u @ products[:, 1]).abs() / (v.norm() * products[:, 0].norm())
        self.asymmetry = max(self.asymmetry, error.item())
        if self.lanczos is not None:
            from curvlinops.papyan2020traces.spectrum import fast_lanczos

            values, vectors = fast_lanczos(hessian, min(self.lanczos, self.size))
            return Spectrum(values.cpu(), self.size * vectors[0].square().cpu())
        columns = torch.eye(self.size, dtype=hessian.dtype, device=hessian.device).split(COLUMNS, 1)
        values = torch.linalg.eigvalsh(torch.cat([hessian @ part for part in columns], 1)).cpu()
        return Spectrum(values, torch.ones_like(values))

    def points(self, tasks: int) -> list[list[Point]]:
        """Return the points of each held-out task before, between and after the inner steps: ``[task][step]``."""
        out, steps = [], self.run.config.algorithm.steps
        with tqdm(total=tasks * (steps + 1), desc="spectra", leave=False) as bar:
            for i in range(tasks):
                support, query = ([t[0] for t in part] for part in self.run.tasks("test", i, 1))
                of_task = []
                for params in self.run.learner.trajectory(self.meta, support):
                    params = {k: p.detach() for k, p in params.items()}
                    losses = [self.run.learner.plain_loss(params, *batch).item() for batch in (support, query)]
                    of_task.append(Point(losses[0], losses[1], self.spectrum(self.hessian(params, support))))
                    bar.update()
                out.append(of_task)
        return out


def extremes(points: list[list[Point]]) -> tuple[Tensor, Tensor]:
    """Return the smallest and the largest eigenvalue of each task at each step, ``[tasks, steps + 1]`` both."""
    smallest, largest = (
        [[f(p.spectrum.values).item() for p in task] for task in points] for f in (torch.min, torch.max)
    )
    return torch.tensor(smallest), torch.tensor(largest)


def stability_limit(config: Config) -> float | None:
    """Return the largest eigenvalue at which gradient descent is stable; ``None`` without one fixed learning rate."""
    a = config.algorithm
    return 2 / a.learning_rate if a.optimizer is InnerName.sgd and a.learns is Learns.nothing else None


def plot(path: Path, points: list[list[Point]], limit: float | None) -> None:
    """Plot a histogram of the eigenvalues before and after adaptation, and the extreme ones against inner steps."""
    figure, axes = plt.subplots(1, 2, figsize=(12, 4.8))
    smallest, largest = extremes(points)
    low, high = smallest[:, [0, -1]].min().item(), largest[:, [0, -1]].max().item()
    edges = torch.linspace(low, high, 81).tolist()
    filled = {"color": GREY, "alpha": 0.5, "label": "before adaptation"}
    line = {"color": BLUE, "histtype": "step", "lw": 1.5, "label": "after adaptation"}
    for step, style in ((0, filled), (-1, line)):
        spectra = [task[step].spectrum for task in points]
        values = torch.cat([x.values for x in spectra]).clamp(low, high)
        counts = torch.cat([x.counts for x in spectra]) / len(spectra)
        axes[0].hist(values.numpy(), edges, weights=counts.numpy(), log=True, **style)
    axes[0].set(xlabel="eigenvalue", ylabel="eigenvalues of a task, mean", title="Hessian of the support loss")
    x = range(largest.shape[1])
    for name, values, colour in (("largest", largest, RED), ("smallest", smallest, GREEN)):
        axes[1].plot(x, values.mean(0).numpy(), "-o", ms=4, color=colour, label=f"{name}, mean of {len(points)} tasks")
        bounds = (values.min(0).values.numpy(), values.max(0).values.numpy())
        axes[1].fill_between(x, *bounds, color=colour, alpha=0.2, lw=0, label="its range")
    if limit is not None:
        axes[1].axhline(limit, color="black", lw=0.8, ls="--", label="2 / inner learning rate")
    axes[1].set(xlabel="inner step", ylabel="eigenvalue", title="Extreme eigenvalues")
    integer_ticks(axes[1])
    for axis in axes:
        axis.grid(alpha=0.3)
        legend_below(axis, 3)
    save_figure(figure, path)


def main() -> None:
    """Run the study; exit with code 1 if the Hessian products are not symmetric."""
    s = parse(Settings, "experiments.curvature")
    out = Path(s.out)
    try:
        import curvlinops  # noqa: F401
    except ImportError:
        fail(
            "this study needs curvlinops; in a clone of the repository: "
            'pip install -r requirements.txt -c requirements-integrations.txt -e ".[curvlinops]"'
        )
    try:
        check_limits(s, LIMITS)
        source = train_small(s, out / "run") if s.checkpoint is None else Path(s.checkpoint)
        study = Study(checkpoint.find(source, "best.pt"), s)
        points = study.points(s.tasks)
    except (UserError, NotImplementedError, ValueError) as error:
        fail(str(error).splitlines()[0])
    except StoppedBySignal as stop:
        sys.exit(stop.code)
    smallest, largest = extremes(points)
    limit = stability_limit(study.run.config)
    losses = torch.tensor([[[p.support_loss, p.query_loss] for p in task] for task in points]).mean(0)
    content: dict[str, Any] = {
        "settings": plain(s),
        "parameters": study.size,
        "asymmetry": study.asymmetry,
        "stable_up_to": limit,
        "tasks": [
            [{"support_loss": p.support_loss, "query_loss": p.query_loss, **_lists(p.spectrum)} for p in task]
            for task in points
        ],
    }
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "curvature.json", content)
    plot(out / "curvature.png", points, limit)
    print(f"Hessian of the support loss in {study.size:,} parameters, means of {s.tasks} held-out tasks")
    print(f"  {'inner step':<12} {'support loss':>12} {'query loss':>12} {'smallest':>12} {'largest':>12}")
    for i, (support, query) in enumerate(losses.tolist()):
        print(f"  {i:<12} {support:12.4f} {query:12.4f} {smallest[:, i].mean():12.3f} {largest[:, i].mean():12.3f}")
    if limit is not None:
        print(f"gradient descent is stable up to an eigenvalue of {limit:.3f}")
    print(f"written to {out}")
    if not study.asymmetry < MAX_ASYMMETRY or not math.isfinite(largest.sum().item()):
        print(
            f"the products are not those of a symmetric matrix: asymmetry {study.asymmetry:.1e}",
            file=sys.stderr,
        )
        sys.exit(1)


def _lists(spectrum: Spectrum) -> dict[str, list[float]]:
    """Return a spectrum as lists for JSON, without the counts if all are 1."""
    lists = {k: t.tolist() for k, t in spectrum._asdict().items()}
    return lists if any(c != 1 for c in lists["counts"]) else {"values": lists["values"]}


if __name__ == "__main__":
    main()
