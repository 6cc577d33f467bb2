"""One second-order MAML step on this GPU, ours beside the peers, in one run.

    python scripts/bench_meta.py [--out docs/benchmarks/meta] [--quick] [--parts steps] [--device cpu --tiny]

The model is a causal Transformer on random sequences, without biases and norm weights, as in the program for JAX. A
problem has seven sizes: ``tasks, sequences, tokens, layers, width, heads, inner steps``. The rows are

* ours in reverse and mixed mode, eager and as a replayed CUDA graph; mixed mode also compiled by Inductor, then also
  with half of the tasks at a time (``chunk_size``) and with rematerialised blocks;
* torch.func with PyTorch's math attention in the same model, eager and as a graph;
* a loop over tasks with that attention, and learn2learn's MAML where it is installed;
* JAX jit, in a second process.

Measured are the time of a step, its peak memory above what was allocated before, and the seconds until the first step
is done, with compilation (except for kernels that an earlier row or an earlier run compiled). Each row also computes
a small problem. If its error there, against float64, exceeds the bound of the dtype and twice the error of math
attention in the same dtype, the row is reported as wrong, without a time. ``--profile`` adds the number and time of a
step's kernels, by kind. ``--parts`` selects the table, JAX, and the plots of time and memory against inner steps (1
to 64) and tokens (64 to 16,384); ``--who``, ``--sizes`` and ``--dtypes`` select rows. Writes JSON, tables (Markdown)
and plots. Results of earlier runs in --out stay, except for problems and plots that are measured again on the same
device with the same PyTorch.
"""

from __future__ import annotations

import argparse
import functools
import gc
import importlib.util
import json
import re
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import _jax_lines
import matplotlib as mpl
import torch
import torch.nn.functional as F
from _results import of_machine, replaced
from torch import Tensor
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

import metaattn
from metaattn.cli._metrics import relative_error
from metaattn.compile import capture
from metaattn.compile.capture import Mode
from metaattn.meta import GradientBased, maml

mpl.use("Agg")
from matplotlib import pyplot as plt

LEARNING_RATE = 0.01
BOUND = {torch.bfloat16: 5e-2, torch.float32: 5e-3, torch.float64: 1e-9}  # float32 with tf32 products
WORST = 0.2  # the largest error allowed, whatever that of math attention
PARTS = ("table", "jax", "steps", "tokens")
MODE: dict[str, Mode] = {"graph": "graph", "captured+inductor": "inductor"}
OPTIONS: dict[str, Any] = {}  # Inductor's
LEGEND = """`setting`: tasks, sequences, tokens, layers, width, heads, inner steps. The model is that of the JAX
program: no biases, no norm weights. `peak MiB`: above what was allocated before the step; JAX's is what its compiler
reports. `first step`: until its result is ready, with recording and compiling. `error`: of the meta-gradient,
relative, against float64, in a reduced problem (2 tasks of 2 sequences of at most 48 tokens; one inner step in
bfloat16, at most two in float32)."""
KINDS = {  # of kernels, by their names
    "attention": "^(attention_(forward|backward)|values|by_row|by_key|by_bias)|cudnn_generated",
    "fused by Inductor": "^triton_",
    "matrix products": "^(matmul_jvp|products)|gemm|gemv|nvjet|cutlass|xmma|splitK",
}
Gradient = dict[str, Tensor]
Step = Callable[[], Gradient]


class Problem(NamedTuple):
    """The sizes of a meta-step."""

    tasks: int
    sequences: int
    tokens: int
    layers: int
    width: int
    heads: int
    steps: int
    dtype: torch.dtype

    def label(self) -> str:
        """Return the sizes and the dtype as text."""
        return f"{','.join(map(str, self[:7]))} {str(self.dtype)[6:]}"


