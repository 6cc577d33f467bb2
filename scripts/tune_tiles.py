"""Find the fastest block sizes of each Triton kernel on this GPU, and write them into the backend's table.

    python scripts/tune_tiles.py [--head-sizes 64 128] [--dtypes bfloat16 tf32 float32] [--primitives second_keys]

Candidates compile side by side in as many processes as there are cores; then each is timed alone, and the best few
again for longer, without a band and with one (a causal mask); with --bands full alone, what is best without one serves
both. All times go to --out as JSON, beside those of other primitives, sizes and dtypes;
``metaattn/backends/triton/tiles.json`` is updated in place.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import multiprocessing
import os
import statistics
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from _dtypes import DTYPES, arithmetic
from torch import Tensor
from tqdm import tqdm

from metaattn.backends import triton as backend
from metaattn.backends._protocol import Operands, Problem, Rows, Tangent, Values
from metaattn.backends.triton import _tiles
from metaattn.backends.triton._tiles import Tile

PRIMITIVES = (
    "forward",
    "forward_tangent",
    "tangent",
    "backward_rows",
    "backward_keys",
    "second_rows",
    "second_keys",
    "backward_second_rows",
    "backward_second_keys",
)
TOKENS = 2048
FINALISTS = 6


class Trial(NamedTuple):
    """One candidate for one kernel."""

    primitive: str
    dtype: str
    head_size: int
    causal: bool
    tile: Tile


def candidates(primitive: str, dtype: str, head_size: int, causal: bool) -> Iterator[Trial]:
    """Block sizes worth a trial: what is kept in registers is at least 64 high, for the tensor cores, and fits."""
    keeps_rows = not primitive.endswith("_keys")
    at_once = primitive in ("forward_tangent", "backward_second_rows", "backward_second_keys")
    accumulators = (1 if keeps_rows else 2) * (2 if at_once else 1)
    scores = 1 if primitive == "forward" else 4 if "second" in primitive else 2
    wide = dtype != "bfloat16"
    few = wide or head_size > 128 or primitive == "backward_second_keys"
    others = (16, 32, 64) if few else (32, 64, 128)
    splits = (True, False) if causal else (True,)
    holds = (False, True) if not wide and head_size <= 128 else (False,)
    keeps = (32, 64, 128) if dtype == "float32" else (64, 128)
    for kept, other, warps, stages, split, hold in itertools.product(
        keeps, others, (4, 8), (1, 2, 3, 4), splits, holds
    ):
        # 32-bit registers of a thread for the accumulators and for the tiles alive at once.
        registers = kept * (accumulators * head_size + scores * other) / (32 * warps)
        deep = stages == 3 and (wide or head_size > 128)
        deep |= stages == 4 and not hold
        shallow = stages == 1 and not wide and head_size <= 128
        if 32 <= registers <= 300 and kept >= 16 * warps and not deep and not shallow:
            rows, keys = (kept, other) if keeps_rows else (other, kept)
            yield Trial(primitive, dtype, head_size, causal, Tile(rows, keys, warps, stages, split, hold))


def force(trial: Trial) -> None:
    """Put a candidate into the table in memory."""
    column = _tiles._device(0).setdefault((trial.primitive, arithmetic(trial.dtype)), {})
    full, banded = column.get(trial.head_size, (trial.tile, trial.tile))
    column[trial.head_size] = (full, trial.tile) if trial.causal else (trial.tile, banded)


def call(trial: Trial) -> Callable[[], Any]:
    """The primitive of a trial on random tensors."""
    dtype, heads = DTYPES[trial.dtype][0], max(1, 128 * 64 // trial.head_size)

    def tensor() -> Tensor:
        return torch.randn(1, heads, TOKENS, trial.head_size, device="cuda", dtype=dtype)

    x, t, w = Operands(tensor(), tensor(), tensor()), Tangent(tensor(), tensor(), tensor()), Rows(tensor())
    rows = Values(tensor(), torch.full((1, heads, TOKENS), 8.0, device="cuda"))
    problem = Problem(trial.head_size**-0.5, None, 0 if trial.causal else None)
    if trial.primitive == "forward":
        return lambda: backend.forward(problem, x)
    if trial.primitive == "forward_tangent":
        return lambda: backend.forward_tangent(problem, x, t)
    if trial.primitive == "tangent":
        return lambda: backend.tangent(problem, x, rows, t)
    if trial.primitive in ("backward_rows", "backward_keys"):
        return lambda: backend.backward(problem, x, rows, w, bias_grad=False)
    second = backend.second if trial.primitive.startswith("second") else backend.backward_second
    return lambda: second(problem, x, rows, rows, w, t, cotangent_tangent=Rows(), bias_grad=False)


def compile_one(trial: Trial) -> str | None:
    """Compile a candidate, into Triton's cache on disk; why not, if it cannot be launched."""
    force(trial)
    try:
        call(trial)()
        torch.cuda.synchronize()
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"
    return None


