"""Check that the tests notice faults: change one operation of a source file at a time and run the tests.

    python scripts/mutants.py [--files metaattn/ops/_rules.py] [--number 30] [--tests tests/ops tests/backends]

Each mutant is one change in a copy of the repository: a sign, a dropped term, swapped operands, another comparison, a
negated condition or another number. They are drawn with a seed, the same number from each file. A mutant is caught if a
test fails, or if the tests take longer than --limit seconds. The tests run until the first failure, those in --first
before the others. Survivors are printed with their line, and written with --json. Two uses:

* Which faults does no test notice? Read the survivors; some change nothing (an equal program).
* Does a smaller selection of tests notice as much as a larger one? Run the survivors again with ``--only`` and the
  larger selection, for example ``--pytest "-m 'exhaustive or not exhaustive'"``.

Exits with 1 if a mutant survives.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import random
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
FILES = [
    "metaattn/ops/_rules.py",
    "metaattn/backends/blockwise.py",
    "metaattn/backends/reference.py",
    "metaattn/backends/taylor.py",
    "metaattn/backends/triton/interface.py",
    "metaattn/backends/triton/flash_fwd.py",
    "metaattn/backends/triton/flash_bwd.py",
    "metaattn/backends/triton/flash_bwd_bias.py",
    "metaattn/backends/triton/tile_ops.py",
]
FIRST = ["tests/ops/test_contract.py", "tests/ops/test_vmap.py", "tests/ops/test_exactness.py"]
SWAPPED: dict[type[ast.operator], str] = {ast.Add: "-", ast.Sub: "+", ast.Mult: "+", ast.Div: "*"}
COMPARED: dict[type[ast.cmpop], str] = {
    ast.Lt: "<=",
    ast.LtE: "<",
    ast.Gt: ">=",
    ast.GtE: ">",
    ast.Eq: "!=",
    ast.NotEq: "==",
    ast.Is: "is not",
    ast.IsNot: "is",
}


class Mutant(NamedTuple):
    """A change of one file: the characters from ``start`` to ``end`` become ``text``."""

    file: str
    line: int
    start: int
    end: int
    text: str
    what: str

    def apply(self, root: Path) -> None:
        """Write the changed file."""
        path = root / self.file
        source = path.read_text()
        path.write_text(source[: self.start] + self.text + source[self.end :])


def mutants(file: str, root: Path = ROOT) -> Iterator[Mutant]:
    """Generate all changes of a file, outside annotations, docstrings and messages."""
    source = (root / file).read_text()
    lines = [0]
    for line in source.splitlines(keepends=True):
        lines.append(lines[-1] + len(line))
    encoded = [line.encode() for line in source.splitlines(keepends=True)]

    def offset(line: int, column: int) -> int:  # the syntax tree counts bytes
        return lines[line - 1] + len(encoded[line - 1][:column].decode())

    def span(node: ast.expr) -> tuple[int, int]:
        assert node.end_lineno is not None
        assert node.end_col_offset is not None
        return offset(node.lineno, node.col_offset), offset(node.end_lineno, node.end_col_offset)

    def change(node: ast.expr, start: int, end: int, text: str, what: str) -> Mutant:
        return Mutant(file, node.lineno, start, end, text, what)

    for node in _computing(ast.parse(source)):
        if isinstance(node, ast.BinOp) and type(node.op) in SWAPPED:
            (start, left), (right, end) = span(node.left), span(node.right)
            between = source[left:right]
            sign = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/"}[type(node.op)]
            if between.count(sign) == 1:
                yield change(node, left, right, between.replace(sign, SWAPPED[type(node.op)]), "another operator")
            if isinstance(node.op, ast.Add | ast.Sub):
                yield change(node, left, end, "", "drop the second term")
            if isinstance(node.op, ast.Add) and "(" not in between + source[start : start + 1]:
                yield change(node, start, right, "", "drop the first term")
            if isinstance(node.op, ast.Sub | ast.Div) and ")" not in between and "(" not in between:
                swapped = source[right:end] + between + source[start:left]
                yield change(node, start, end, swapped, "swap the operands")
        elif isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in COMPARED:
            left, right = span(node.left)[1], span(node.comparators[0])[0]
            yield change(node, left, right, f" {COMPARED[type(node.ops[0])]} ", "another comparison")
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            yield change(node, span(node)[0], span(node.operand)[0], "", "drop the sign")
        elif isinstance(node, ast.IfExp):
            start, end = span(node.test)
            yield change(node, start, end, f"not ({source[start:end]})", "negate the condition")
        elif isinstance(node, ast.Call) and len(node.args) > 1 and not _starred(node):
            (start, middle), (second, end) = span(node.args[-2]), span(node.args[-1])
            swapped = source[second:end] + source[middle:second] + source[start:middle]
            yield change(node, start, end, swapped, "swap the last two arguments")
        elif isinstance(node, ast.keyword) and isinstance(node.value, ast.Name) and node.arg != "dtype":
            start, end = span(node.value)
            yield change(node.value, start, end, "ZERO" if "ZERO" in source else "None", "drop an argument")
        elif isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant) and node.slice.value in (0, 1):
            start, end = span(node.slice)
            yield change(node, start, end, str(1 - node.slice.value), "another element")


def _starred(node: ast.Call) -> bool:
    return any(isinstance(a, ast.Starred) for a in node.args)


def _parses(mutant: Mutant) -> bool:
    """Return whether a mutant is a program: operators bind differently after a change."""
    source = (ROOT / mutant.file).read_text()
    try:
        ast.parse(source[: mutant.start] + mutant.text + source[mutant.end :])
    except SyntaxError:
        return False
    return True


def _computing(node: ast.AST) -> Iterator[ast.AST]:
    """Generate the nodes of a tree that compute something at run time."""
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list", "defaults", "msg", "exc"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST) and not isinstance(child, ast.Assert | ast.JoinedStr):
                yield child
                yield from _computing(child)


def survives(mutant: Mutant, tests: list[str], options: list[str], limit: float) -> tuple[bool, str]:
    """Return whether all tests pass on a mutant, and the first that fails or why they ended."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, "copy")
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", "outputs", "__pycache__", ".*_cache"))
        mutant.apply(copy)
        program = [sys.executable, "-B", "-m", "pytest", "-x", "-q", "--no-header", "-p", "no:cacheprovider", "-rfE"]
        try:
            command = [*program, *options, *tests]
            done = subprocess.run(command, cwd=copy, capture_output=True, text=True, timeout=limit, env=_environment())
        except subprocess.TimeoutExpired:
            return False, f"longer than {limit:.0f} s"
    if done.returncode == 0:
        return True, ""
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return False, failed[0].split(" - ")[0] if failed else f"exit code {done.returncode}: {done.stderr[-200:]}"


