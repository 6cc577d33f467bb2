"""Measure the speed of attention and its derivatives on this machine, beside PyTorch's, in about a minute.

"ours" is metaattn.sdpa with backend='auto'. "torch" is scaled_dot_product_attention with the backend that PyTorch
chooses, which has only a value and a gradient. "math" is PyTorch's math attention, which has every derivative and
stores the matrix of scores. A time is the shortest of several, in milliseconds, of a whole call, except for bwd, which
is the gradient without its forward pass. Memory is the peak beyond the inputs. Ratios above 1 mean that ours is faster.
A result that is wrong, checked on a part of the call against float64, has no time. Compare only numbers of one run.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from ..ops import sdpa
from . import _options
from ._derivatives import Attention, derivative
from ._environment import facts
from ._metrics import milliseconds, peak_bytes, relative_error

TIMED = ("fwd", "bwd", "jvp", "hvp", "dbl")
PEERS = ("metaattn", "torch", "math")
# For each device a short, a medium and a long shape, which together take some seconds.
SHAPES = {
    "cpu": [(1, 8, 128, 64), (1, 8, 512, 64), (1, 8, 1024, 64)],
    "cuda": [(32, 16, 512, 64), (8, 16, 2048, 64), (1, 16, 8192, 64)],
}
MIN_SECONDS = 0.15  # of calls, for each time
CHECKED_TOKENS = 512  # of one head, on which a result is checked
# Largest relative errors that pass; that of float32 allows for tf32 products.
BOUND = {torch.float64: 1e-10, torch.float32: 2e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}
Row = dict[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``metaattn bench``."""
    parser.add_argument(
        "--shape",
        action="append",
        type=_options.shape,
        metavar="B,H,N,D",
        help="batch, heads, tokens, head size; may be repeated",
    )
    parser.add_argument("--dtype", type=_options.dtype, help="by default float32 on a CPU and bfloat16 on a GPU")
    parser.add_argument("--causal", action="store_true", help="with a causal mask")
    parser.add_argument(
        "--device", type=_options.device, help="cpu, cuda or cuda:N; by default the GPU if there is one"
    )
    parser.add_argument(
        "--threads", type=_options.count, help="threads of the CPU; by default all, or one if the cores are busy"
    )
    parser.add_argument(
        "--json", type=_options.new_file, metavar="FILE", help="also write the machine and the rows to this file"
    )


def run(options: argparse.Namespace) -> int:
    """Measure and print; return 1 if one of our results is wrong, else 0."""
    cores, load = os.cpu_count() or 1, os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0  # not on Windows
    busy = options.threads is None and load > cores / 2
    if busy or options.threads is not None:
        torch.set_num_threads(options.threads or 1)
    device = options.device or _options.default_device()
    dtype = options.dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    shapes = options.shape or SHAPES[device.type]
    kind = "causal" if options.causal else "full"
    print(f"{device}, {str(dtype)[6:]}, {kind}; times in ms, ratios of PyTorch's to ours")
    if busy:
        print(f"using one thread, because the machine is busy (load {load:.1f} on {cores} cores)")
    print(HEADER)
    rows: list[Row] = []
    with tqdm(total=len(shapes) * len(TIMED), desc="bench", leave=False, disable=None) as bar:
        for row in measure(shapes, dtype, device, options.causal):
            rows.append(row)
            bar.update()
            bar.write(line(row))
    print(LEGEND)
    if options.json is not None:
        setting = {"device": str(device), "dtype": str(dtype)[6:], "causal": options.causal}
        options.json.write_text(json.dumps({"machine": facts(), "setting": setting, "rows": rows}, indent=1) + "\n")
        print(f"written to {options.json}")
    ours = [(f"{row['rule']} at {row['shape']}", row["metaattn"].get("failed")) for row in rows]
    wrong = [f"{where} {failed}" for where, failed in ours if failed in ("wrong", "raises")]
    if wrong:
        print(f"WRONG: {'; '.join(wrong)}. Run python -m metaattn doctor for details")
    return 1 if wrong else 0


