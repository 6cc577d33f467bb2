"""Speed and memory of attention and its derivatives on this GPU: ours and other implementations, in one run.

    python scripts/bench_attention.py [--out docs/benchmarks/attention] [--quick] [--parts large]

Rules: fwd; bwd (only the backward pass); jvp (with the forward pass); hvp (jvp of vjp, with all passes); dbl (forward,
backward, double backward with respect to all inputs and the cotangent). TFLOP/s count the products that the mathematics
needs, 2 B H Nq Nk D each, half when causal: 2, 5, 6, 20 and 21. A row whose error on one batch exceeds the bound of its
precision is reported as wrong, without a time. Each call is timed eagerly (``eager``, with the work of the CPU) and as
a replayed CUDA graph (``ms``, the time of the GPU). Writes JSON, a Markdown table and plots.

Parts: large, small and other settings (grouped queries, mask, window, float32), jax, lengths (512 to 131,072) and, on
request only, auto, which writes the table ``metaattn/backends/auto.json`` that backend='auto' uses. Rows of an earlier
run in --out with the same device and versions are kept, except those of the rules and settings that are measured again:
these are replaced for all implementations, so that compared numbers are of the same run.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import _jax_lines
import matplotlib as mpl
import torch
import triton
from _attention import OURS, PRODUCTS, SDPA, SHAPES, SMALL, Setting, compile_all, measure, oracle
from _results import of_machine, replaced
from tqdm import tqdm
from triton.testing import do_bench

from metaattn.backends import auto

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.patches import Rectangle

# Further lengths for auto.json, for which only F and B are measured.
FOR_AUTO = [(512, 16, 128, 32), (64, 16, 512, 32), (8, 16, 2048, 32)]
FOR_AUTO += [(256, 16, 128, 64), (64, 16, 256, 64), (64, 16, 333, 64), (16, 16, 1024, 64)]
FOR_AUTO += [(256, 16, 64, 128), (128, 16, 128, 128), (64, 16, 197, 128), (16, 16, 512, 128), (8, 16, 1024, 128)]
PARTS = ("auto", "large", "small", "other", "jax", "lengths")
LEGEND = """`setting`: batch, heads, tokens, head size. `rule`: forward; only the backward pass; jvp with its forward
pass; hvp, a Hessian-vector product with all passes; dbl, a double backward with all passes. float32 uses tf32
products except where it is "highest". `ms`: time of the GPU, from a replayed CUDA graph. `TFLOP/s`: counts the
products that the mathematics needs, half when causal. `of the ceiling`: relative to a large matrix product on the
same GPU, given in the heading. `eager ms`: time of an eager call, including the CPU. `peak MiB`: above the memory
before the call. `error`: relative, against float64, on one batch."""


def length_rows(quick: bool) -> list[dict[str, Any]]:
    """Measure time and memory against length, 1 x 16 heads x 64, full."""
    rows = []
    top = 15 if quick else 17
    for power in range(9, top + 1):
        s = Setting((1, 16, 2**power, 64), False)
        for who, name in itertools.product(("metaattn auto", "SDPA math", "SDPA flash"), PRODUCTS):
            if (who == "SDPA math" and power > 13) or (who == "SDPA flash" and name not in ("fwd", "bwd")):
                continue
            rows.append(measure(who, name, s, quick=True))
    return rows


def matrix_product_tflops() -> float:
    """Return the TFLOP/s of a large matrix product on this GPU, with random data."""
    x = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    return 2 * 8192**3 / do_bench(lambda: x @ x, return_mode="median") / 1e9


def main() -> None:
    """Measure, write and print."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", type=Path, default=Path("docs/benchmarks/attention"))
    p.add_argument("--quick", action="store_true", help="shorter timings, lengths up to 32,768")
    p.add_argument("--parts", nargs="+", default=PARTS[1:], choices=PARTS)
    p.add_argument("--rules", nargs="+", default=list(PRODUCTS), choices=PRODUCTS)
    p.add_argument(
        "--settings",
        nargs="+",
        default=[""],
        metavar="TEXT",
        help="only settings whose label contains one of the texts",
    )
    a = p.parse_args()
    a.out.parent.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    ceiling = matrix_product_tflops()
    machine = {
        "device": torch.cuda.get_device_name(),
        "torch": str(torch.__version__),
        "triton": triton.__version__,
        "matrix_product_tflops": ceiling,
    }
    if "auto" in a.parts:
        choose_automatically(a.quick)
    rows: list[dict[str, Any]] = []
    runs, run = of_machine(a.out.with_suffix(".json"), machine, versions=("torch", "triton"))
    before = run["rows"]

    def save(rows: list[dict[str, Any]]) -> None:
        run["rows"] = replaced(before, rows, lambda row: (row["setting"], row["rule"]))
        write(a.out, runs)

    if {"large", "small", "other"} & set(a.parts):
        setting_rows(rows, a, save)
    if "jax" in a.parts and importlib.util.find_spec("jax"):
        for row in _jax_lines.rows("_bench_jax.py", json.dumps(SHAPES[:2] + SHAPES[3:4])):
            rows.append(row)
            save(rows)  # after every row, so that an interrupted run loses nothing
    if rows:
        save(rows)
        plot_speed(a.out.with_suffix(".png"), run["rows"], machine)
        print("\n".join(verdict(run["rows"])))
    if "lengths" in a.parts:
        lengths = length_rows(a.quick)
        (a.out.with_name(a.out.name + "_lengths.json")).write_text(json.dumps({"machine": machine, "rows": lengths}))
        plot_lengths(a.out.with_name(a.out.name + "_lengths.png"), lengths, machine["device"])


