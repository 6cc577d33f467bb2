"""How fast attention and its derivatives are here and now, ours beside PyTorch's, in a minute or so.

Ours is by backend='auto'. "torch" is what PyTorch's scaled_dot_product_attention takes by itself, which has a value and
a gradient alone; "math" is its math attention, which has every derivative and stores the matrix of scores. Times are
the least of several, in milliseconds, of all the work of a call, but for bwd, the gradient alone; memory is the most
that is alive at once beyond the inputs. Ratios above 1 are in our favour. A result that is not right, on a part of the
call against float64, has no time. Only what one run measured compares.
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
WHO = ("metaattn", "torch", "math")
# By device: shapes that show small, middle and long, and take some seconds on it in all.
SHAPES = {
    "cpu": [(1, 8, 128, 64), (1, 8, 512, 64), (1, 8, 1024, 64)],
    "cuda": [(32, 16, 512, 64), (8, 16, 2048, 64), (1, 16, 8192, 64)],
}
LEAST = 0.15  # seconds of calls for each time
PART = 512  # tokens of one head on which a result is checked
# Relative errors that pass; float32 with tf32 products, where those are asked for.
BOUND = {torch.float64: 1e-10, torch.float32: 2e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}
Row = dict[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``metaattn bench``."""
    parser.add_argument(
        "--shape",
        action="append",
        type=_options.shape,
        metavar="B,H,N,D",
        help="batch, heads, tokens, head size; may be repeated",
    )
    parser.add_argument("--dtype", type=_options.dtype, help="float32 on the CPU and bfloat16 on a GPU by default")
    parser.add_argument("--causal", action="store_true", help="with a causal mask")
    parser.add_argument(
        "--device", type=_options.device, help="cpu, cuda or cuda:N; the GPU by default, if there is one"
    )
    parser.add_argument(
        "--threads", type=_options.count, help="of the CPU; one where its cores are busy with other work"
    )
    parser.add_argument("--json", type=_options.new_file, metavar="FILE", help="write machine and rows there as well")


def run(options: argparse.Namespace) -> int:
    """Measure and print; 1 if one of our results is wrong."""
    cores, load = os.cpu_count() or 1, os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0  # not on Windows
    busy = options.threads is None and load > cores / 2
    if busy or options.threads is not None:
        torch.set_num_threads(options.threads or 1)
    device = options.device or _options.default_device()
    dtype = options.dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    shapes = options.shape or SHAPES[device.type]
    bar = tqdm(total=len(shapes) * len(TIMED), desc="bench", leave=False, disable=None)
    print(
        f"{device}, {str(dtype)[6:]}, {'causal' if options.causal else 'full'}; times in ms, ratios of theirs to ours"
    )
    if busy:
        print(
            f"on one thread: the machine is busy (load {load:.1f} on {cores} cores), and more would wait for each other"
        )
    print(HEADER)
    rows: list[Row] = []
    with bar:
        for row in measure(shapes, dtype, device, options.causal):
            rows.append(row)
            bar.update()
            tqdm.write(line(row))
    print(LEGEND)
    if options.json is not None:
        setting = {"device": str(device), "dtype": str(dtype)[6:], "causal": options.causal}
        options.json.write_text(json.dumps({"machine": facts(), "setting": setting, "rows": rows}, indent=1) + "\n")
        print(f"written to {options.json}")
    ours = [(f"{row['rule']} at {row['shape']}", row["metaattn"].get("failed")) for row in rows]
    wrong = [f"{where} {failed}" for where, failed in ours if failed in ("wrong", "raises")]
    if wrong:
        print(f"NOT RIGHT: {'; '.join(wrong)}. python -m metaattn doctor says more")
    return 1 if wrong else 0


def attention(who: str, causal: bool) -> Attention:
    """The attention of a name."""
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
    """A row for each shape and rule: for each of :data:`WHO` time and memory, or why it has none."""
    for shape in shapes:
        g = torch.Generator(device).manual_seed(0)
        tensors = [torch.randn(shape, device=device, generator=g).to(dtype) for _ in range(7)]
        part = [t[:1, :1, :PART] for t in tensors]
        wide = [t.double() for t in part]
        for rule in TIMED:
            call = partial(_call, rule, causal=causal)
            want = call("math", wide)()
            row: Row = {"shape": list(shape), "rule": rule}
            for who in WHO:
                if who == "torch" and rule not in ("fwd", "bwd"):
                    continue  # it raises, or is the math attention
                row[who] = _cell(partial(call, who), part, tensors, want, dtype, device)
            yield row


def _call(rule: str, who: str, x: list[Tensor], causal: bool) -> Callable[[], Any]:
    query, key, value, cotangent, *tangents = x
    return derivative(rule, attention(who, causal), (query, key, value), tangents, cotangent)


def _cell(
    prepared: Callable[[list[Tensor]], Callable[[], Any]],
    part: list[Tensor],
    whole: list[Tensor],
    want: Any,
    dtype: torch.dtype,
    device: torch.device,
) -> Row:
    try:
        error = relative_error(prepared(part)(), want)
        if not error <= BOUND[dtype]:
            return {"error": error, "failed": "wrong"}
        call = prepared(whole)
        peak = peak_bytes(call, device)
        return {"error": error, "ms": milliseconds(call, LEAST), "peak_mib": peak / 2**20}
    except torch.OutOfMemoryError:
        return {"failed": "memory"}
    except (RuntimeError, NotImplementedError) as raised:  # a peer without this rule or dtype: the row says so
        return {"failed": "raises", "note": (str(raised).strip() or "-").splitlines()[0]}


HEADER = (
    f"{'shape':<16}{'rule':<6}{'ours':>9}{'torch':>9}{'ratio':>8}{'math':>9}{'ratio':>8}{'MiB ours':>10}{'math':>8}"
)


LEGEND = """fwd: value; bwd: gradient alone; jvp: value and tangent; hvp: Hessian product; dbl: double backward
torch: PyTorch's own choice, which has the first two alone; math: its math attention, of memory quadratic in tokens
ratios above 1 are in our favour; on a CPU PyTorch's fused value and gradient are faster, and against math ours is
ahead from some 500 to 1000 tokens, by rule: docs/benchmarks/cpu.md"""


def line(row: Row) -> str:
    """A row of the table."""
    ours, torchs, math = (row.get(who, {}) for who in WHO)

    def value(cell: Row, key: str, form: str) -> str:
        return format(cell[key], form) if key in cell else cell.get("failed", "-")

    def ratio(cell: Row) -> str:
        return f"{cell['ms'] / ours['ms']:.2f}x" if "ms" in cell and "ms" in ours else "-"

    text = f"{','.join(map(str, row['shape'])):<16}{row['rule']:<6}{value(ours, 'ms', '.2f'):>9}"
    text += f"{value(torchs, 'ms', '.2f'):>9}{ratio(torchs):>8}{value(math, 'ms', '.2f'):>9}{ratio(math):>8}"
    return text + f"{value(ours, 'peak_mib', '.0f'):>10}{value(math, 'peak_mib', '.0f'):>8}"