def milliseconds(trial: Trial, rep: int = 16) -> float | None:
    """The time of the primitive, all its kernels together."""
    from triton.testing import do_bench

    force(trial)
    try:
        ms: float = do_bench(call(trial), warmup=4, rep=rep, return_mode="median")
    except Exception:
        return None
    return ms


def final(timed: list[tuple[float, Trial]]) -> list[tuple[float, Trial]]:
    """The times with the best few measured again, in turns and for longer: of many short timings the least is luck."""
    best = [t for _, t in timed[:FINALISTS]]
    rounds = [[milliseconds(t, rep=60) or math.inf for t in best] for _ in range(3)]
    again = [(statistics.median(times), t) for times, t in zip(zip(*rounds, strict=True), best, strict=True)]
    return sorted(again, key=lambda pair: pair[0]) + timed[FINALISTS:]


def main() -> None:
    """Compile, time, write."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--primitives", nargs="+", default=PRIMITIVES, choices=PRIMITIVES)
    p.add_argument("--head-sizes", type=int, nargs="+", default=[64, 128])
    p.add_argument("--dtypes", nargs="+", default=["bfloat16"], choices=("bfloat16", "tf32", "float32"))
    p.add_argument("--bands", nargs="+", default=["full", "causal"], choices=("full", "causal"))
    p.add_argument("--out", type=Path, default=Path("docs/benchmarks/tiles.json"))
    a = p.parse_args()
    bands = [band == "causal" for band in a.bands]
    trials = [t for c in itertools.product(a.primitives, a.dtypes, a.head_sizes, bands) for t in candidates(*c)]
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(os.cpu_count(), mp_context=spawn) as pool:
        results = list(tqdm(pool.map(compile_one, trials), total=len(trials), desc="compile", mininterval=5))
    usable = [t for t, error in zip(trials, results, strict=True) if error is None]
    print(f"{len(usable)} of {len(trials)} candidates can be launched")

    capability = ".".join(map(str, torch.cuda.get_device_capability()))
    content = json.loads(_tiles.PATH.read_text())
    rows: list[dict[str, Any]] = []
    for group, members in itertools.groupby(usable, key=lambda t: t[:4]):
        primitive, dtype, size, causal = group
        timed = [(ms, t) for t in members if (ms := milliseconds(t)) is not None]
        timed.sort(key=lambda pair: pair[0])
        if not timed:
            continue
        timed = final(timed)
        for ms, t in timed:
            rows.append({**t._asdict(), "ms": ms})
        best = timed[0][1]
        for band in {causal, causal or True not in bands}:
            force(best._replace(causal=band))  # what follows is timed beside the best
        kind = arithmetic(dtype)
        column = content.setdefault(capability, {}).setdefault(primitive, {}).setdefault(kind, {})
        column[str(size)] = [list(map(int, tile)) for tile in _tiles._device(0)[primitive, kind][size]]
        write(content)
        top = ", ".join(f"{(*map(int, t.tile),)} {ms:.3f}" for ms, t in timed[:5])
        print(f"{primitive} {dtype} {size} {'causal' if causal else 'full'}: {top}", flush=True)
    machine = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__}
    before = json.loads(a.out.read_text())["rows"] if a.out.exists() else []
    measured = {t[:3] for t in trials}
    others = [r for r in before if (r["primitive"], r["dtype"], r["head_size"]) not in measured]
    a.out.parent.mkdir(parents=True, exist_ok=True)
    a.out.write_text(json.dumps({"machine": machine, "rows": others + rows}))


def write(content: dict[str, Any]) -> None:
    """The table, one primitive to a line."""
    blocks = []
    for capability, primitives in content.items():
        lines = ",\n".join(f"    {json.dumps(name)}: {json.dumps(column)}" for name, column in primitives.items())
        blocks.append(f"  {json.dumps(capability)}: {{\n{lines}\n  }}")
    _tiles.PATH.write_text("{\n" + ",\n".join(blocks) + "\n}\n")


if __name__ == "__main__":
    main()
