"""How curved is the loss that a task learns by? Spectra of its Hessian before, between and after the inner steps.

Held-out tasks of a meta-trained Transformer; the Hessian of each one's loss on its support set, in the parameters that
the task adapts, in float64. Its products are curvlinops', forward over reverse through the attention. All eigenvalues
of a small model, a Lanczos quadrature of a large one. Prints a table, writes JSON and a plot; exits 1 if the products
are not those of a symmetric matrix.

A minute on a CPU, most of it the training of a small model on sinusoids. For a run of train_maml.py:
  python -m experiments.curvature checkpoint=outputs/glyphs/DATE lanczos=60 tasks=2

It needs curvlinops, in a clone of the repository:
  pip install -r requirements.txt -c requirements-integrations.txt -e ".[curvlinops]"

Source: Lanczos quadrature of a Hessian's spectrum: Papyan 2020 (JMLR 21, 20-933), algorithm 2; a step of gradient
descent at the rate a is stable up to the eigenvalue 2/a: Cohen et al. 2021 (arXiv 2103.00065), section 2.
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
from ..training import checkpoint, evaluate, loop, report
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
from ..training.setup import Setup, setup
from ._settings import fail, parse, plain

MOST = 4000  # parameters for all eigenvalues: a matrix of 128 MB, and its eigenvalues in half a minute
COLUMNS = 256  # of the Hessian at once: memory
ASYMMETRY = 1e-9  # allowed, relative, in float64: rounding is 1e-15 or so


@dataclass
class Settings:
    """Which model and tasks. Without ``lanczos``, the number of its vectors, all eigenvalues are computed."""

    checkpoint: str | None = None
    tasks: int = 4
    lanczos: int | None = None
    meta_steps: int = 300
    device: str = "auto"
    threads: int = 1  # a model so small is no faster on more
    seed: int = 0
    out: str = "outputs/curvature"


LIMITS: dict[str, Limit] = {
    **dict.fromkeys(("tasks", "meta_steps", "threads"), ONE),
    "lanczos": (lambda x: x is None or x >= 2, "at least 2, or null"),
}


class Spectrum(NamedTuple):
    """Eigenvalues and how many each stands for, ``[n]`` both: one, or its share in a Lanczos quadrature."""

    values: Tensor
    counts: Tensor


class Point(NamedTuple):
    """A task after a number of inner steps: its losses, and the spectrum of its Hessian."""

    support_loss: float
    query_loss: float
    spectrum: Spectrum


def train_small(s: Settings, out: Path) -> Path:
    """Meta-train a small model on sinusoids, at one fixed inner learning rate; the directory of the run."""
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
    loop.train(setup(config), out, None)
    return out


class Study:
    """A meta-trained model in float64, and the Hessians of its tasks.

    Args:
        path: The checkpoint.
        s: The settings.

    Raises:
        UserError: No such checkpoint, an algorithm whose tasks adapt more than the model's parameters, or too many of
            these for all eigenvalues.
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
        here = replace(config, device=s.device, threads=s.threads, seed=s.seed, precision=Precision.float64)
        self.run: Setup = setup(here)
        self.run.model.eval()
        meta = evaluate.restore_meta(self.run, content["meta"])
        self.meta = {g: {k: t.detach().double() for k, t in group.items()} for g, group in meta.items()}
        self.parameters: dict[str, Tensor] = dict(self.run.model.named_parameters())
        self.adapted = [self.parameters[k] for k in self.run.learner.adapted(self.parameters)]
        self.size, self.lanczos = sum(p.numel() for p in self.adapted), s.lanczos
        if self.lanczos is None and self.size > MOST:
            raise UserError(
                f"a task adapts {self.size:,} parameters, too many for all eigenvalues (at most {MOST:,}); give the "
                "number of Lanczos vectors, such as lanczos=60"
            )
        self.asymmetry = 0.0

    def hessian(self, params: dict[str, Tensor], batch: Sequence[Tensor]) -> Any:
        """The Hessian of the loss on a batch at ``params``, a linear operator; good until the next one is made."""
        from curvlinops import HessianLinearOperator

        with torch.no_grad():
            for k, p in self.parameters.items():
                p.copy_(params[k])
        loss = nn.MSELoss() if self.run.chance is None else nn.CrossEntropyLoss()
        # In evaluation nothing is drawn, so that there is nothing to check at the price of several products.
        return HessianLinearOperator(self.run.model, loss, self.adapted, [tuple(batch)], check_deterministic=False)

    def spectrum(self, hessian: Any) -> Spectrum:
        """All eigenvalues, or a quadrature of them; notes how far the products are from symmetry."""
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
        """Of each held-out task, before, between and after the inner steps: ``[tasks][steps + 1]``."""
        out, steps = [], self.run.config.algorithm.steps
        with tqdm(total=tasks * (steps + 1), desc="spectra", leave=False) as bar:
            for i in range(tasks):
                support, query = ([t[0] for t in part] for part in self.run.tasks("test", i, 1))
                passed = []
                for params in self.run.learner.trajectory(self.meta, support):
                    params = {k: p.detach() for k, p in params.items()}
                    losses = [self.run.learner.plain_loss(params, *batch).item() for batch in (support, query)]
                    passed.append(Point(losses[0], losses[1], self.spectrum(self.hessian(params, support))))
                    bar.update()
                out.append(passed)
        return out