def setting_rows(rows: list[dict[str, Any]], a: argparse.Namespace, save: Callable[..., Any]) -> None:
    """Measure every rule of every implementation in every setting; add the results to the rows."""
    large = [Setting(shape, causal) for shape in SHAPES for causal in (False, True)]
    small = [Setting(shape, causal) for shape in SMALL for causal in (False, True)]
    other = [
        Setting(SHAPES[1], True, kv_heads=4),
        Setting(SHAPES[1], False, mask=True),
        Setting((1, 16, 32768, 64), True, window=4096),
    ]
    with_flex = [*large[2:4], other[0], other[2]]
    other += [
        Setting(shape, causal, torch.float32, precision=precision)
        for precision in ("high", "highest")
        for shape in (SHAPES[1], SHAPES[3])
        for causal in (False, True)
    ]
    settings = large * ("large" in a.parts) + small * ("small" in a.parts) + other * ("other" in a.parts)
    settings = [s for s in settings if any(text in s.label() for text in a.settings)]
    compile_all([(s, a.rules) for s in settings])
    for s in settings:
        peers = [*OURS, *SDPA] if s.window is None else [*OURS]
        peers += ["FlexAttention"] * (s in with_flex)
        for who, name in itertools.product(peers, a.rules):
            # The others have no second derivatives; tests/boundaries tries them.
            if who not in (*OURS, "SDPA math") and name not in ("fwd", "bwd"):
                continue
            rows.append(measure(who, name, s, a.quick))
        save(rows)
        oracle.cache_clear()
        print("\n".join(table([r for r in rows if r["setting"] == s.label()], math.nan)[2:]), flush=True)


def choose_automatically(quick: bool) -> None:
    """Time F and B, ours and cuDNN's, over many lengths; write the table that backend='auto' uses."""
    settings = [Setting(shape, causal) for shape in FOR_AUTO + SMALL + SHAPES for causal in (False, True)]
    compile_all([(s, ["fwd", "bwd"]) for s in settings])
    trials = itertools.product(settings, ("metaattn triton", "SDPA cuDNN"), ("fwd", "bwd"))
    rows = [measure(who, name, s, quick) for s, who, name in tqdm(list(trials), desc="auto", mininterval=10)]
    capability = "{}.{}".format(*torch.cuda.get_device_capability())
    content = json.loads(auto.PATH.read_text()) | {capability: ratios(rows)}
    auto.PATH.write_text(json.dumps(content, indent=1) + "\n")
    auto._table.cache_clear()
    print(json.dumps(content))


def ratios(rows: list[dict[str, Any]]) -> dict[str, dict[str, dict[str, dict[str, float]]]]:
    """Return the time of our kernels over cuDNN's, by primitive, head size, band and tokens."""
    times: dict[tuple[str, str, str], dict[int, dict[str, float]]] = {}
    for r in rows:
        if "ms" in r:
            key = (r["rule"], str(r["shape"][3]), "causal" if r["causal"] else "full")
            times.setdefault(key, {}).setdefault(r["shape"][2], {})[r["who"]] = r["ms"]
    found: dict[str, dict[str, dict[str, dict[str, float]]]] = {"forward": {}, "backward": {}}
    for (rule_name, size, band), by_tokens in sorted(times.items()):
        column = {
            str(tokens): round(by["metaattn triton"] / by["SDPA cuDNN"], 3)
            for tokens, by in sorted(by_tokens.items())
            if len(by) == 2
        }
        if column:
            found[{"fwd": "forward", "bwd": "backward"}[rule_name]].setdefault(size, {})[band] = column
    return found


def verdict(rows: list[dict[str, Any]]) -> list[str]:
    """Return our TFLOP/s by setting, and our time over PyTorch's fastest kernel and over its FlashAttention-2."""
    lines = [
        "setting | auto: fwd bwd jvp hvp dbl | triton: the same | auto / best peer: fwd bwd | triton / FA2: fwd bwd"
    ]
    for label in dict.fromkeys(r["setting"] for r in rows if r["who"] in OURS):
        by = {(r["who"], r["rule"]): r for r in rows if r["setting"] == label and "ms" in r}
        if ("metaattn auto", "fwd") not in by:
            continue
        parts = [" ".join(f"{by[who, n]['tflops']:.0f}" if (who, n) in by else "-" for n in PRODUCTS) for who in OURS]
        for who, peers in (("metaattn auto", list(SDPA)), ("metaattn triton", ["SDPA flash"])):
            times = []
            for name in ("fwd", "bwd"):
                best = min((by[peer, name]["ms"] for peer in peers if (peer, name) in by), default=math.nan)
                times.append(f"{by[who, name]['ms'] / best:.2f}" if (who, name) in by else "-")
            parts.append(" ".join(times))
        lines.append(" | ".join([label, *parts]))
    return lines


