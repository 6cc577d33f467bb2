"""The CPU's time of the rules alone: what a small problem on a GPU waits for in eager mode.

    python scripts/bench_overhead.py

Our backends are replaced by one that computes nothing, so that what is left is PyTorch's transforms, our rules and
checks. Beside it the same through what :meth:`torch.autograd.Function.apply` does at every level, and PyTorch's math
attention on a problem so small that it is all dispatch. The least of several runs, in turn in one process: on a shared
machine only their ratios mean anything. Prints a table (Markdown).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.autograd import Function
from torch.func import grad
from tqdm import tqdm

import metaattn
from metaattn.autodiff._custom_function import CustomFunction
from metaattn.backends.base import Gradients, Operands, Values
from metaattn.cli._derivatives import Attention, derivative
from metaattn.cli._metrics import milliseconds
from metaattn.cli.bench import attention
from metaattn.ops import operators

SECONDS = 0.3  # of each
RULES = {
    "forward": "fwd",
    "backward": "grad",
    "jvp": "jvp",
    "Hessian product": "hvp",
    "double backward": "dbl",
    "Hessian products by vmap": "vmap",
}


def values(x: Operands) -> Values:
    """Room for out and lse."""
    return Values(torch.empty_like(x.query), x.query.new_empty(x.query.shape[:-1]))


def gradients(x: Operands) -> Gradients:
    """Room for the gradients."""
    return Gradients(torch.empty_like(x.query), torch.empty_like(x.key), torch.empty_like(x.value), None)


NOTHING = SimpleNamespace(
    forward=lambda problem, x: values(x),
    forward_jvp=lambda problem, x, *_: values(x),
    forward_with_jvp=lambda problem, x, _: (values(x), values(x)),
    backward=lambda problem, x, *_, **__: gradients(x),
    backward_jvp=lambda problem, x, *_, **__: gradients(x),
    backward_with_jvp=lambda problem, x, *_, **__: (gradients(x), gradients(x)),
)


@contextlib.contextmanager
def without_work(*, own_levels: bool) -> Iterator[None]:
    """Inside, no backend computes anything; and rules run at PyTorch's levels by its own means, or by ours."""
    apply = CustomFunction.__dict__["apply"] if own_levels else classmethod(Function.apply.__func__)  # type: ignore[attr-defined]
    with (
        mock.patch.object(operators, "select", return_value=NOTHING),
        mock.patch.object(CustomFunction, "apply", apply),
    ):
        yield


def calls(f: Attention) -> dict[str, Callable[[], Any]]:
    """Every rule as a call."""
    torch.manual_seed(0)
    x, t, (w, *_) = torch.randn(3, 3, 1, 1, 4, 8).unbind()
    found = {name: derivative(rule, f, tuple(x), tuple(t), w) for name, rule in RULES.items()}

    def gradient(*x: Tensor) -> Any:
        return grad(lambda *x: (f(*x) * w).sum(), (0, 1, 2))(*x)

    def twice(*x: Tensor) -> Any:
        return grad(lambda *x: sum((g * u).sum() for g, u in zip(gradient(*x), t, strict=True)), (0, 1, 2))(*x)

    return {**found, "grad of grad": lambda: twice(*x)}


def main() -> None:
    """Measure, print."""
    torch.set_num_threads(1)
    ours = calls(lambda q, k, v: metaattn.sdpa(q, k, v, backend="reference"))
    theirs = calls(attention("math", causal=False))
    lines = ["| ms of the CPU | metaattn | through Function.apply | math attention |", "|---|---|---|---|"]
    for name in tqdm(ours, desc="rules", mininterval=5):
        times = []
        for own_levels in (True, False):
            with without_work(own_levels=own_levels):
                times.append(milliseconds(ours[name], SECONDS))
        times.append(milliseconds(theirs[name], SECONDS))
        lines.append(f"| {name} | " + " | ".join(f"{t:.2f}" for t in times) + " |")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