def _environment() -> dict[str, str]:
    """Return the environment of the tests: one thread, and nothing of this repository on Python's path."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ""}


def main() -> None:
    """Draw mutants, run the tests on each, and print the survivors."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--files", nargs="+", default=FILES, metavar="FILE", help="the sources to change")
    p.add_argument("--number", type=int, default=30, help="how many mutants to draw, the same number from each file")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--tests", nargs="+", default=["tests/ops", "tests/backends"])
    p.add_argument("--first", nargs="*", default=FIRST, help="the tests that run before the others")
    p.add_argument("--pytest", default="", metavar="OPTIONS", help="more options of pytest, in one string")
    p.add_argument("--only", type=Path, metavar="JSON", help="the survivors in this file, in place of new mutants")
    p.add_argument("--limit", type=float, default=600.0, help="seconds for the tests of a mutant")
    p.add_argument("--json", type=Path, help="a file for the results")
    a = p.parse_args()
    if a.only is not None:
        drawn = [Mutant(*r["mutant"]) for r in json.loads(a.only.read_text()) if r["survives"]]
    else:
        draw, per_file = random.Random(a.seed), -(-a.number // len(a.files))
        found = [list(filter(_parses, mutants(file))) for file in a.files]
        drawn = [m for all_ in found for m in draw.sample(all_, min(per_file, len(all_)))][: a.number]
    results: list[dict[str, Any]] = []
    for i, mutant in enumerate(drawn, 1):
        start = time.monotonic()
        alive, why = survives(mutant, [*a.first, *a.tests], shlex.split(a.pytest), a.limit)
        line = (ROOT / mutant.file).read_text().splitlines()[mutant.line - 1].strip()
        verdict = "SURVIVES" if alive else f"caught by {why}"
        print(f"{i:3d} {time.monotonic() - start:4.0f} s  {mutant.file}:{mutant.line} {mutant.what}: {line}")
        print(f"        -> {mutant.text[:90]!r}: {verdict}", flush=True)
        results.append({"mutant": mutant, "survives": alive, "why": why})
        if a.json is not None:
            a.json.write_text(json.dumps(results, indent=1) + "\n")
    left = sum(r["survives"] for r in results)
    print(f"{len(results) - left} of {len(results)} caught")
    sys.exit(1 if left else 0)


if __name__ == "__main__":
    main()
