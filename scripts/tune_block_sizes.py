"""Find the fastest block sizes of each Triton kernel on this GPU, and write them into the backend's table.

    python scripts/tune_block_sizes.py [--head-sizes 64 128] [--dtypes bfloat16 tf32] [--primitives backward_jvp_keys]

Candidates compile in parallel, in as many processes as there are cores. Then each is checked against the formulas in
float64 and timed, without a band and with one (a causal mask), and the best few are timed again for longer. With
``--bands full`` the best sizes without a band are used for both. All times go to --out as JSON, together with those of
other devices, primitives, sizes and dtypes; ``metaattn/backends/triton/block_sizes.json`` is updated in place.
"""

from __future__ import annotations

import argparse
import functools
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
from _dtypes import DTYPES, arithmetic, in_float64
from _results import replaced
from torch import Tensor
from tqdm import tqdm

from metaattn.backends import blockwise
from metaattn.backends.base import Backend, BackwardJvpInputs, Operands, Problem, Rows, Tangent, Values
from metaattn.backends.triton import backend, block_sizes, launch
from metaattn.backends.triton.block_sizes import Tile
from metaattn.cli._metrics import largest_error

# A primitive; or, where it has two kernels, one of these, as in block_sizes.json.
KERNELS = (
    "forward",
    "forward_with_jvp",
    "forward_jvp",
    "backward_rows",
    "backward_keys",
    "backward_jvp_rows",
    "backward_jvp_keys",
    "backward_with_jvp_rows",
    "backward_with_jvp_keys",
)
TOKENS = 2048
FINALISTS = 6
BOUNDS = {"bfloat16": 2e-2, "tf32": 3e-3, "float32": 1e-5}  # largest relative error of each result


class Trial(NamedTuple):
    """One candidate for one kernel."""

    primitive: str
    dtype: str
    head_size: int
    causal: bool
    tile: Tile


def candidates(primitive: str, dtype: str, head_size: int, causal: bool) -> Iterator[Trial]:
    """Yield the block sizes to try: accumulators fit into registers; in 16 bits they have 64 rows (Hopper's products).

    A kernel keeps a block of rows, or of keys for ``_keys``, and loops over the others.
    """
    keeps_rows = not primitive.endswith("_keys")
    at_once = primitive in ("forward_with_jvp", "backward_with_jvp_rows", "backward_with_jvp_keys")
    accumulators = (1 if keeps_rows else 2) * (2 if at_once else 1)
    scores = 1 if primitive == "forward" else 4 if "backward_jvp" in primitive else 2
    wide = dtype != "bfloat16"
    few = wide or head_size > 128 or primitive == "backward_with_jvp_keys"
    others = (16, 32, 64) if few else (32, 64, 128)
    splits = (True, False) if causal else (True,)
    in_registers = (False, True) if not wide and head_size <= 128 else (False,)
    # With two warps the compiler uses the older product instructions, which read both factors from registers.
    keeps, warps_of = ((32, 64, 128), (2, 4, 8)) if wide else ((64, 128), (4, 8))
    for kept, other, warps, stages, split, keep in itertools.product(
        keeps, others, warps_of, (1, 2, 3, 4), splits, in_registers
    ):
        # 32-bit registers of a thread for the accumulators and for the tiles that are live at the same time.
        registers = kept * (accumulators * head_size + scores * other) / (32 * warps)
        deep = stages == 3 and (wide or head_size > 128)
        deep |= stages == 4 and not keep
        shallow = stages == 1 and not wide and head_size <= 128
        if 32 <= registers <= 300 and kept >= 16 * warps and not deep and not shallow:
            rows, keys = (kept, other) if keeps_rows else (other, kept)
            yield Trial(primitive, dtype, head_size, causal, Tile(rows, keys, warps, stages, split, keep))


def force(trial: Trial) -> None:
    """Put a candidate into the table in memory, so that it is used."""
    column = block_sizes._for_device(0).setdefault((trial.primitive, arithmetic(trial.dtype)), {})
    full, banded = column.get(trial.head_size, (trial.tile, trial.tile))
    column[trial.head_size] = (full, trial.tile) if trial.causal else (trial.tile, banded)


class Data(NamedTuple):
    """Arguments of a primitive."""

    x: Operands
    t: Tangent
    w: Rows
    values: Values
    values_t: Values


