"""Report what is installed and which backends work, and check their derivatives on this machine.

Each backend is checked in each dtype that it supports on the device: the value and the derivatives (the columns of the
table) of full, causal, masked, biased and grouped calls, against a dense formula in float64. The table shows the
largest relative error of each. The exit code is 1 if one exceeds its bound or raises.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence

import torch
from tqdm import tqdm

from ..backends import NAMES
from . import _options
from ._derivatives import RULES
from ._environment import facts
from ._selfcheck import BOUND, CALLS, CHECKED, PRIMITIVES, Finding, check, interpreted, working


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``metaattn doctor``."""
    named = [name for name in NAMES if name != "auto"]
    parser.add_argument(
        "--device", type=_options.device, help="cpu, cuda or cuda:N; by default the GPU if there is one"
    )
    parser.add_argument("--backend", action="append", choices=named, help="check only this one; may be repeated")


def run(options: argparse.Namespace) -> int:
    """Print the report; return 1 if a result is wrong, else 0."""
    device = options.device or _options.default_device()
    print("\n".join(f"{name:<20}{line}" for name, line in facts().items()))
    found = working(device)
    print(f"\nBackends on {device}:")
    for name, dtypes in found.items():
        text = dtypes if isinstance(dtypes, str) else " ".join(map(_short, dtypes))
        note = " (in Triton's interpreter, two calls)" if text != dtypes and interpreted(name, device) else ""
        print(f"  {name:<12}{text}{note}")
    # "auto" only chooses between the others.
    names = options.backend or [name for name in found if name != "auto"]
    pairs = [(name, dtype) for name in names for dtype in found[name] if isinstance(dtype, torch.dtype)]
    if not pairs:
        print(f"\nNothing to check: {', '.join(names)} cannot run on {device}")
        return 1
    start, threads = time.perf_counter(), torch.get_num_threads()
    torch.set_num_threads(1)  # the calls are so small that threads would only wait for each other
    try:
        findings: list[Finding] = []
        with tqdm(total=len(pairs), desc="self-check", leave=False, disable=None) as bar:
            for name, dtype in pairs:
                findings += check(name, dtype, device)
                bar.update()
    finally:
        torch.set_num_threads(threads)
    print(f"\nLargest relative errors against float64 of {len(CALLS)} calls ({', '.join(c.name for c in CALLS)}):")
    print("\n".join(table(findings)))
    wrong = [f for f in findings if f.wrong]
    print("\n" + "\n".join(advice(wrong)) if wrong else f"\nAll {len(findings)} results are correct", end="")
    print(f" ({time.perf_counter() - start:.0f} s)")
    return 1 if wrong else 0


def table(findings: Sequence[Finding]) -> list[str]:
    """Return the lines of the table: a row for each backend and dtype, a column for each derivative, and a legend."""
    lines = [f"  {'backend':<12}{'dtype':<10}" + "".join(f"{rule:>10}" for rule in CHECKED) + f"{'bound':>10}"]
    for backend, dtype in dict.fromkeys((f.backend, f.dtype) for f in findings):
        line = f"  {backend:<12}{_short(dtype):<10}"
        for rule in CHECKED:
            of_cell = [f for f in findings if (f.backend, f.dtype, f.rule) == (backend, dtype, rule)]
            errors = [math.inf if math.isnan(f.error) else f.error for f in of_cell]
            cell = "raises" if any(f.problem for f in of_cell) else f"{max(errors):.0e}"
            line += f"{cell + '!' * any(f.wrong for f in of_cell):>10}"
        lines.append(line + f"{BOUND[dtype]:>10.0e}")
    return lines + [f"  {rule:<5}{RULES[rule]}; primitives {', '.join(PRIMITIVES[rule])}" for rule in CHECKED]


def advice(wrong: Sequence[Finding]) -> list[str]:
    """Return the wrong results and what to do, as lines."""
    lines = [f"{len(wrong)} results are WRONG:"]
    for f in wrong[:12]:
        problem = f.problem or f"relative error {f.error:.1e}, at most {BOUND[f.dtype]:.0e} allowed"
        lines.append(f"  {f.backend}, {_short(f.dtype)}: {f.rule} of the {f.call} call: {problem}")
    lines += [f"  and {len(wrong) - 12} more"] * (len(wrong) > 12)
    failed = {f.backend for f in wrong}
    others = [name for name in ("blockwise", "reference") if name not in failed]
    if others:
        lines.append(f"Until this is fixed, pass backend={others[0]!r} or use metaattn.use_backend({others[0]!r}).")
    else:
        lines.append(
            "Even plain PyTorch operations are wrong: reinstall the versions of requirements.txt and try again."
        )
    return [*lines, "Please report this with the complete output."]


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
