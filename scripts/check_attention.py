"""Check the Triton kernels on this GPU against float64; compare errors with PyTorch's math attention in the same dtype.

    python scripts/check_attention.py [--cases 64] [--out docs/benchmarks/check] [--sanitize 6]

Cases have random ragged shapes and use all of the contract, in every dtype, for fwd, bwd, jvp, hvp and dbl. The
relative error (in the 2-norm, over all results) may be at most 1.5 times that of PyTorch's math attention, and 2 times
in one case of a thousand. New memory is NaN, so that missing writes show, and two runs must be bitwise equal. Then it
checks another stream, another device, the replay of a CUDA graph, and more than 2^31 elements. With --sanitize a few of
the cases also run under compute-sanitizer's memcheck and racecheck. Writes JSON; exits with 1 if anything fails.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import random
import subprocess
import sys
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
from _dtypes import DTYPES, arithmetic
from torch import Tensor
from torch.func import jvp
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

import metaattn
from metaattn.cli._derivatives import Attention, derivative
from metaattn.cli._metrics import relative_error

TF32_ERROR = 3 * 2.0**-11
# Lengths that share compiled kernels: these depend on whether blocks divide a length, and whether 16 does.
LENGTHS = {
    "one": range(1, 2),
    "short": range(17, 32, 2),
    "middle": range(33, 128, 2),
    "block": range(64, 65),
    "long": range(129, 700, 2),
    "even": range(128, 641, 128),
}
HEAD_SIZES = (16, 24, 32, 40, 64, 64, 80, 128, 128, 256)  # drawn for the query and, independently, for the value
SHAPES = 4
RULES = ("fwd", "bwd", "jvp", "hvp", "dbl")


class Case(NamedTuple):
    """One random call."""

    seed: int
    dtype: str
    batch: int
    heads: int
    kv_heads: int
    rows: int
    keys: int
    head_size: int
    value_size: int
    kind: str  # full, causal, window, mask, bias
    layout: str  # dense, transposed, expanded


def draw(seed: int, dtype: str) -> Case:
    """Return the case of a seed. SHAPES consecutive ones differ only in their lengths, so that few kernels compile."""
    kind, r = random.Random(seed // SHAPES), random.Random(seed)
    size, value = kind.choice(HEAD_SIZES), kind.choice(HEAD_SIZES)
    kv_heads = kind.choice([1, 2])
    rows, keys = LENGTHS[kind.choice(list(LENGTHS))], LENGTHS[kind.choice(list(LENGTHS)[1:])]
    return Case(
        seed,
        dtype,
        kind.randint(1, 3),
        kv_heads * kind.choice([1, 1, 3]),
        kv_heads,
        r.choice(rows),
        r.choice(keys),
        size,
        value,
        kind.choice(["full", "causal", "window", "mask", "bias"]),
        kind.choice(["dense", "dense", "transposed", "expanded"]),
    )


def inputs(c: Case) -> tuple[list[Tensor], Tensor | None, dict[str, Any]]:
    """Return differentiable inputs (query, key, value and possibly a bias), a boolean mask, and options."""
    dtype = DTYPES[c.dtype][0]
    g = torch.Generator("cuda").manual_seed(c.seed)

    def tensor(*shape: int) -> Tensor:
        if c.layout == "transposed":  # heads after tokens, as a projection leaves them
            b, h, n, d = shape
            return torch.randn(b, n, h, d, device="cuda", generator=g).to(dtype).transpose(1, 2)
        if c.layout == "expanded":  # expanded later, in `spread`: forward mode supports no expanded inputs
            return torch.randn(1, *shape[1:], device="cuda", generator=g).to(dtype)
        return torch.randn(shape, device="cuda", generator=g).to(dtype)

    x = [
        tensor(c.batch, c.heads, c.rows, c.head_size),
        tensor(c.batch, c.kv_heads, c.keys, c.head_size),
        tensor(c.batch, c.kv_heads, c.keys, c.value_size),
    ]
    i, j = torch.arange(c.rows, device="cuda")[:, None], torch.arange(c.keys, device="cuda")
    options: dict[str, Any] = {}
    mask = None
    if c.kind == "causal":
        options["is_causal"] = True
    elif c.kind == "window":
        # Wide enough to the left for the last row to see a key: math attention does not support rows without keys.
        left = max(c.rows - c.keys, 0) + c.seed % 100
        options["window"] = (left, 3)
        mask = (j >= i - left) & (j <= i + 3)
    elif c.kind == "mask":
        mask = torch.rand(c.batch, 1, c.rows, c.keys, device="cuda", generator=g) < 0.7
        mask[..., 0] = True
    elif c.kind == "bias":
        shape = [(c.batch, c.heads, c.rows, c.keys), (1, c.heads, c.rows, c.keys), (c.batch, 1, 1, c.keys)][
            c.seed // SHAPES % 3
        ]
        x.append(torch.randn(shape, device="cuda", generator=g).to(dtype))
    return x, mask, options


def spread(c: Case, x: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Return query, key and value expanded to the whole batch."""
    q, k, v = (t.expand(c.batch, *t.shape[1:]) for t in x[:3])
    return q, k, v


