"""The backend ``auto``: for each primitive, the fastest backend that supports the call.

On a CPU, and for calls that the kernels do not support, that is ``blockwise``. On a GPU it is our kernels, except where
``auto.json`` has PyTorch's own F or B faster at the nearest measured length. ``scripts/bench_attention.py`` writes that
file.
"""

from __future__ import annotations

import functools
import importlib
import json
import math
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch

from . import blockwise
from .base import Backend, BackwardJvpInputs, Gradients, Operands, Problem, Rows, Tangent, Values

PATH = Path(__file__).with_name("auto.json")


class Choice(NamedTuple):
    """A backend and the reason why it was chosen."""

    backend: Backend
    why: str


def import_with_triton(name: str) -> ModuleType | str:
    """Return a module of this package that imports Triton, or a message that says why it cannot be imported."""
    try:
        return importlib.import_module(f".{name}", __package__)
    except ImportError as error:
        return (
            f"backend={name!r} needs the package triton, which cannot be imported here ({error}). Install it, or "
            "ask for backend='blockwise' or 'auto'"
        )


@functools.cache
def _table() -> dict[str, dict[str, dict[str, dict[str, dict[str, float]]]]]:
    """Return the time of our kernels over the vendor's, by capability, primitive, head size, band and tokens."""
    table: dict[str, dict[str, dict[str, dict[str, dict[str, float]]]]] = json.loads(PATH.read_text())
    return table


def choose(primitive: str, problem: Problem, x: Operands) -> Choice:
    """Return the fastest backend for a primitive of :data:`~metaattn.backends.base.PRIMITIVES`, and the reason."""
    if primitive == "backward_with_jvp":
        choice = choose("backward_jvp", problem, x)
        if choice.backend.fuses_backward_with_jvp(x, bias_grad=x.bias is not None):
            return Choice(choice.backend, "one fused kernel for both")
        return choice._replace(why="backward, then backward_jvp: no kernel for both here")
    if not x.query.is_cuda:
        return Choice(blockwise.backend, f"tensors on {x.query.device.type}: tiles in plain PyTorch")
    module = import_with_triton("triton")
    if isinstance(module, str):
        return Choice(blockwise.backend, module.split(". ")[0])
    triton: Backend = module.backend
    if (reason := triton.unsupported_reason(problem, x)) is not None:
        return Choice(blockwise.backend, reason.split(". ")[0])
    if primitive not in ("forward", "backward"):
        return Choice(triton, "fused kernel; no other has this derivative")
    module = import_with_triton("vendor")
    assert not isinstance(module, str)
    vendor: Backend = module.backend
    if (reason := vendor.unsupported_reason(problem, x)) is not None:
        return Choice(triton, reason.split(";")[0])
    if primitive == "backward" and torch.are_deterministic_algorithms_enabled():
        return Choice(triton, "deterministic algorithms are requested, and our kernel is deterministic")
    capability = "{}.{}".format(*torch.cuda.get_device_capability(x.query.device))
    if capability not in _table():
        return Choice(triton, f"our kernel; PyTorch's own is not measured on compute capability {capability}")
    tokens, ratio = _measured(_table()[capability].get(primitive, {}), problem, x)
    if ratio is None:
        return Choice(triton, f"our kernel; PyTorch's own is not measured at head size {x.query.shape[-1]}")
    if ratio > 1.0:
        return Choice(vendor, f"PyTorch's own is measured {ratio:.2f} times as fast as ours at {tokens} tokens")
    return Choice(triton, f"measured {1.0 / ratio:.2f} times as fast as PyTorch's own at {tokens} tokens")


def _measured(
    column: dict[str, dict[str, dict[str, float]]], problem: Problem, x: Operands
) -> tuple[int, float | None]:
    """Return the measured length nearest to the call's, at its head size or the next larger, and the ratio there."""
    sizes = [int(size) for size in column if int(size) >= x.query.shape[-1]]
    if not sizes:
        return 0, None
    ratios = column[str(min(sizes))].get("causal" if problem.right == 0 else "full")
    if not ratios:
        return 0, None
    nearest = min(ratios, key=lambda tokens: abs(math.log(int(tokens) / x.query.shape[-2])))
    return int(nearest), ratios[nearest]


class AutoBackend(Backend):
    """Passes each primitive to the backend that :func:`choose` returns."""

    name = "auto"

    def forward(self, problem: Problem, x: Operands) -> Values:
        """Compute F."""
        return choose("forward", problem, x).backend.forward(problem, x)

    def backward(self, problem: Problem, x: Operands, values: Values, cotangent: Rows, *, bias_grad: bool) -> Gradients:
        """Compute B."""
        backend = choose("backward", problem, x).backend
        return backend.backward(problem, x, values, cotangent, bias_grad=bias_grad)

    def forward_jvp(self, problem: Problem, x: Operands, values: Values, tangent: Tangent) -> Values:
        """Compute T."""
        return choose("forward_jvp", problem, x).backend.forward_jvp(problem, x, values, tangent)

    def forward_with_jvp(self, problem: Problem, x: Operands, tangent: Tangent) -> tuple[Values, Values]:
        """Compute F and T."""
        return choose("forward_with_jvp", problem, x).backend.forward_with_jvp(problem, x, tangent)

    def backward_jvp(self, problem: Problem, x: Operands, inputs: BackwardJvpInputs) -> Gradients:
        """Compute S."""
        return choose("backward_jvp", problem, x).backend.backward_jvp(problem, x, inputs)

    def backward_with_jvp(
        self, problem: Problem, x: Operands, inputs: BackwardJvpInputs
    ) -> tuple[Gradients, Gradients]:
        """Compute B and S in one kernel if there is one, otherwise each by the fastest backend for it."""
        backend = choose("backward_jvp", problem, x).backend
        if backend.fuses_backward_with_jvp(x, inputs.bias_grad):
            return backend.backward_with_jvp(problem, x, inputs)
        return super().backward_with_jvp(problem, x, inputs)


backend = AutoBackend()
