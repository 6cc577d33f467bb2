"""CPU time of the differentiation rules without kernels, which limits small problems on a GPU in eager mode.

    python scripts/bench_overhead.py

Our backends are replaced by one that computes nothing. The time left is that of PyTorch's transforms and of our rules
and checks. Two other columns show the same with :meth:`torch.autograd.Function.apply` at every level, and PyTorch's
math attention on a problem so small that its time is dispatch. Each number is the least of several runs, alternately in
one process: on a shared machine only their ratios are meaningful. Prints a Markdown table.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.autograd import Function
from torch.func import grad
from tqdm import tqdm

import metaattn
from metaattn.autodiff._custom_function import CustomFunction
from metaattn.backends.base import Backend, BackwardJvpInputs, Gradients, Operands, Problem, Rows, Tangent, Values
from metaattn.cli._derivatives import Attention, derivative
from metaattn.cli._metrics import milliseconds
from metaattn.cli.bench import attention
from metaattn.ops import operators

SECONDS = 0.3  # for each measurement
RULES = {
    "forward": "fwd",
    "backward": "grad",
    "jvp": "jvp",
    "Hessian product": "hvp",
    "double backward": "dbl",
    "Hessian products by vmap": "vmap",
}


def empty_values(x: Operands) -> Values:
    """Return empty tensors for out and lse."""
    return Values(torch.empty_like(x.query), x.query.new_empty(x.query.shape[:-1]))


def empty_gradients(x: Operands) -> Gradients:
    """Return empty tensors for the gradients."""
    return Gradients(torch.empty_like(x.query), torch.empty_like(x.key), torch.empty_like(x.value), None)


class EmptyBackend(Backend):
    """Returns uninitialised results and computes nothing."""

    name = "empty"

    def forward(self, problem: Problem, x: Operands) -> Values:
        """Return empty values."""
        return empty_values(x)

    def backward(self, problem: Problem, x: Operands, values: Values, cotangent: Rows, *, bias_grad: bool) -> Gradients:
        """Return empty gradients."""
        return empty_gradients(x)

    def forward_jvp(self, problem: Problem, x: Operands, values: Values, tangent: Tangent) -> Values:
        """Return empty tangents of the values."""
        return empty_values(x)

    def backward_jvp(self, problem: Problem, x: Operands, inputs: BackwardJvpInputs) -> Gradients:
        """Return empty tangents of the gradients."""
        return empty_gradients(x)


@contextlib.contextmanager
def without_work(*, own_levels: bool) -> Iterator[None]:
    """Context manager: no backend computes anything; rules run at PyTorch's levels by our ``apply`` or by PyTorch's."""
    apply = CustomFunction.__dict__["apply"] if own_levels else classmethod(Function.apply.__func__)  # type: ignore[attr-defined]
    with (
        mock.patch.object(operators, "select", return_value=EmptyBackend()),
        mock.patch.object(CustomFunction, "apply", apply),
    ):
        yield


def calls(f: Attention) -> dict[str, Callable[[], Any]]:
    """Return a call for each rule."""
    torch.manual_seed(0)
    x, t, (w, *_) = torch.randn(3, 3, 1, 1, 4, 8).unbind()
    found = {name: derivative(rule, f, tuple(x), tuple(t), w) for name, rule in RULES.items()}

    def gradient(*x: Tensor) -> Any:
        return grad(lambda *x: (f(*x) * w).sum(), (0, 1, 2))(*x)

    def twice(*x: Tensor) -> Any:
        return grad(lambda *x: sum((g * u).sum() for g, u in zip(gradient(*x), t, strict=True)), (0, 1, 2))(*x)

    return {**found, "grad of grad": lambda: twice(*x)}


def main() -> None:
    """Measure and print the table."""
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
