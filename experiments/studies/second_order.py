"""Verify the meta-gradients of MAML on a Transformer against two oracles.

For one and several inner steps on glyph tasks: the error of a backend's meta-gradient against automatic differentiation
of dense attention in float64 and against finite differences, the asymmetry of the Hessian, and for comparison the error
of first-order MAML. Prints a table, writes JSON and a plot; exits with code 1 if an error exceeds its bound.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from matplotlib import pyplot as plt
from torch import Tensor
from torch.func import grad, jvp
from torch.nn import functional as F
from tqdm import tqdm

import metaattn
from metaattn.meta import GradientBased, first_order_maml, maml
from metaattn.meta.algorithms import MetaParams
from metaattn.tasks import Episode, glyphs, stack

from ..errors import UserError
from ..output import legend_below, save_figure, write_json
from ..training.config import Backend, Precision
from ..training.learner import network
from ..training.setup import find_device
from ._dense import dense_attention
from ._settings import fail, parse

# Largest relative errors allowed, by precision: against autodiff of dense attention in float64, of the Hessian's
# symmetry, and against finite differences of the float64 loss (whose own error is about 1e-7). There is no bound in 16
# bits: their error grows with the inner steps up to the size of the meta-gradient itself, and this study shows how fast
# (docs/guides/mixed_precision.md).
BOUNDS = {
    Precision.float64: {"dense": 1e-10, "symmetry": 1e-10, "differences": 1e-6},
    Precision.float32: {"dense": 1e-3, "symmetry": 1e-3, "differences": 1e-3},
}


@dataclass
class Settings:
    """The model, the tasks, the precision and the directory of the results."""

    backend: Backend = Backend.auto
    precision: Precision = Precision.float64
    device: str = "cpu"
    inner_steps: list[int] = field(default_factory=lambda: [1, 2, 3, 5, 8])
    tasks: int = 4
    way: int = 5
    dim: int = 32
    depth: int = 2
    learning_rate: float = 0.2
    seed: int = 0
    out: str = "outputs/second_order"


def _model(s: Settings, **attention: Any) -> metaattn.Transformer:
    torch.manual_seed(s.seed)
    model = metaattn.Transformer(
        input="patch",
        image_size=28,
        patch_size=7,
        position="learned",
        output="pooled",
        out_features=s.way,
        dim=s.dim,
        depth=s.depth,
        **attention,
    )
    torch.nn.init.normal_(model.head.weight, std=0.1)  # type: ignore[arg-type]
    return model.double()


def _task_loss(model: metaattn.Transformer, precision: Precision = Precision.float64) -> Any:
    predict = network(model, precision)

    def loss(params: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(predict(params, x), y)

    return loss


def _flat(gradient: MetaParams) -> Tensor:
    return torch.cat([g.double().cpu().flatten() for g in gradient["params"].values()])


def _gradient(learner: GradientBased, params: dict[str, Tensor], tasks: Episode) -> Tensor:
    return _flat(learner.value_and_grad(learner.init(params), tasks.support, tasks.query)[1])


def _cast(tasks: Episode, dtype: torch.dtype, device: torch.device) -> Episode:
    return Episode(*(type(b)(b.inputs.to(device, dtype), b.targets.to(device)) for b in tasks))


def _differences(learner: GradientBased, params: dict[str, Tensor], tasks: Episode, along: dict[str, Tensor]) -> float:
    """Return the slope of the mean query loss along a direction, by a five-point difference."""
    h = 1e-3 / math.sqrt(sum(t.square().sum().item() for t in along.values()))

    def at(k: int) -> float:
        moved = {n: p + k * h * along[n] for n, p in params.items()}
        with torch.no_grad():
            return learner.losses({"params": moved}, tasks.support, tasks.query).mean().item()

    return (at(-2) - 8 * at(-1) + 8 * at(1) - at(2)) / (12 * h)


def _asymmetry(loss: Any, params: dict[str, Tensor], tasks: Episode) -> float:
    """Return ``|u·Hv - v·Hu|`` relative to ``|Hu| |v|``, for the Hessian of a task's support loss and random u, v."""
    x, y = (t[0] for t in tasks.support)
    u, v = ({k: torch.randn_like(p) for k, p in params.items()} for _ in range(2))

    def at(p: dict[str, Tensor]) -> Tensor:
        return loss(p, x, y)

    def product(t: dict[str, Tensor]) -> Tensor:
        h = jvp(grad(at), (params,), (t,))[1]
        return torch.cat([h[k].double().flatten() for k in params])

    a, b = product(u), product(v)
    flat = [torch.cat([t[k].double().flatten() for k in params]) for t in (u, v)]
    return ((flat[1] @ a - flat[0] @ b).abs() / (a.norm() * flat[1].norm())).item()


