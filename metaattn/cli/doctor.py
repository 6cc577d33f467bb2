"""What is installed here, which backends work, and whether every rule is right on each of them.

Each backend that works on the device is checked in each dtype that it serves: every rule (the columns of the table) of
full, causal, masked, biased and grouped calls against the dense formula in float64. The table has the largest relative
error of each rule. Exit code 1 if one is above its bound or raises.
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
from ._selfcheck import BOUND, CALLS, CHECKED, Finding, check, interpreted, working


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``metaattn doctor``."""
    named = [name for name in NAMES if name != "auto"]
    parser.add_argument(
        "--device", type=_options.device, help="cpu, cuda or cuda:N; the GPU by default, if there is one"
    )
    parser.add_argument("--backend", action="append", choices=named, help="check this one alone; may be repeated")


def run(options: argparse.Namespace) -> int:
    """Print the report; 1 if something is wrong."""
    device = options.device or _options.default_device()
    print("\n".join(f"{name:<20}{line}" for name, line in facts().items()))
    found = working(device)
    print(f"\nBackends on {device}:")
    for name, served in found.items():
        text = served if isinstance(served, str) else " ".join(map(_short, served))
        print(
            f"  {name:<12}{text}{' (in its interpreter, two calls)' * (text != served and interpreted(name, device))}"
        )
    # auto is made of the others.
    names = options.backend or [name for name in found if name != "auto"]
    pairs = [(name, dtype) for name in names for dtype in found[name] if isinstance(dtype, torch.dtype)]
    if not pairs:
        print(f"\nNothing to check: {', '.join(names)} cannot run on {device}")
        return 1
    start, threads = time.perf_counter(), torch.get_num_threads()
    torch.set_num_threads(1)  # the calls are small: threads would only wait for each other
    try:
        bar = tqdm(pairs, desc="self-check", leave=False, disable=None)
        findings = [finding for name, dtype in bar for finding in check(name, dtype, device)]
    finally:
        torch.set_num_threads(threads)
    print(f"\nRelative errors against float64, the largest of {len(CALLS)} calls ({', '.join(c.name for c in CALLS)}):")
    print("\n".join(table(findings)))
    wrong = [f for f in findings if f.wrong]
    print("\n" + "\n".join(advice(wrong)) if wrong else f"\nAll {len(findings)} results are right", end="")
    print(f" ({time.perf_counter() - start:.0f} s)")
    return 1 if wrong else 0


def table(findings: Sequence[Finding]) -> list[str]:
    """A row for each backend and dtype, a column for each rule, and what the columns are."""
    lines = [f"  {'backend':<12}{'dtype':<10}" + "".join(f"{rule:>10}" for rule in CHECKED) + f"{'bound':>10}"]
    for backend, dtype in dict.fromkeys((f.backend, f.dtype) for f in findings):
        line = f"  {backend:<12}{_short(dtype):<10}"
        for rule in CHECKED:
            here = [f for f in findings if (f.backend, f.dtype, f.rule) == (backend, dtype, rule)]
            errors = [math.inf if math.isnan(f.error) else f.error for f in here]
            cell = "raises" if any(f.problem for f in here) else f"{max(errors):.0e}"
            line += f"{cell + '!' * any(f.wrong for f in here):>10}"
        lines.append(line + f"{BOUND[dtype]:>10.0e}")
    return lines + [f"  {rule:<5}{RULES[rule]}" for rule in CHECKED]


def advice(wrong: Sequence[Finding]) -> list[str]:
    """What is wrong, and what to do."""
    lines = [f"{len(wrong)} results are WRONG:"]
    for f in wrong[:12]:
        what = f.problem or f"relative error {f.error:.1e}, at most {BOUND[f.dtype]:.0e} allowed"
        lines.append(f"  {f.backend}, {_short(f.dtype)}: {f.rule} of the {f.call} call: {what}")
    lines += [f"  and {len(wrong) - 12} more"] * (len(wrong) > 12)
    bad = {f.backend for f in wrong}
    sound = [name for name in ("blockwise", "reference") if name not in bad]
    if sound:
        lines.append(
            f"Until that is mended call with backend={sound[0]!r}, or inside metaattn.use_backend({sound[0]!r})."
        )
    else:
        lines.append("Plain PyTorch itself is off here: install the versions of requirements.txt afresh and try again.")
    return [*lines, "Report it with all of this output."]


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