@functools.lru_cache(maxsize=1)
def random(dtype: str, head_size: int) -> Data:
    """Return random arguments. The values are not those of the operands, which does not matter for compilation."""
    heads = max(1, 128 * 64 // head_size)

    def tensor() -> Tensor:
        return torch.randn(1, heads, TOKENS, head_size, device="cuda", dtype=DTYPES[dtype][0])

    x, t, w = Operands(tensor(), tensor(), tensor()), Tangent(tensor(), tensor(), tensor()), Rows(tensor())
    values = Values(tensor(), torch.full((1, heads, TOKENS), 8.0, device="cuda"))
    return Data(x, t, w, values, values)


def exactly(arguments: Data, p: Problem) -> Data:
    """Return the same arguments in float64, with the values that the formulas give."""
    x, t, w = map(in_float64, arguments[:3])
    return Data(x, t, w, *blockwise.backend.forward_with_jvp(p, x, t))


def problem(trial: Trial) -> Problem:
    """Return the problem of a trial, with a band or without one."""
    return Problem(trial.head_size**-0.5, None, 0 if trial.causal else None)


def call(trial: Trial, d: Data, by: Backend = backend) -> Callable[[], Any]:
    """Return a call of the trial's primitive, of our kernels or of another backend."""
    p = problem(trial)
    if trial.primitive == "forward":
        return lambda: by.forward(p, d.x)
    if trial.primitive == "forward_with_jvp":
        return lambda: by.forward_with_jvp(p, d.x, d.t)
    if trial.primitive == "forward_jvp":
        return lambda: by.forward_jvp(p, d.x, d.values, d.t)
    if trial.primitive in ("backward_rows", "backward_keys"):
        return lambda: by.backward(p, d.x, d.values, d.w, bias_grad=False)
    inputs = BackwardJvpInputs(d.values, d.values_t, d.w, d.t)
    if trial.primitive.startswith("backward_jvp"):
        return lambda: by.backward_jvp(p, d.x, inputs)
    return lambda: by.backward_with_jvp(p, d.x, inputs)


def written(primitive: str, results: Any) -> list[Tensor]:
    """Return the results of a primitive that the tuned kernel writes; fused primitives have two sets of results."""
    kinds = [results] if isinstance(results[0], Tensor) else results
    if primitive.endswith("_rows"):
        return [gradients.query for gradients in kinds]
    if primitive.endswith("_keys"):
        return [t for gradients in kinds for t in (gradients.key, gradients.value)]
    return [t for values in kinds for t in values]


def error_of(trial: Trial, d: Data, want: list[Tensor]) -> float:
    """Return the largest relative error of a candidate: for some, ptxas generated wrong code (docs/benchmarks)."""
    force(trial)
    try:
        return largest_error(written(trial.primitive, call(trial, d)()), want)
    except Exception:
        return math.inf


def compile_one(trial: Trial) -> str | None:
    """Compile a candidate into Triton's cache on disk; return the reason if it cannot be launched."""
    force(trial)
    launch._smaller.clear()
    try:
        call(trial, random(trial.dtype, trial.head_size))()
        torch.cuda.synchronize()
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"
    return "does not fit: smaller blocks ran" if any(trial.tile in key for key in launch._smaller) else None


def milliseconds(trial: Trial, d: Data, rep: int = 16) -> float | None:
    """Return the time of the primitive with all its kernels; ``None`` if it fails."""
    from triton.testing import do_bench

    force(trial)
    try:
        ms: float = do_bench(call(trial, d), warmup=4, rep=rep, return_mode="median")
    except Exception:
        return None
    return ms


def final(timed: list[tuple[float, Trial]], d: Data) -> list[tuple[float, Trial]]:
    """Return the times, with the best few measured again, alternately and for longer.

    The least of many short timings is a matter of luck.
    """
    best = [t for _, t in timed[:FINALISTS]]
    rounds = [[milliseconds(t, d, rep=60) or math.inf for t in best] for _ in range(3)]
    again = [(statistics.median(times), t) for times, t in zip(zip(*rounds, strict=True), best, strict=True)]
    return sorted(again, key=lambda pair: pair[0]) + timed[FINALISTS:]


def main() -> None:
    """Compile, time and write."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--primitives", nargs="+", default=KERNELS, choices=KERNELS)
    p.add_argument("--head-sizes", type=int, nargs="+", default=[64, 128])
    p.add_argument("--dtypes", nargs="+", default=["bfloat16"], choices=("bfloat16", "tf32", "float32"))
    p.add_argument("--bands", nargs="+", default=["full", "causal"], choices=("full", "causal"))
    p.add_argument("--out", type=Path, default=Path("docs/benchmarks/block_sizes.json"))
    a = p.parse_args()
    bands = [band == "causal" for band in a.bands]
    trials = [t for c in itertools.product(a.primitives, a.dtypes, a.head_sizes, bands) for t in candidates(*c)]
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(os.cpu_count(), mp_context=spawn) as pool:
        results = list(tqdm(pool.map(compile_one, trials), total=len(trials), desc="compile", mininterval=5))
    usable = [t for t, error in zip(trials, results, strict=True) if error is None]
    print(f"{len(usable)} of {len(trials)} candidates can be launched")

    device, capability = torch.cuda.get_device_name(), ".".join(map(str, torch.cuda.get_device_capability()))
    content = json.loads(block_sizes.PATH.read_text())
    before = json.loads(a.out.read_text())["rows"] if a.out.exists() else []
    rows: list[dict[str, Any]] = []
    for group, same in itertools.groupby(usable, key=lambda t: t[:4]):
        members = list(same)
        primitive, dtype, size, causal = group
        kind = arithmetic(dtype)
        tiles = block_sizes._for_device(0).setdefault((primitive, kind), {})
        before_trials = dict(tiles)
        arguments = random(dtype, size)
        exact = exactly(arguments, problem(members[0]))
        values = (Values(v.out.to(arguments.w.out), v.lse.float()) for v in (exact.values, exact.values_t))
        arguments = Data(*arguments[:3], *values)
        want = written(primitive, call(members[0], exact, blockwise.backend)())
        errors = {t: error_of(t, arguments, want) for t in members}
        wrong = [t for t in members if not errors[t] < BOUNDS[dtype]]
        for t in wrong:
            print(f"WRONG by {errors[t]:.1e}, left out: {t}", flush=True)
        timed = [(ms, t) for t in members if t not in wrong and (ms := milliseconds(t, arguments)) is not None]
        timed = final(sorted(timed, key=lambda pair: pair[0]), arguments)
        rows += [{**t._asdict(), "ms": ms, "device": device} for ms, t in timed]
        rows += [{**t._asdict(), "wrong": f"{errors[t]:.1e}", "device": device} for t in wrong]
        save(a.out, before, rows)
        tiles.clear()
        tiles.update(before_trials)
        if not timed:
            continue
        best = timed[0][1]
        for band in {causal, causal or True not in bands}:
            force(best._replace(causal=band))  # later trials are timed with the best of the earlier ones
        column = content.setdefault(capability, {}).setdefault(primitive, {}).setdefault(kind, {})
        column[str(size)] = [list(map(int, tile)) for tile in tiles[size]]
        write(content)
        top = ", ".join(f"{(*map(int, t.tile),)} {ms:.3f}" for ms, t in timed[:5])
        print(f"{primitive} {dtype} {size} {'causal' if causal else 'full'}: {top}", flush=True)


def save(out: Path, before: list[dict[str, Any]], rows: list[dict[str, Any]]) -> None:
    """Write all times. They replace earlier ones of the same device, primitive, dtype, head size and band."""

    def group(row: dict[str, Any]) -> tuple[Any, ...]:
        return row["device"], row["primitive"], row["dtype"], row["head_size"], row["causal"]

    out.parent.mkdir(parents=True, exist_ok=True)
    machine = {"torch": torch.__version__, "triton": triton.__version__}
    out.write_text(json.dumps({"machine": machine, "rows": replaced(before, rows, group)}))


def write(content: dict[str, Any]) -> None:
    """Write the table of block sizes, one primitive per line."""
    blocks = []
    for capability, primitives in content.items():
        lines = ",\n".join(f"    {json.dumps(name)}: {json.dumps(column)}" for name, column in primitives.items())
        blocks.append(f"  {json.dumps(capability)}: {{\n{lines}\n  }}")
    block_sizes.PATH.write_text("{\n" + ",\n".join(blocks) + "\n}\n")


if __name__ == "__main__":
    main()