SIZES = [
    (16, 5, 64, 4, 128, 2, 5),
    (8, 5, 512, 4, 256, 4, 1),
    (8, 5, 512, 4, 256, 4, 5),
    (4, 2, 2048, 4, 256, 4, 1),
    (2, 1, 8192, 4, 256, 4, 1),
]
TINY = [(2, 2, 16, 2, 16, 2, 2)]
WHO = [
    "metaattn reverse",
    "metaattn mixed",
    "metaattn reverse, graph",
    "metaattn mixed, graph",
    "metaattn mixed, captured+inductor",
    "metaattn mixed, two chunks, captured+inductor",
    "metaattn mixed, remat, captured+inductor",
    "torch.func, math",
    "torch.func, math, graph",
    "loop over tasks, math",
]
LEARN2LEARN = "loop over tasks, learn2learn, math"
WHO += [LEARN2LEARN] * (importlib.util.find_spec("learn2learn") is not None)


SWEPT = [
    "metaattn reverse",
    "metaattn mixed",
    "metaattn reverse, graph",
    "metaattn mixed, graph",
    "torch.func, math",
    "torch.func, math, graph",
]


def math_attention(q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Compute PyTorch's math attention, with the arguments of :func:`metaattn.sdpa`."""
    kwargs.pop("window", None)
    kwargs.pop("backend", None)
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(q, k, v, *args, **kwargs)


def build(p: Problem, who: str, device: torch.device) -> Step:
    """Return a function that computes the meta-gradient of the initial parameters, to be timed."""
    torch.manual_seed(0)
    attention = math_attention if "math" in who else metaattn.sdpa
    model = metaattn.Transformer(
        input="continuous",
        in_features=1,
        output="per_token",
        out_features=1,
        dim=p.width,
        depth=p.layers,
        heads=p.heads,
        mlp_ratio=4.0,
        norm_affine=False,
        bias=False,
        causal=True,
        position="learned",
        max_length=p.tokens,
        remat="remat" in who,
        backend="reference" if who == "oracle" else None,
        attention=attention,
    )
    head = model.get_parameter("head.weight")
    torch.nn.init.normal_(head, std=p.width**-0.5)  # at zero no gradient would reach the rest
    params = {k: t.detach().to(device, p.dtype) for k, t in model.named_parameters()}
    model.to(device, p.dtype)
    g = torch.Generator().manual_seed(1)
    support, query = (
        (torch.randn(p.tasks, p.sequences, p.tokens, 1, generator=g, dtype=torch.float64).to(device, p.dtype),)
        for _ in range(2)
    )

    def error(y: Tensor, x: Tensor) -> Tensor:
        return (y[..., :-1, :].float() - x[..., 1:, :].float()).square().mean()

    def loss(params: Gradient, x: Tensor) -> Tensor:
        return error(functional_call(model, params, (x,)), x)

    if who == "oracle":

        def exact_loss(params: Gradient, x: Tensor) -> Tensor:
            return (functional_call(model, params, (x,))[..., :-1, :] - x[..., 1:, :]).square().mean()

        return functional_step(maml(exact_loss, steps=p.steps, learning_rate=LEARNING_RATE), params, support, query)
    if who == LEARN2LEARN:
        return learn2learn_loop(p, model, error, support[0], query[0])
    if who.startswith("loop"):
        return loop(p, loss, params, support[0], query[0])
    learner = maml(loss, steps=p.steps, learning_rate=LEARNING_RATE, gradient="mixed" if "mixed" in who else "reverse")
    chunk_size = -(-p.tasks // 2) if "two chunks" in who else None
    mode = MODE.get(who.rpartition(", ")[2])
    return functional_step(learner, params, support, query, mode=mode, chunk_size=chunk_size)


def functional_step(
    learner: GradientBased,
    params: Gradient,
    support: Any,
    query: Any,
    *,
    mode: Mode | None = None,
    chunk_size: int | None = None,
) -> Step:
    """Return a step over all tasks by vmap, or over ``chunk_size`` at a time; captured if a mode is given."""
    eager = functools.partial(learner.value_and_grad, chunk_size=chunk_size)
    captured = capture(eager, mode=mode or "none", options=OPTIONS if mode == "inductor" else None)
    step = captured if mode else eager
    meta = {"params": params, "rates": {}}

    def call() -> Gradient:
        gradient: Gradient = step(meta, support, query)[1]["params"]
        problems = [captured.reason, *(captured.compiler.reasons.values() if captured.compiler else ())]
        if mode and any(problems):
            raise RuntimeError(f"not captured or compiled: {problems}")
        return gradient

    return call


def loop(p: Problem, loss: Callable[..., Tensor], params: Gradient, support: Tensor, query: Tensor) -> Step:
    """Return a step that takes one task after the other by plain autograd, as older libraries do."""

    def call() -> Gradient:
        leaves = {k: t.detach().requires_grad_() for k, t in params.items()}
        total = {k: torch.zeros_like(t) for k, t in params.items()}
        for s, q in zip(support, query, strict=True):
            adapted = leaves
            for _ in range(p.steps):
                gradient = torch.autograd.grad(loss(adapted, s), list(adapted.values()), create_graph=True)
                adapted = {k: t - LEARNING_RATE * d for (k, t), d in zip(adapted.items(), gradient, strict=True)}
            last = torch.autograd.grad(loss(adapted, q), list(leaves.values()))
            total = {k: t + d / p.tasks for (k, t), d in zip(total.items(), last, strict=True)}
        return total

    return call


def learn2learn_loop(
    p: Problem, model: torch.nn.Module, error: Callable[[Tensor, Tensor], Tensor], support: Tensor, query: Tensor
) -> Step:
    """Return a step by learn2learn's MAML, one task after the other."""
    from learn2learn.algorithms import MAML

    algorithm = MAML(model, lr=LEARNING_RATE)

    def call() -> Gradient:
        algorithm.zero_grad()
        for s, q in zip(support, query, strict=True):
            adapted = algorithm.clone()
            for _ in range(p.steps):
                adapted.adapt(error(adapted(s), s))
            (error(adapted(q), q) / p.tasks).backward()
        return {k: t.grad for k, t in model.named_parameters() if t.grad is not None}

    return call


@functools.cache
def oracle(p: Problem) -> Gradient:
    """Return the exact meta-gradient of a small problem: dense attention, reverse mode, float64, on the CPU."""
    return build(p._replace(dtype=torch.float64), "oracle", torch.device("cpu"))()


def small_error(p: Problem, who: str, device: torch.device) -> float:
    """Return the relative error of the meta-gradient of the same model on a small problem.

    In 16 bits it has one inner step: a second step would start from parameters rounded to 16 bits, and that rounding
    moves the meta-gradient by 15 to 35% in every implementation. In float32 it has two.
    """
    steps = min(p.steps, 2 if p.dtype.itemsize > 2 else 1)
    return _error(p._replace(tasks=2, sequences=2, tokens=min(p.tokens, 48), steps=steps), who, device)


@functools.cache
def _error(p: Problem, who: str, device: torch.device) -> float:
    return relative_error(build(p, who, device)(), oracle(p._replace(dtype=torch.float64)))


def wait(device: torch.device) -> None:
    """Wait until the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def kernels(step: Step, device: torch.device) -> dict[str, Any]:
    """Return the number and milliseconds of a step's kernels, by kind and, for the twenty slowest, by name."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        step()
        wait(device)
    names: dict[str, list[float]] = {e.key: [e.count, e.self_device_time_total / 1e3] for e in profiler.key_averages()}
    kinds: dict[str, list[float]] = {}
    for name, (count, ms) in names.items():
        kind = next((kind for kind, pattern in KINDS.items() if re.search(pattern, name)), "others")
        total = kinds.setdefault(kind, [0, 0.0])
        total[:] = [total[0] + count, total[1] + ms]
    slowest = sorted(names.items(), key=lambda item: -item[1][1])[:20]
    return {"kinds": kinds, "slowest": dict(slowest)}


def measure(p: Problem, who: str, device: torch.device, seconds: float, profile: bool = False) -> dict[str, Any]:
    """Measure one row of the table."""
    row: dict[str, Any] = {"who": who, "setting": p.label(), "sizes": p[:7]}
    try:
        step = build(p, who, device)
        wait(device)
        before = torch.cuda.memory_allocated() if device.type == "cuda" else 0
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        step()
        wait(device)
        row["first_s"] = time.perf_counter() - start
        if device.type == "cuda":
            row["peak_mib"] = (torch.cuda.max_memory_allocated() - before) / 2**20
        row["error"] = small_error(p, who, device)
        if not row["error"] < min(WORST, max(BOUND[p.dtype], 2 * small_error(p, "torch.func, math", device))):
            return row | {"failed": f"wrong: relative error {row['error']:.1e}"}
        times: list[float] = []
        while sum(times) < seconds or (len(times) < 3 and sum(times) < 10 * seconds):
            start = time.perf_counter()
            step()
            wait(device)
            times.append(time.perf_counter() - start)
        row["ms"] = 1e3 * statistics.median(times)
        if profile:
            row["kernels"] = kernels(step, device)
    except Exception as error:  # the row says what a peer cannot do
        row["failed"] = f"{type(error).__name__}: {str(error).splitlines()[0][:100] if str(error) else ''}"
    finally:
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return row


def sweep(
    name: str, values: list[int], start: Problem, device: torch.device, seconds: float
) -> Iterator[dict[str, Any]]:
    """Measure ours and torch.func over a range of one size, and yield each row."""
    failed: set[str] = set()
    for value in tqdm(values, desc=name, mininterval=5):
        p = start._replace(steps=value) if name == "steps" else start._replace(tokens=value)
        for who in SWEPT:
            if who not in failed:  # one that ran out of memory would do so at the next size too
                row = {name: value, **measure(p, who, device, seconds)}
                failed |= {who} if "failed" in row else set()
                yield row


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Return the lines of a Markdown table."""
    lines = ["| setting | who | ms | peak MiB | first step, s | error |", "|---|---|---|---|---|---|"]
    for r in rows:
        if "failed" in r:
            lines.append(f"| {r['setting']} | {r['who']} | {r['failed']} | | | |")
            continue
        memory = f"{r['peak_mib']:.0f}" if "peak_mib" in r else ""
        first = f"{r['first_s']:.1f}" if "first_s" in r else ""
        error = f"{r['error']:.1e}" if "error" in r else ""
        lines.append(f"| {r['setting']} | {r['who']} | {r['ms']:.2f} | {memory} | {first} | {error} |")
    return lines


def write(out: Path, runs: list[dict[str, Any]]) -> None:
    """Write the JSON file and the page; called after every row, so that an interrupted run loses nothing."""
    out.with_suffix(".json").write_text(json.dumps(runs, indent=0))
    lines = ["# One meta-step", "", LEGEND]
    for run in runs:
        lines += ["", f"## {run['machine']['device']}, torch {run['machine']['torch']}", "", *table(run["rows"])]
        for section in run.get("earlier", ()):  # added by hand, to compare newer rows with
            lines += ["", f"### {section['title']}", "", *table(section["rows"])]
    out.with_suffix(".md").write_text("\n".join(lines) + "\n")


def title(p: Problem, name: str) -> str:
    """Return the title of a plot: the sizes that stay the same in it."""
    parts = {"tasks": p.tasks, "sequences": p.sequences, "tokens": p.tokens, "inner steps": p.steps}
    varied = "inner steps" if name == "steps" else name
    shown = {part: count for part, count in parts.items() if part != varied}
    sizes = ", ".join(f"{count} {part.rstrip('s') if count == 1 else part}" for part, count in shown.items())
    return f"{sizes}, {p.layers} layers of {p.width}, {str(p.dtype)[6:]}"


def plot(path: Path, name: str, rows: list[dict[str, Any]], title: str) -> None:
    """Plot time and memory against one size."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.4))
    for who in dict.fromkeys(r["who"] for r in rows):
        part = [r for r in rows if r["who"] == who and "ms" in r]
        for axis, key in zip(axes, ("ms", "peak_mib"), strict=True):
            measured = [r for r in part if key in r]
            axis.loglog([r[name] for r in measured], [r[key] for r in measured], "-o", ms=4, label=who, base=2)
    for axis, label in zip(axes, ("ms", "peak MiB"), strict=True):
        axis.set(xlabel="inner steps" if name == "steps" else "tokens", ylabel=label)
        axis.grid(alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), ncols=3, loc="lower center", fontsize=8, frameon=False)
    figure.suptitle(title)
    figure.tight_layout(rect=(0, 0.1, 1, 1))
    figure.savefig(path, dpi=110)


def main() -> None:
    """Measure what the command line selects, and write and print the results."""
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a.add_argument("--out", type=Path, default=Path("docs/benchmarks/meta"))
    a.add_argument("--quick", action="store_true", help="fewer repetitions")
    a.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS)
    a.add_argument("--who", nargs="+", default=WHO, choices=WHO, help="rows of the table")
    a.add_argument("--sizes", type=int, nargs="+", default=range(len(SIZES)), help="rows of SIZES, from 0")
    a.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"], choices=("bfloat16", "float32"))
    a.add_argument("--profile", action="store_true", help="count and time the kernels of a step")
    a.add_argument(
        "--inductor", nargs="+", default=[], metavar="KEY=VALUE", help="Inductor's options, such as combo_kernels=true"
    )
    a.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    a.add_argument("--tiny", action="store_true", help="one small problem, to check that the script runs")
    options = a.parse_args()
    device, seconds = torch.device(options.device), 0.3 if options.quick else 1.5
    OPTIONS.update((key, json.loads(value)) for key, value in (text.split("=") for text in options.inductor))
    torch.set_float32_matmul_precision("high")
    machine = {"device": str(device), "torch": str(torch.__version__)}
    if device.type == "cuda":
        machine["device"] = torch.cuda.get_device_name()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    runs, content = of_machine(options.out.with_suffix(".json"), machine)
    before, rows = content["rows"], list[dict[str, Any]]()

    def save(row: dict[str, Any]) -> None:
        print(table([row])[-1], flush=True)
        rows.append(row)
        content["rows"] = replaced(before, rows, lambda row: row["setting"])
        write(options.out, runs)

    sizes = TINY if options.tiny else list(map(SIZES.__getitem__, options.sizes))
    dtypes: list[torch.dtype] = [torch.float32] if options.tiny else [getattr(torch, name) for name in options.dtypes]
    if "table" in options.parts:
        for p in [Problem(*size, dtype) for size in sizes for dtype in dtypes]:
            for who in options.who:
                row = measure(p, who, device, seconds, options.profile)
                if "kernels" in row:
                    print(json.dumps(row["kernels"], indent=1), flush=True)
                save(row)
    if "jax" in options.parts and importlib.util.find_spec("jax"):
        for row in _jax_lines.rows("_bench_meta_jax.py", json.dumps(sizes), *options.dtypes):
            save(row)
    start = Problem(*TINY[0], torch.float32) if options.tiny else Problem(4, 2, 256, 4, 256, 4, 1, torch.bfloat16)
    top = 2 if options.tiny else 64
    counts = [n for n in (1, 2, 4, 8, 16, 32, 64) if n <= top]
    lengths = [16, 32] if options.tiny else [2**n for n in range(6, 15)]
    for name, values, first in (
        ("steps", counts, start),
        ("tokens", lengths, start._replace(tasks=2, sequences=1)),
    ):
        if name in options.parts:
            content[name] = []
            for row in sweep(name, values, first, device, seconds):
                content[name].append(row)
                write(options.out, runs)
            path = options.out.with_name(f"{options.out.name}_{name}.png")
            plot(path, name, content[name], f"{machine['device']}: {title(first, name)}")


if __name__ == "__main__":
    main()