def attention(who: str, causal: bool) -> Attention:
    """Return the attention of one of :data:`PEERS`."""
    if who == "metaattn":
        return partial(sdpa, is_causal=causal, backend="auto")
    if who == "torch":
        return partial(F.scaled_dot_product_attention, is_causal=causal)

    def math(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            return F.scaled_dot_product_attention(query, key, value, is_causal=causal)

    return math


def measure(
    shapes: list[tuple[int, int, int, int]], dtype: torch.dtype, device: torch.device, causal: bool
) -> Iterator[Row]:
    """Yield a row for each shape and derivative, with the time and the memory of each of :data:`PEERS`."""
    for shape in shapes:
        g = torch.Generator(device).manual_seed(0)
        tensors = [torch.randn(shape, device=device, generator=g).to(dtype) for _ in range(7)]
        part = [t[:1, :1, :CHECKED_TOKENS] for t in tensors]
        wide = [t.double() for t in part]
        for rule in TIMED:
            call = partial(_call, rule, causal=causal)
            want = call("math", wide)()
            row: Row = {"shape": list(shape), "rule": rule}
            for who in PEERS:
                if who == "torch" and rule not in ("fwd", "bwd"):
                    continue  # PyTorch raises, or falls back to its math attention
                row[who] = _cell(partial(call, who), part, tensors, want, dtype, device)
            yield row


def _call(rule: str, who: str, x: list[Tensor], causal: bool) -> Callable[[], Any]:
    query, key, value, cotangent, *tangents = x
    return derivative(rule, attention(who, causal), (query, key, value), tangents, cotangent)


def _cell(
    prepared: Callable[[list[Tensor]], Callable[[], Any]],
    part: list[Tensor],
    tensors: list[Tensor],
    want: Any,
    dtype: torch.dtype,
    device: torch.device,
) -> Row:
    try:
        error = relative_error(prepared(part)(), want)
        if not error <= BOUND[dtype]:
            return {"error": error, "failed": "wrong"}
        call = prepared(tensors)
        peak = peak_bytes(call, device)
        return {"error": error, "ms": milliseconds(call, MIN_SECONDS), "peak_mib": peak / 2**20}
    except torch.OutOfMemoryError:
        return {"failed": "memory"}
    except (RuntimeError, NotImplementedError) as raised:  # it does not support the derivative or dtype
        return {"failed": "raises", "note": (str(raised).strip() or "-").splitlines()[0]}


HEADER = (
    f"{'shape':<16}{'rule':<6}{'ours':>9}{'torch':>9}{'ratio':>8}{'math':>9}{'ratio':>8}{'MiB ours':>10}{'math':>8}"
)


LEGEND = """fwd: value; bwd: gradient only; jvp: value and tangent; hvp: Hessian product; dbl: double backward
torch: PyTorch's choice, which has only fwd and bwd; math: its math attention, whose memory is quadratic in tokens
ratios above 1: ours is faster. On a CPU PyTorch's fused fwd and bwd are faster; ours is faster than math
from 500 to 1000 tokens on, depending on the derivative: docs/benchmarks/cpu.md"""


def line(row: Row) -> str:
    """Format a row of the table."""
    ours, torchs, math = (row.get(who, {}) for who in PEERS)

    def value(cell: Row, key: str, form: str) -> str:
        return format(cell[key], form) if key in cell else cell.get("failed", "-")

    def ratio(cell: Row) -> str:
        return f"{cell['ms'] / ours['ms']:.2f}x" if "ms" in cell and "ms" in ours else "-"

    text = f"{','.join(map(str, row['shape'])):<16}{row['rule']:<6}{value(ours, 'ms', '.2f'):>9}"
    text += f"{value(torchs, 'ms', '.2f'):>9}{ratio(torchs):>8}{value(math, 'ms', '.2f'):>9}{ratio(math):>8}"
    return text + f"{value(ours, 'peak_mib', '.0f'):>10}{value(math, 'peak_mib', '.0f'):>8}"