def ours(c: Case, backend: str, mask: Tensor | None, options: dict[str, Any]) -> Attention:
    """Return the operator as a function of the differentiable inputs."""
    shown = None if c.kind == "window" else mask

    def f(*x: Tensor) -> Tensor:
        attn_mask, (q, k, v) = x[3] if len(x) == 4 else shown, spread(c, x)
        return metaattn.sdpa(q, k, v, attn_mask, enable_gqa=True, backend=backend, **options)

    return f


def math_attention(c: Case, mask: Tensor | None, options: dict[str, Any]) -> Attention:
    """Return PyTorch's math attention, with windows as masks."""

    def f(*x: Tensor) -> Tensor:
        attn_mask, (q, k, v) = x[3] if len(x) == 4 else mask, spread(c, x)
        with sdpa_kernel(SDPBackend.MATH):
            return F.scaled_dot_product_attention(
                q, k, v, attn_mask, is_causal=options.get("is_causal", False), enable_gqa=True
            )

    return f


def rule(name: str, f: Attention, x: list[Tensor], t: list[Tensor], w: Tensor) -> list[Tensor]:
    """Return all results of a rule."""
    return tree_leaves(derivative(name, f, x, t, w)())


_lost: list[str] = []  # the error that made the GPU unusable for this process, if there was one


def check(c: Case) -> dict[str, Any] | None:
    """Return the errors of ours and of math attention for every rule, and whether a second run is bitwise equal.

    Return ``None`` if an earlier case has broken the GPU's context: another process must then check this one.
    """
    if _lost:
        return None
    arithmetic(c.dtype)
    warnings.filterwarnings("ignore", message="Attempting to run cuBLAS")  # printed by every backward thread
    # New memory is NaN, so that elements that a kernel does not write show.
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    row: dict[str, Any] = {"case": c._asdict()}
    try:
        x, mask, options = inputs(c)
        g = torch.Generator("cuda").manual_seed(c.seed + 1)
        like = lambda a: torch.randn(a.shape, device="cuda", generator=g).to(a.dtype)  # noqa: E731
        t, w = (
            [like(a) for a in x],
            torch.randn(c.batch, *x[0].shape[1:-1], c.value_size, device="cuda", generator=g).to(x[0].dtype),
        )
        wide = [a.double() for a in x], [a.double() for a in t], w.double()
        for name in RULES:
            want = rule(name, ours(c, "reference", mask, options), *wide)
            got = rule(name, ours(c, "triton", mask, options), x, t, w)
            again = rule(name, ours(c, "triton", mask, options), x, t, w)
            peer = rule(name, math_attention(c, mask, options), x, t, w)
            row[name] = {
                "ours": relative_error(got, want),
                "math": relative_error(peer, want),
                "repeats": all(torch.equal(a, b) for a, b in zip(got, again, strict=True)),
            }
    except Exception as problem:
        row["failed"] = f"{type(problem).__name__}: {str(problem)[:300]}"
        if isinstance(problem, torch.AcceleratorError):
            _lost.append(row["failed"])
    return row


