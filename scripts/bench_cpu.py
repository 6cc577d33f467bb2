"""Speed and memory of attention and its derivatives on this CPU: our backends and PyTorch's dense (math) attention.

    python scripts/bench_cpu.py [--lengths 256 1024 4096] [--out docs/benchmarks/cpu]

Times are the least of several runs, alternately in one process: on a shared machine only their ratios are meaningful.
Peak memory is the largest number of live bytes during one call. A backend whose result is not within 1e-4 of dense
attention in float64 is reported as wrong, without times. Writes JSON, a Markdown table and a plot.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
from torch import Tensor
from tqdm import tqdm

import metaattn
from metaattn.cli import bench
from metaattn.cli._derivatives import Attention, derivative
from metaattn.cli._metrics import peak_bytes, relative_error

mpl.use("Agg")
from matplotlib import pyplot as plt

LEGEND = """`dense`: PyTorch's math attention. `speed`: dense time over ours, above 1 is faster. `memory`: ours over
dense, below 1 is less. Each rule includes the passes that it needs."""
# Each rule starts from the inputs.
RULES = {"forward": "fwd", "backward": "grad", "jvp": "jvp", "hvp": "hvp", "double backward": "dbl"}


def attention(name: str, causal: bool) -> Attention:
    """Return the attention of a name."""
    if name == "dense":
        return bench.attention("math", causal)
    return lambda q, k, v: metaattn.sdpa(q, k, v, is_causal=causal, backend=name)


def rule(name: str, f: Attention, tensors: tuple[Tensor, ...]) -> Callable[[], Any]:
    """Return a call of a rule, from three inputs, a cotangent and three tangents."""
    return derivative(RULES[name], f, tensors[:3], tensors[4:], tensors[3])


def seconds(call: Callable[[], Any], repeats: int) -> float:
    """Return the least time of some calls, after one that warms up."""
    call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


def main() -> None:
    """Measure, write and print."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--lengths", type=int, nargs="+", default=[128, 256, 512, 1024, 2048, 4096])
    p.add_argument("--heads", type=int, default=8)
    p.add_argument("--head-size", type=int, default=64)
    p.add_argument("--repeats", type=int, default=3)
    p.add_argument("--backends", nargs="+", default=["reference", "blockwise"])
    p.add_argument("--out", type=Path, default=Path("docs/benchmarks/cpu"))
    a = p.parse_args()
    rows = []
    for n in tqdm(a.lengths, desc="lengths"):
        for causal in (False, True):
            torch.manual_seed(0)
            tensors = torch.randn(7, 1, a.heads, n, a.head_size).unbind()
            wide = tuple(s.double() for s in tensors)
            for name in RULES:
                want = rule(name, attention("dense", causal), wide)() if n <= 1024 else None
                for who in ("dense", *a.backends):
                    call = rule(name, attention(who, causal), tensors)
                    row: dict[str, Any] = {"length": n, "causal": causal, "rule": name, "attention": who}
                    if want is not None:
                        row["error"] = relative_error(call(), want)
                    if row.get("error", 0.0) > 1e-4:
                        row["wrong"] = True
                    else:
                        row |= {"ms": 1e3 * seconds(call, a.repeats), "peak_mib": peak_bytes(call) / 2**20}
                    rows.append(row)
    a.out.parent.mkdir(parents=True, exist_ok=True)
    machine = {
        "cpu": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
        "shape": [1, a.heads, "length", a.head_size],
        "dtype": "float32",
    }
    a.out.with_suffix(".json").write_text(json.dumps({"machine": machine, "rows": rows}, indent=1))
    text = table(rows, a.backends)
    setting = f"1 x {a.heads} heads x length x {a.head_size}, float32, {machine['threads']} threads"
    about = f"{machine['cpu']}, torch {machine['torch']}; {setting}.\n\n{LEGEND}"
    a.out.with_suffix(".md").write_text(f"# CPU\n\n{about}\n\n{text}\n")
    plot(a.out.with_suffix(".png"), rows, a.backends, f"{machine['cpu']}, {setting}, causal")
    print(text)


def table(rows: list[dict[str, Any]], backends: list[str]) -> str:
    """Return a table of each backend's speed and memory relative to dense attention."""
    cells = {(r["length"], r["causal"], r["rule"], r["attention"]): r for r in rows}
    lines = [
        "| length | mask | rule | dense ms | dense MiB | " + " | ".join(f"{b} speed | {b} memory" for b in backends)
    ]
    lines[0] += " |"
    lines.append("|" + "---|" * (5 + 2 * len(backends)))
    for (n, causal, name, who), r in cells.items():
        if who != "dense":
            continue
        line = f"| {n} | {'causal' if causal else 'full'} | {name} | {r['ms']:.1f} | {r['peak_mib']:.0f} |"
        for b in backends:
            o = cells[n, causal, name, b]
            wrong = o.get("wrong")
            line += " wrong | |" if wrong else f" {r['ms'] / o['ms']:.2f}x | {o['peak_mib'] / r['peak_mib']:.2f}x |"
        lines.append(line)
    return "\n".join(lines)


def plot(path: Path, rows: list[dict[str, Any]], backends: list[str], title: str) -> None:
    """Plot time and peak memory against length, one column for each rule, causal."""
    figure, axes = plt.subplots(2, len(RULES), figsize=(3.4 * len(RULES), 6.2), sharex=True)
    for column, name in enumerate(RULES):
        for who in ("dense", *backends):
            part = [r for r in rows if r["rule"] == name and r["attention"] == who and r["causal"] and "ms" in r]
            lengths = [r["length"] for r in part]
            axes[0, column].loglog(lengths, [r["ms"] for r in part], "-o", ms=3, label=who, base=2)
            axes[1, column].loglog(lengths, [r["peak_mib"] for r in part], "-o", ms=3, label=who, base=2)
        axes[0, column].set_title(name)
        axes[1, column].set_xlabel("length")
        for axis in axes[:, column]:
            axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel("ms")
    axes[1, 0].set_ylabel("peak MiB")
    axes[0, 0].legend(fontsize=8)
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
