"""``auto``: for each primitive the fastest backend that serves the call.

On a CPU, and for whatever the kernels do not serve, blockwise. On a GPU our kernels, but PyTorch's own F and
B where ``auto.json``, measured by ``scripts/bench_attention.py``, has them faster at the nearest length.
"""

from __future__ import annotations

import functools
import importlib
import json
import math
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch

from . import blockwise
from .base import Gradients, Operands, Pair, Problem, Rows, Tangent, Values, in_turn

name = "auto"
PATH = Path(__file__).with_name("auto.json")
PRIMITIVES = ("forward", "backward", "forward_jvp", "forward_with_jvp", "backward_jvp")


class Choice(NamedTuple):
    """A backend and why it was chosen."""

    backend: ModuleType
    why: str


def load(backend: str) -> ModuleType | str:
    """A backend that needs Triton, or why it cannot be imported."""
    try:
        return importlib.import_module(f".{backend}", __package__)
    except ImportError as error:
        return f"backend={backend!r} needs the package triton, which cannot be imported here: {error}"


@functools.cache
def _table() -> dict[str, dict[str, dict[str, dict[str, dict[str, float]]]]]:
    """By capability, primitive, head size and band: our kernels' time over the vendor's, by tokens."""
    table: dict[str, dict[str, dict[str, dict[str, dict[str, float]]]]] = json.loads(PATH.read_text())
    return table


def choose(primitive: str, problem: Problem, x: Operands) -> Choice:
    """The backend for a primitive, see above."""
    if not x.query.is_cuda:
        return Choice(blockwise, f"tensors on {x.query.device.type}: tiles in plain PyTorch")
    triton = load("triton")
    if isinstance(triton, str):
        return Choice(blockwise, triton)
    if (reason := triton.refuses(problem, x)) is not None:
        return Choice(blockwise, reason.split(". ")[0])
    if primitive not in ("forward", "backward"):
        return Choice(triton, "fused kernel; no other has this derivative")
    vendor = load("vendor")
    assert not isinstance(vendor, str)
    if (reason := vendor.refuses(problem, x)) is not None:
        return Choice(triton, reason.split(";")[0])
    if primitive == "backward" and torch.are_deterministic_algorithms_enabled():
        return Choice(triton, "deterministic algorithms are asked for, and ours is one")
    capability = "{}.{}".format(*torch.cuda.get_device_capability(x.query.device))
    if capability not in _table():
        return Choice(triton, f"our kernel; PyTorch's own is not measured on compute capability {capability}")
    tokens, ratio = _measured(_table()[capability].get(primitive, {}), problem, x)
    if ratio is None:
        return Choice(triton, f"our kernel; PyTorch's own is not measured there at head size {x.query.shape[-1]}")
    if ratio > 1.0:
        return Choice(vendor, f"PyTorch's own is measured {ratio:.2f} times as fast as ours at {tokens} tokens")
    return Choice(triton, f"measured {1.0 / ratio:.2f} times as fast as PyTorch's own at {tokens} tokens")


def _measured(
    column: dict[str, dict[str, dict[str, float]]], problem: Problem, x: Operands
) -> tuple[int, float | None]:
    """The measured number of tokens that is next to the call's, at its head size or the next, and the ratio there."""
    sizes = [int(size) for size in column if int(size) >= x.query.shape[-1]]
    if not sizes:
        return 0, None
    ratios = column[str(min(sizes))].get("causal" if problem.right == 0 else "full")
    if not ratios:
        return 0, None
    nearest = min(ratios, key=lambda tokens: abs(math.log(int(tokens) / x.query.shape[-2])))
    return int(nearest), ratios[nearest]


def refuses(problem: Problem, x: Operands) -> str | None:
    """Serves everything."""
    return None


def forward(problem: Problem, x: Operands) -> Values:
    """F."""
    values: Values = choose("forward", problem, x).backend.forward(problem, x)
    return values


def backward(problem: Problem, x: Operands, values: Values, cotangent: Rows, *, bias_grad: bool) -> Gradients:
    """B."""
    backend = choose("backward", problem, x).backend
    grads: Gradients = backend.backward(problem, x, values, cotangent, bias_grad=bias_grad)
    return grads


def forward_jvp(problem: Problem, x: Operands, values: Values, tangent: Tangent) -> Values:
    """T."""
    values_t: Values = choose("forward_jvp", problem, x).backend.forward_jvp(problem, x, values, tangent)
    return values_t


def forward_with_jvp(problem: Problem, x: Operands, direction: Tangent) -> tuple[Values, Values]:
    """F and T at once."""
    both: tuple[Values, Values] = choose("forward_with_jvp", problem, x).backend.forward_with_jvp(problem, x, direction)
    return both


def backward_jvp(
    problem: Problem,
    x: Operands,
    values: Values,
    values_tangent: Values,
    cotangent: Rows,
    tangent: Tangent,
    *,
    cotangent_tangent: Rows,
    bias_grad: bool,
) -> Gradients:
    """S."""
    grads: Gradients = choose("backward_jvp", problem, x).backend.backward_jvp(
        problem,
        x,
        values,
        values_tangent,
        cotangent,
        tangent,
        cotangent_tangent=cotangent_tangent,
        bias_grad=bias_grad,
    )
    return grads


_in_turn = in_turn(sys.modules[__name__])


def backward_with_jvp(problem: Problem, x: Operands, *rest: Any, bias_grad: bool, **options: Any) -> Pair:
    """B and S at once where our kernels are one for both; the fastest of each otherwise."""
    backend = choose("backward_jvp", problem, x).backend
    both = backend.backward_with_jvp if backend.name == "triton" and backend.fuses(x, bias_grad) else _in_turn
    pair: Pair = both(problem, x, *rest, bias_grad=bias_grad, **options)
    return pair