def check_all(cases: list[Case], rows: list[dict[str, Any]], save: Callable[[], None]) -> None:
    """Check all cases in parallel, into ``rows``; after a broken context, check the remaining ones in new processes.

    Results are saved after every group, so that an interrupted run loses at most one.
    """
    spawn = multiprocessing.get_context("spawn")
    done: set[Case] = set()
    with tqdm(total=len(cases), desc="cases", mininterval=10) as bar:
        while left := [c for c in cases if c not in done]:
            with ProcessPoolExecutor(min(16, os.cpu_count() or 1), mp_context=spawn) as pool:
                for c, row in zip(left, pool.map(check, left, chunksize=SHAPES), strict=True):
                    if row is not None:
                        done.add(c)
                        rows.append(row)
                        bar.update()
                        if len(rows) % SHAPES == 0:
                            save()


def other_conditions() -> dict[str, str]:
    """Check streams, graphs, devices and offsets past 2^31; return "ok" or the error for each."""
    results: dict[str, str] = {}

    def attempt(name: str, call: Callable[[], bool]) -> None:
        try:
            results[name] = "ok" if call() else "differs"
        except Exception as problem:
            results[name] = f"{type(problem).__name__}: {str(problem)[-200:]}"

    def tensors(*shape: int) -> list[Tensor]:
        return [torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(6)]

    def hessian_product(q: Tensor, k: Tensor, v: Tensor, *t: Tensor) -> list[Tensor]:
        f = lambda q, k, v: metaattn.sdpa(q, k, v, is_causal=True, backend="triton").square().sum()  # noqa: E731
        return tree_leaves(jvp(torch.func.grad(f, (0, 1, 2)), (q, k, v), t))

    x = tensors(2, 4, 300, 64)
    expected = hessian_product(*x)

    def stream() -> bool:
        torch.cuda.synchronize()
        with torch.cuda.stream(torch.cuda.Stream()):
            got = hessian_product(*x)
        torch.cuda.synchronize()
        return all(map(torch.equal, got, expected))

    def graph() -> bool:
        static = [t.clone() for t in x]
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            got = hessian_product(*static)
        fresh = tensors(2, 4, 300, 64)
        for a, b in zip(static, fresh, strict=True):
            a.copy_(b)
        captured.replay()
        return all(map(torch.equal, got, hessian_product(*fresh)))

    def second_device() -> bool:
        if torch.cuda.device_count() < 2:
            raise RuntimeError("not run: one device")
        got = hessian_product(*(t.to("cuda:1") for t in x))
        return all(torch.equal(a.to("cuda:0"), b) for a, b in zip(got, expected, strict=True))

    def far_offsets() -> bool:
        # More than 2^31 elements in each of query, key and value: the last head must equal that of a small call.
        heads, n, d = 2**14 + 8, 1024, 128
        q = torch.randn(1, heads, n, d, device="cuda", dtype=torch.bfloat16)
        out = metaattn.sdpa(q, q, q, backend="triton")
        return torch.equal(out[:, -1:], metaattn.sdpa(*(q[:, -1:],) * 3, backend="triton"))

    def far_rows() -> bool:
        # A row stride with which the offsets of the last rows exceed 2^31 elements.
        wide = torch.randn(2048, 2**20 + 64, device="cuda", dtype=torch.bfloat16)
        q = wide[None, None, :, -64:]
        c = q.contiguous()
        return torch.equal(metaattn.sdpa(q, q, q, backend="triton"), metaattn.sdpa(c, c, c, backend="triton"))

    attempt("another stream", stream)
    attempt("CUDA graph", graph)
    attempt("another device", second_device)
    attempt("past 2^31 elements, by heads", far_offsets)
    attempt("past 2^31 elements, by rows", far_rows)
    return results


def launch(cases: list[Case]) -> None:
    """Run every rule of our kernels and nothing else, for the sanitizer."""
    for c in cases:
        arithmetic(c.dtype)
        x, mask, options = inputs(c)
        t = [torch.randn_like(a) for a in x]
        w = torch.randn(c.batch, *x[0].shape[1:-1], c.value_size, device="cuda").to(x[0].dtype)
        for name in RULES:
            rule(name, ours(c, "triton", mask, options), x, t, w)
    torch.cuda.synchronize()