def check(s: Settings) -> list[dict[str, Any]]:
    """Measure the errors for each number of inner steps.

    Returns:
        A row for each: ``dense``, ``differences`` and ``symmetry`` are errors of the exact meta-gradient,
        ``first_order_error`` and ``first_order_cosine`` compare that of first-order MAML.

    Raises:
        UserError: The device cannot be used.
    """
    device = find_device(s.device)
    drawn = stack(glyphs("train", way=s.way, shot=1, queries=3, seed=s.seed), 0, s.tasks)
    dtype = s.precision.parameters
    torch.set_float32_matmul_precision(s.precision.products)
    ours, oracle = _model(s, backend=s.backend.value).to(device, dtype), _model(s, attention=dense_attention)
    # Both start from the same parameters and tasks, those that the precision can represent.
    params = {k: p.detach() for k, p in ours.named_parameters()}
    exact = {k: p.double().cpu() for k, p in params.items()}
    tasks = _cast(drawn, dtype, device)
    exact_tasks = _cast(tasks, torch.float64, torch.device("cpu"))
    rows = []
    for steps in tqdm(s.inner_steps, desc="inner steps", leave=False):
        options: dict[str, Any] = {"steps": steps, "learning_rate": s.learning_rate}
        got = _gradient(maml(_task_loss(ours, s.precision), **options), params, tasks)
        learner = maml(_task_loss(oracle), **options)
        want = _gradient(learner, exact, exact_tasks)
        first = _gradient(first_order_maml(_task_loss(ours, s.precision), **options), params, tasks)
        torch.manual_seed(s.seed + 1)
        along = {k: torch.randn_like(p) for k, p in exact.items()}
        slope = _differences(learner, exact, exact_tasks, along)
        ours_slope = (got @ torch.cat([t.flatten() for t in along.values()])).item()
        rows.append(
            {
                "inner_steps": steps,
                "dense": ((got - want).norm() / want.norm()).item(),
                "differences": abs(ours_slope - slope) / max(abs(slope), 1e-3 * want.norm().item()),
                "symmetry": _asymmetry(_task_loss(ours, s.precision), params, tasks),
                "first_order_error": ((first - want).norm() / want.norm()).item(),
                "first_order_cosine": F.cosine_similarity(first, want, dim=0).item(),
            }
        )
    return rows


def plot(path: Path, rows: list[dict[str, Any]], s: Settings) -> None:
    """Plot the errors of the meta-gradient and of first-order MAML against the number of inner steps."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2))
    x = [r["inner_steps"] for r in rows]
    for key, label in (("dense", "against dense autodiff"), ("differences", "against finite differences")):
        axes[0].semilogy(x, [max(r[key], 1e-17) for r in rows], "-o", label=f"second order, {label}")
    axes[0].semilogy(x, [r["first_order_error"] for r in rows], "-s", color="tab:red", label="first order")
    if s.precision in BOUNDS:
        axes[0].axhline(BOUNDS[s.precision]["dense"], color="black", lw=0.8, ls="--", label="bound")
    axes[0].set(
        xlabel="inner steps", ylabel="relative error", title=f"Meta-gradient, {s.backend.value}, {s.precision.value}"
    )
    axes[1].plot(x, [r["first_order_cosine"] for r in rows], "-s", color="tab:red")
    axes[1].set(
        xlabel="inner steps", ylabel="cosine", title="First-order against exact meta-gradient", ylim=(None, 1.0)
    )
    for axis in axes:
        axis.grid(alpha=0.3)
    legend_below(axes[0])
    save_figure(figure, path)


def main() -> None:
    """Run the study; exit with code 1 if an error exceeds its bound."""
    s = parse(Settings, "experiments.second_order")
    try:
        rows = check(s)
    except (UserError, NotImplementedError, ValueError, TypeError, RuntimeError) as error:
        fail(str(error).splitlines()[0])
    out = Path(s.out)
    out.mkdir(parents=True, exist_ok=True)
    bounds = BOUNDS.get(s.precision, {})
    exceeded = [f"{k} at {r['inner_steps']} steps" for r in rows for k in bounds if not r[k] <= bounds[k]]
    settings = {"backend": s.backend.value, "precision": s.precision.value, "device": s.device, "tasks": s.tasks}
    write_json(out / "second_order.json", {**settings, "bounds": bounds, "exceeded": exceeded, "rows": rows})
    plot(out / "second_order.png", rows, s)
    print(f"Relative errors of MAML's meta-gradients, backend={s.backend.value}, {s.precision.value}")
    header = f"{'inner steps':>12} {'dense':>10} {'differences':>12} {'symmetry':>10}"
    print(f"{header} | {'first order':>12} {'cosine':>10}")
    for r in rows:
        print(
            f"{r['inner_steps']:>12} {r['dense']:>10.1e} {r['differences']:>12.1e} {r['symmetry']:>10.1e} | "
            f"{r['first_order_error']:>12.2f} {r['first_order_cosine']:>10.3f}"
        )
    if bounds:
        print(f"{'bound':>12} {bounds['dense']:>10.0e} {bounds['differences']:>12.0e} {bounds['symmetry']:>10.0e} |")
    print(f"written to {out}")
    if exceeded:
        print(f"bounds exceeded: {', '.join(exceeded)}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