def extremes(points: list[list[Point]]) -> tuple[Tensor, Tensor]:
    """The smallest and the largest eigenvalue of each task at each step, ``[tasks, steps + 1]``."""
    smallest, largest = (
        [[f(p.spectrum.values).item() for p in task] for task in points] for f in (torch.min, torch.max)
    )
    return torch.tensor(smallest), torch.tensor(largest)


def stable_up_to(config: Config) -> float | None:
    """The largest eigenvalue at which a step of gradient descent is stable, if it has one fixed rate."""
    a = config.algorithm
    return 2 / a.learning_rate if a.optimizer is InnerName.sgd and a.learns is Learns.nothing else None


def plot(path: Path, points: list[list[Point]], limit: float | None) -> None:
    """How many eigenvalues there are of each size, before and after; the extreme ones against inner steps."""
    figure, axes = plt.subplots(1, 2, figsize=(12, 4.8))
    smallest, largest = extremes(points)
    low, high = smallest[:, [0, -1]].min().item(), largest[:, [0, -1]].max().item()
    edges = torch.linspace(low, high, 81).tolist()
    filled = {"color": report.GREY, "alpha": 0.5, "label": "before adaptation"}
    line = {"color": report.BLUE, "histtype": "step", "lw": 1.5, "label": "after adaptation"}
    for step, style in ((0, filled), (-1, line)):
        spectra = [task[step].spectrum for task in points]
        values = torch.cat([x.values for x in spectra]).clamp(low, high)
        counts = torch.cat([x.counts for x in spectra]) / len(spectra)
        axes[0].hist(values.numpy(), edges, weights=counts.numpy(), log=True, **style)
    axes[0].set(xlabel="eigenvalue", ylabel="eigenvalues of a task, mean", title="Hessian of the support loss")
    x = range(largest.shape[1])
    for name, values, colour in (("largest", largest, report.RED), ("smallest", smallest, report.GREEN)):
        axes[1].plot(x, values.mean(0).numpy(), "-o", ms=4, color=colour, label=f"{name}, mean of {len(points)} tasks")
        bounds = (values.min(0).values.numpy(), values.max(0).values.numpy())
        axes[1].fill_between(x, *bounds, color=colour, alpha=0.2, lw=0, label="its range")
    if limit is not None:
        axes[1].axhline(limit, color="black", lw=0.8, ls="--", label="2 / inner learning rate")
    axes[1].set(xlabel="inner step", ylabel="eigenvalue", title="Extreme eigenvalues")
    report._steps(axes[1])
    for axis in axes:
        axis.grid(alpha=0.3)
        report._legend_below(axis, 3)
    report._save(figure, path)


def main() -> None:
    """Train or load, compute, show and judge."""
    s = parse(Settings, "experiments.curvature")
    out = Path(s.out)
    try:
        import curvlinops  # noqa: F401
    except ImportError:
        fail(
            "curvlinops is needed; in a clone of the repository: "
            'pip install -r requirements.txt -c requirements-integrations.txt -e ".[curvlinops]"'
        )
    try:
        check_limits(s, LIMITS)
        source = train_small(s, out / "run") if s.checkpoint is None else Path(s.checkpoint)
        study = Study(checkpoint.find(source, "best.pt"), s)
        points = study.points(s.tasks)
    except (UserError, NotImplementedError, ValueError) as error:
        fail(str(error).splitlines()[0])
    except loop.StoppedBySignal as stop:
        sys.exit(stop.code)
    smallest, largest = extremes(points)
    limit = stable_up_to(study.run.config)
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
    report.write_json(out / "curvature.json", content)
    plot(out / "curvature.png", points, limit)
    print(f"Hessian of the support loss in {study.size:,} parameters, means of {s.tasks} held-out tasks")
    print(f"  {'inner step':<12} {'support loss':>12} {'query loss':>12} {'smallest':>12} {'largest':>12}")
    for i, (support, query) in enumerate(losses.tolist()):
        print(f"  {i:<12} {support:12.4f} {query:12.4f} {smallest[:, i].mean():12.3f} {largest[:, i].mean():12.3f}")
    if limit is not None:
        print(f"a step is stable up to an eigenvalue of {limit:.3f}")
    print(f"written to {out}")
    if not study.asymmetry < ASYMMETRY or not math.isfinite(largest.sum().item()):
        print(f"the products are not those of a symmetric matrix: {study.asymmetry:.1e}", file=sys.stderr)
        sys.exit(1)


def _lists(spectrum: Spectrum) -> dict[str, list[float]]:
    """As JSON has them; eigenvalues that stand for one each need no counts."""
    lists = {k: t.tolist() for k, t in spectrum._asdict().items()}
    return lists if any(c != 1 for c in lists["counts"]) else {"values": lists["values"]}


if __name__ == "__main__":
    main()
