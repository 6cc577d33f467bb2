"""Time matrix products with tangents (``metaattn.backends.matmul_jvp``) by block sizes, and PyTorch's kernels.

    python scripts/tune_matmul_jvp.py [--out docs/benchmarks/matmul_jvp.json] [--dtype bfloat16]

Shapes are those of a linear layer with one weight for each task: ``x w^T`` with tangents, both gradients with tangents
(that of the weight without its value), and both gradients without. Block sizes compile in parallel; then each is
checked against float64 and timed as a replayed CUDA graph. Prints the best few and the time of PyTorch's kernels. The
block sizes in ``metaattn/backends/triton/matmul_jvp.py`` are set by hand from these results. Times of other devices,
dtypes and shapes in --out are kept.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
import triton
from _dtypes import in_float64
from _results import replaced
from torch import Tensor
from tqdm import tqdm
from triton.testing import do_bench

from metaattn.backends.matmul_jvp import Product, in_pytorch
from metaattn.backends.triton import matmul_jvp
from metaattn.backends.triton.matmul_jvp import Blocks, multiply
from metaattn.cli._metrics import largest_error

# Tasks, rows of each, width. Layers map width to width, to three and four times the width, and back.
SIZES = [(16, 320, 128), (8, 2560, 256), (8, 160, 64), (32, 80, 64), (4, 4096, 256), (1, 8192, 512)]
LAYERS = [(1, 1), (3, 1), (4, 1), (1, 4)]
KINDS = ("forward with tangents", "gradients with tangents", "gradients")
WGMMA = ((64, 64, 4), (64, 128, 4), (128, 64, 4), (128, 64, 8), (128, 128, 8))  # rows, columns, warps
# With fewer rows or warps the compiler uses the older tensor-core instructions, which read factors from registers.
# Hopper's need both factors of a tf32 product contiguous along the sum; Triton transposes others in shared memory.
MMA = ((32, 64, 4), (32, 128, 4), (64, 64, 2), (64, 32, 4), (128, 32, 4))


def tiles_for(dtype: str) -> list[Blocks]:
    """Return the block sizes to try."""
    inner = [(32, 3), (32, 4), (64, 2), (64, 3), (128, 2)]  # inner sizes and stages
    found = [(r, c, i, w, s) for r, c, w in WGMMA for i, s in inner if (r, i) != (128, 128)]
    if dtype == "float32":
        found += [(r, c, i, w, s) for r, c, w in WGMMA for i, s in ((16, 3), (16, 4), (32, 2))]
        found += [(r, c, i, w, s) for r, c, w in MMA for i, s in ((32, 2), (32, 3), (32, 4), (64, 2), (64, 3))]
    return [Blocks(*tile) for tile in found]


REPEATS = 10
BOUND = 1e-2  # largest relative error
Work = tuple[tuple[int, int, int], tuple[int, int], str, str]


def jobs(work: Work) -> list[Product]:
    """Return the products of a kind in a layer, with random factors."""
    (tasks, rows, width), (up, down), kind, dtype = work

    def matrix(*shape: int) -> Tensor:
        return torch.randn(tasks, *shape, device="cuda", dtype=getattr(torch, dtype))

    x, x_t = matrix(rows, down * width), matrix(rows, down * width)
    w, w_t = matrix(up * width, down * width), matrix(up * width, down * width)
    y, y_t = matrix(rows, up * width), matrix(rows, up * width)
    if kind == "forward with tangents":
        return [Product(x, w.mT, x_t, w_t.mT)]
    if kind == "gradients with tangents":
        return [Product(y, w, y_t, w_t), Product(y.mT, x, y_t.mT, x_t, value=False)]
    return [Product(y, w), Product(y.mT, x)]


def all_in_pytorch(products: list[Product]) -> None:
    """Compute the products with PyTorch's kernels."""
    for job in products:
        in_pytorch(job)


def exactly(products: list[Product]) -> list[Tensor]:
    """Return the products in float64."""
    return [t for job in map(in_float64, products) for t in in_pytorch(job)]


def correct(products: list[Product], tile: Blocks, want: list[Tensor]) -> bool:
    """Return whether products with these blocks equal those in float64 up to rounding; print the error if not."""
    error = largest_error(multiply(products, tile) or [], want)
    if not error < BOUND:
        print(f"WRONG by {error:.1e}, left out: {tile}", flush=True)
    return error < BOUND


def compile_one(work: tuple[Work, Blocks]) -> str | None:
    """Compile into Triton's cache on disk; return the reason if it cannot be launched."""
    matmul_jvp._stages.clear()
    try:
        if multiply(jobs(work[0]), work[1]) is None or matmul_jvp._stages:
            return "does not fit"
        torch.cuda.synchronize()
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0][:100]}"
    return None


def milliseconds(call: Callable[[], Any]) -> float:
    """Return the time of a call, from a replayed CUDA graph of REPEATS calls."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(REPEATS):
            call()
    ms: float = do_bench(graph.replay, warmup=2, rep=8, return_mode="median")
    return ms / REPEATS


def main() -> None:
    """Compile, time and write."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", type=Path, default=Path("docs/benchmarks/matmul_jvp.json"))
    p.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    p.add_argument("--sizes", type=int, nargs="+", default=range(len(SIZES)), help="rows of SIZES, from 0")
    a = p.parse_args()
    torch.set_float32_matmul_precision("high")
    works: list[Work] = [(SIZES[i], layer, kind, a.dtype) for i in a.sizes for layer in LAYERS for kind in KINDS]
    tiles = tiles_for(a.dtype)
    spawn, start = multiprocessing.get_context("spawn"), torch.set_float32_matmul_precision
    with ProcessPoolExecutor(os.cpu_count(), spawn, initializer=start, initargs=("high",)) as pool:
        trials = list(itertools.product(works, tiles))
        errors = list(tqdm(pool.map(compile_one, trials), total=len(trials), desc="compile", mininterval=5))
    usable = {trial for trial, error in zip(trials, errors, strict=True) if error is None}
    print(f"{len(usable)} of {len(trials)} can be launched")
    before = json.loads(a.out.read_text()) if a.out.exists() else []
    machine = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__}
    rows: list[dict[str, Any]] = []

    def key(row: dict[str, Any]) -> tuple[Any, ...]:
        return row["device"], row["dtype"], *row["size"], *row["layer"], row["kind"]

    for work in works:
        products = jobs(work)
        row: dict[str, Any] = machine | dict(zip(("size", "layer", "kind", "dtype"), work, strict=True))
        row["PyTorch"] = milliseconds(functools.partial(all_in_pytorch, products))
        want = exactly(products)
        launched = [t for t in tiles if (work, t) in usable and correct(products, t, want)]
        timed = sorted((milliseconds(functools.partial(multiply, products, t)), t) for t in launched)
        rows.append(row | {"ours": timed})
        best = ", ".join(f"{tuple(t)} {ms:.4f}" for ms, t in timed[:4])
        print(f"{work[:3]} PyTorch {row['PyTorch']:.4f}; {best}", flush=True)
        a.out.parent.mkdir(parents=True, exist_ok=True)
        a.out.write_text(json.dumps(replaced(before, rows, key)))


if __name__ == "__main__":
    main()
