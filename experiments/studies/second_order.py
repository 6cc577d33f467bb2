"""Are the meta-gradients right? MAML on a Transformer by one backend, against two oracles.

For one and several inner steps, on glyph tasks: the meta-gradient by the backend against automatic
differentiation of the dense formula in float64 and against finite differences; the symmetry of the Hessian;
and how far first-order MAML is from the truth. Prints a table, writes JSON and a plot; exits 1 if a bound is
broken.
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
from ..training import report
from ..training.config import Backend, Precision
from ..training.learner import network
from ..training.setup import find_device
from ._settings import fail, parse

# Largest relative error allowed, by dtype: against dense autodiff in float64, of the Hessian's symmetry, and
# against finite differences of the float64 loss (whose own error is 1e-7 or so). None in 16 bits: what they lose grows
# with the inner steps, as far as the meta-gradient itself, and this shows how fast (docs/guides/mixed_precision.md).
BOUNDS = {
    Precision.float64: {"dense": 1e-10, "symmetry": 1e-10, "differences": 1e-6},
    Precision.float32: {"dense": 1e-3, "symmetry": 1e-3, "differences": 1e-3},
}


@dataclass
class Settings:
    """What is checked, and where the results go."""

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


def dense(query: Tensor, key: Tensor, value: Tensor, **_: Any) -> Tensor:
    """Attention written out, for automatic differentiation: the oracle."""
    return torch.softmax(query @ key.mT * query.shape[-1] ** -0.5, -1) @ value


def _model(s: Settings, **how: Any) -> metaattn.Transformer:
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
        **how,
    )
    torch.nn.init.normal_(model.head.weight, std=0.1)  # type: ignore[arg-type]
    return model.double()


def _loss_of(model: metaattn.Transformer, precision: Precision = Precision.float64) -> Any:
    call = network(model, precision)

    def loss(params: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(call(params, x), y)

    return loss


def _flat(gradient: MetaParams) -> Tensor:
    return torch.cat([g.double().cpu().flatten() for g in gradient["params"].values()])


def _gradient(learner: GradientBased, params: dict[str, Tensor], tasks: Episode) -> Tensor:
    return _flat(learner.value_and_grad(learner.init(params), tasks.support, tasks.query)[1])


def _cast(tasks: Episode, dtype: torch.dtype, device: torch.device) -> Episode:
    return Episode(*(type(b)(b.inputs.to(device, dtype), b.targets.to(device)) for b in tasks))


def _differences(learner: GradientBased, params: dict[str, Tensor], tasks: Episode, along: dict[str, Tensor]) -> float:
    """The slope of the mean query loss along a direction, by five points."""
    h = 1e-3 / math.sqrt(sum(t.square().sum().item() for t in along.values()))

    def at(k: int) -> float:
        moved = {n: p + k * h * along[n] for n, p in params.items()}
        with torch.no_grad():
            return learner.losses({"params": moved}, tasks.support, tasks.query).mean().item()

    return (at(-2) - 8 * at(-1) + 8 * at(1) - at(2)) / (12 * h)


def _asymmetry(loss: Any, params: dict[str, Tensor], tasks: Episode) -> float:
    """``|u.Hv - v.Hu|`` over the size of both, for the Hessian of a task's support loss."""
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
    """One row of errors for each number of inner steps."""
    device = find_device(s.device)
    wide = stack(glyphs("train", way=s.way, shot=1, queries=3, seed=s.seed), 0, s.tasks)
    wide = _cast(wide, torch.float64, torch.device("cpu"))
    dtype = s.precision.parameters
    torch.set_float32_matmul_precision(s.precision.products)
    ours, oracle = _model(s, backend=s.backend.value).to(device, dtype), _model(s, attention=dense)
    # Both start from the same numbers.
    params = {k: p.detach() for k, p in ours.named_parameters()}
    exact = {k: p.double().cpu() for k, p in params.items()}
    tasks = _cast(wide, dtype, device)
    wide = _cast(tasks, torch.float64, torch.device("cpu"))
    rows = []
    for steps in tqdm(s.inner_steps, desc="inner steps", leave=False):
        options: dict[str, Any] = {"steps": steps, "learning_rate": s.learning_rate}
        got = _gradient(maml(_loss_of(ours, s.precision), **options), params, tasks)
        learner = maml(_loss_of(oracle), **options)
        want = _gradient(learner, exact, wide)
        first = _gradient(first_order_maml(_loss_of(ours, s.precision), **options), params, tasks)
        torch.manual_seed(s.seed + 1)
        along = {k: torch.randn_like(p) for k, p in exact.items()}
        slope = _differences(learner, exact, wide, along)
        ours_slope = (got @ torch.cat([t.flatten() for t in along.values()])).item()
        rows.append(
            {
                "inner_steps": steps,
                "dense": ((got - want).norm() / want.norm()).item(),
                "differences": abs(ours_slope - slope) / max(abs(slope), 1e-3 * want.norm().item()),
                "symmetry": _asymmetry(_loss_of(ours, s.precision), params, tasks),
                "first_order_error": ((first - want).norm() / want.norm()).item(),
                "first_order_cosine": F.cosine_similarity(first, want, dim=0).item(),
            }
        )
    return rows


def plot(path: Path, rows: list[dict[str, Any]], s: Settings) -> None:
    """Errors of the meta-gradient beside that of first-order MAML, against inner steps."""
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
    report._legend_below(axes[0])
    report._save(figure, path)


def main() -> None:
    """Check, show and judge."""
    s = parse(Settings, "experiments.second_order")
    try:
        rows = check(s)
    except (UserError, NotImplementedError, ValueError, TypeError, RuntimeError) as error:
        fail(str(error).splitlines()[0])
    out = Path(s.out)
    out.mkdir(parents=True, exist_ok=True)
    bounds = BOUNDS.get(s.precision, {})
    broken = [f"{k} at {r['inner_steps']} steps" for r in rows for k in bounds if not r[k] <= bounds[k]]
    settings = {"backend": s.backend.value, "precision": s.precision.value, "device": s.device, "tasks": s.tasks}
    report.write_json(out / "second_order.json", {**settings, "bounds": bounds, "broken": broken, "rows": rows})
    plot(out / "second_order.png", rows, s)
    print(f"Meta-gradients of MAML, backend={s.backend.value}, {s.precision.value}: relative errors")
    heads = f"{'inner steps':>12} {'dense':>10} {'differences':>12} {'symmetry':>10}"
    print(f"{heads} | {'first order':>12} {'its cosine':>10}")
    for r in rows:
        print(
            f"{r['inner_steps']:>12} {r['dense']:>10.1e} {r['differences']:>12.1e} {r['symmetry']:>10.1e} | "
            f"{r['first_order_error']:>12.2f} {r['first_order_cosine']:>10.3f}"
        )
    if bounds:
        print(f"{'bound':>12} {bounds['dense']:>10.0e} {bounds['differences']:>12.0e} {bounds['symmetry']:>10.0e} |")
    print(f"written to {out}")
    if broken:
        print(f"broken: {', '.join(broken)}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