def write(out: Path, runs: list[dict[str, Any]]) -> None:
    """Write JSON and tables. Called after every setting, so that an interrupted run loses nothing."""
    out.with_suffix(".json").write_text(json.dumps(runs, indent=0))
    lines = ["# Attention on a GPU", "", LEGEND]
    for run in runs:
        machine = run["machine"]
        about = "## {device}, torch {torch}, Triton {triton}: {matrix_product_tflops:.0f} TFLOP/s"
        lines += ["", about.format(**machine), ""]
        lines += [run["note"], ""] if "note" in run else []  # written by hand
        lines += table(run["rows"], machine["matrix_product_tflops"])
    out.with_suffix(".md").write_text("\n".join(lines) + "\n")


def table(rows: list[dict[str, Any]], ceiling: float) -> list[str]:
    """Return the lines of a Markdown table."""
    lines = [
        "| setting | rule | who | ms | TFLOP/s | of the ceiling | eager ms | peak MiB | error |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        head = f"| {r['setting']} | {r['rule']} | {r['who']} |"
        if "failed" in r:
            lines.append(f"{head} {r['failed']} | | | | | |")
            continue
        error = f"{r['error']:.1e}" if "error" in r else ""
        share = f"{100 * r['tflops'] / ceiling:.0f}%"
        memory = f"{r['peak_mib']:.0f}" if "peak_mib" in r else ""
        eager = f"{r['eager_ms']:.3f}" if "eager_ms" in r else ""
        lines.append(f"{head} {r['ms']:.3f} | {r['tflops']:.0f} | {share} | {eager} | {memory} | {error} |")
    return lines


def plot_speed(path: Path, rows: list[dict[str, Any]], machine: dict[str, Any]) -> None:
    """Plot the TFLOP/s of each rule for the large shapes in bfloat16."""
    figure, axes = plt.subplots(2, len(SHAPES), figsize=(3.6 * len(SHAPES), 6.4), sharey=True)
    names = [*OURS, *SDPA, "FlexAttention", "JAX XLA"]
    colours = dict(zip(names, [f"C{i}" for i in range(10)], strict=False))
    for (row, causal), (column, shape) in itertools.product(enumerate((False, True)), enumerate(SHAPES)):
        axis, label = axes[row, column], Setting(shape, causal).label()
        for i, name in enumerate(PRODUCTS):
            here = [r for r in rows if r["setting"] == label and r["rule"] == name and "tflops" in r]
            for k, r in enumerate(here):
                width = 0.8 / max(1, len(here))
                axis.bar(i - 0.4 + (k + 0.5) * width, r["tflops"], width, color=colours[r["who"]])
        axis.set_xticks(range(len(PRODUCTS)), list(PRODUCTS))
        axis.set_title("{} x {} x {} x {}, {}".format(*shape, "causal" if causal else "full"), fontsize=9)
        axis.grid(axis="y", alpha=0.3)
    for row in axes:
        row[0].set_ylabel("TFLOP/s")
    shown = [n for n in names if any(r["who"] == n and "tflops" in r for r in rows)]
    handles = [Rectangle((0, 0), 1, 1, color=colours[n]) for n in shown]
    figure.legend(handles, shown, ncols=len(shown), loc="lower center", fontsize=8, frameon=False)
    figure.suptitle(
        f"{machine['device']}, bfloat16, batch x heads x tokens x head size; a large matrix product reaches "
        f"{machine['matrix_product_tflops']:.0f} TFLOP/s; no bar: not supported, out of memory or not measured"
    )
    figure.tight_layout(rect=(0, 0.04, 1, 1))
    figure.savefig(path, dpi=110)


def plot_lengths(path: Path, rows: list[dict[str, Any]], device: str) -> None:
    """Plot time and peak memory against length."""
    figure, axes = plt.subplots(2, len(PRODUCTS), figsize=(3.4 * len(PRODUCTS), 6.2), sharex=True)
    for column, name in enumerate(PRODUCTS):
        for who in dict.fromkeys(r["who"] for r in rows):
            part = [r for r in rows if r["rule"] == name and r["who"] == who and "ms" in r]
            lengths = [r["shape"][2] for r in part]
            axes[0, column].loglog(lengths, [r["ms"] for r in part], "-o", ms=3, label=who, base=2)
            axes[1, column].loglog(lengths, [r["peak_mib"] for r in part], "-o", ms=3, label=who, base=2)
        axes[0, column].set_title(name)
        axes[1, column].set_xlabel("tokens")
        for axis in axes[:, column]:
            axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel("ms")
    axes[1, 0].set_ylabel("peak MiB")
    axes[0, 0].legend(fontsize=8)
    figure.suptitle(f"{device}: 1 x 16 heads x 64, bfloat16, full")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
