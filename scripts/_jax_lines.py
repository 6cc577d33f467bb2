"""Rows of a benchmark that a JAX program prints in a second process."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def rows(program: str, *arguments: str) -> Iterator[dict[str, Any]]:
    """Yield the rows of a program in this folder as it prints them; print a warning if it fails."""
    command = [sys.executable, str(Path(__file__).with_name(program)), *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as running:
        assert running.stdout is not None
        yield from (json.loads(line) for line in running.stdout if line.startswith("{"))
    if running.returncode:
        print(f"{program} ended with {running.returncode}: rows may be missing", file=sys.stderr)
