"""Compare memory and time of derivatives of a Transformer with ``remat=True`` and without, on one CPU core.

    python scripts/bench_checkpoint.py [--depth 8] [--dim 64] [--tokens 64] [--batch 4] [--tasks 2] [--inner 1]

Peak memory is the largest number of bytes that a call holds at once, beyond those before it. Time is the least of
several runs. A result that is not within 1e-5 of the plain model's is reported as wrong. Prints a table.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call, grad, jvp, vmap
from torch.utils._pytree import tree_leaves

from metaattn import Transformer
from metaattn.cli._metrics import peak_bytes

Params = dict[str, Tensor]


def derivatives(model: Transformer, x: Tensor, inner: int) -> dict[str, Callable[[], Any]]:
    """Return the derivatives to measure, of a mean square at inputs ``[tasks, batch, tokens, 8]``."""
    params = {k: p.detach() for k, p in model.named_parameters()}

    def loss(p: Params, x: Tensor) -> Tensor:
        return functional_call(model, p, (x,)).sin().square().mean()

    def adapted(p: Params, x: Tensor) -> Tensor:
        q = p
        for _ in range(inner):
            g = grad(loss)(q, x)
            q = {k: q[k] - 0.1 * g[k] for k in q}
        return loss(q, x.flip(0))

    def by_autograd() -> Any:
        leaves = {k: p.clone().requires_grad_() for k, p in params.items()}
        return torch.autograd.grad(vmap(adapted, (None, 0))(leaves, x).mean(), list(leaves.values()))

    return {
        "gradient": lambda: grad(loss)(params, x[0]),
        "meta-gradient by torch.autograd": by_autograd,
        "meta-gradient by torch.func": lambda: grad(lambda p: vmap(adapted, (None, 0))(p, x).mean())(params),
        "Hessian product": lambda: jvp(lambda p: grad(loss)(p, x[0]), (params,), (params,)),
    }


def seconds(call: Callable[[], Any], repeats: int) -> float:
    """Return the least time of several calls."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


def main() -> None:
    """Measure all derivatives, and print the table."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in {"depth": 8, "dim": 64, "tokens": 64, "batch": 4, "tasks": 2, "inner": 1, "repeats": 3}.items():
        p.add_argument(f"--{name}", type=int, default=value)
    a = p.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)  # otherwise the time of several threads is mostly that of waiting for each other
    options: dict[str, Any] = {"input": "continuous", "in_features": 8, "dim": a.dim, "depth": a.depth}
    plain, remat = Transformer(**options), Transformer(**options, remat=True)
    remat.load_state_dict(plain.state_dict())
    x = torch.randn(a.tasks, a.batch, a.tokens, 8)
    print("| derivative | plain MiB | remat MiB | of it | plain s | remat s |\n|---|---|---|---|---|---|")
    ours = derivatives(remat, x, a.inner)
    for name, call in derivatives(plain, x, a.inner).items():
        got, want = (torch.cat([t.flatten() for t in tree_leaves(f())]) for f in (ours[name], call))
        if not (got - want).norm() <= 1e-5 * want.norm():
            print(f"| {name} | wrong |")
            continue
        (m0, t0), (m1, t1) = ((peak_bytes(f) / 2**20, seconds(f, a.repeats)) for f in (call, ours[name]))
        print(f"| {name} | {m0:.1f} | {m1:.1f} | {m1 / m0:.0%} | {t0:.2f} | {t1:.2f} |")


if __name__ == "__main__":
    main()