def sanitize(cases: int) -> dict[str, str]:
    """Run memcheck and racecheck on cases of the first kinds in each dtype; return "ok" or the end of the report."""
    results = {}
    for tool in ("memcheck", "racecheck"):
        program = [sys.executable, __file__, "--launch", "--cases", str(cases * SHAPES)]
        kernels = ["--kernel-name=kernel_substring=attention_"]
        done = subprocess.run(
            ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", *kernels, *program],
            capture_output=True,
            text=True,
            env=os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        )
        results[tool] = "ok" if done.returncode == 0 else done.stdout[-2000:] + done.stderr[-1000:]
    return results


def main() -> None:
    """Run all checks and print what failed."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--cases", type=int, default=64, help="number of cases of each dtype")
    p.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=DTYPES)
    p.add_argument("--out", type=Path, default=Path("docs/benchmarks/check"))
    p.add_argument(
        "--sanitize", type=int, metavar="CASES", help="number of cases of each dtype under compute-sanitizer"
    )
    p.add_argument(
        "--launch", action="store_true", help="only launch our kernels, in this process (used by --sanitize)"
    )
    a = p.parse_args()
    cases = [draw(seed, dtype) for dtype, seed in itertools.product(a.dtypes, range(a.cases))]
    if a.launch:
        launch(cases[::SHAPES])
        return
    a.out.parent.mkdir(parents=True, exist_ok=True)
    machine = {
        "device": torch.cuda.get_device_name(),
        "torch": str(torch.__version__),
        "triton": triton.__version__,
    }
    rows: list[dict[str, Any]] = []
    conditions: dict[str, str] = {}

    def save() -> None:
        a.out.with_suffix(".json").write_text(json.dumps({"machine": machine, "rows": rows, "conditions": conditions}))

    check_all(cases, rows, save)
    save()
    conditions |= other_conditions()
    save()
    if a.sanitize:
        conditions |= sanitize(a.sanitize)
        save()
    sys.exit(1 if report(rows, conditions) else 0)


def report(rows: list[dict[str, Any]], conditions: dict[str, str]) -> bool:
    """Print a table by dtype and rule, and all failures; return whether there were any."""
    broken = [r for r in rows if "failed" in r]
    for r in broken[:8]:
        print("FAILED", r["case"], r["failed"])
    bad = len(broken)
    print("dtype     rule  cases  worst ours  worst math  worst ratio  above 1.5  not repeatable")
    for dtype, name in itertools.product(DTYPES, RULES):
        here = [(r["case"], r[name]) for r in rows if r["case"]["dtype"] == dtype and name in r]
        if not here:
            continue
        # Errors are compared with at least a tenth of a rounding: math attention with a single key has no error. In
        # tf32 they are compared with at least three roundings, because PyTorch computes small products in float32.
        floor = TF32_ERROR if dtype == "tf32" else 0.1 * torch.finfo(DTYPES[dtype][0]).eps
        ratio = [(e["ours"] / max(e["math"], floor), c) for c, e in here]
        above = sorted(((q, c) for q, c in ratio if not q <= 1.5), key=lambda pair: -pair[0])
        unstable = sum(not e["repeats"] for _, e in here)
        print(
            f"{dtype:9s} {name:5s} {len(here):5d}  {max(e['ours'] for _, e in here):10.1e}  "
            f"{max(e['math'] for _, e in here):10.1e}  {max(q for q, _ in ratio):11.2f}  {len(above):9d}  {unstable}"
        )
        for q, c in above[:2]:
            print(f"    {q:.2f}: {c}")
        allowed = sum(q <= 2 for q, _ in above) <= len(here) / 1000
        bad += bool(unstable) + (len(above) if not allowed else 0)
    for name, result in conditions.items():
        print(f"{name}: {result}")
        bad += result != "ok" and not result.startswith("RuntimeError: not run")
    return bool(bad)


if __name__ == "__main__":
    main()
