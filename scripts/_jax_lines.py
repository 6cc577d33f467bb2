"""JAX's rows of a benchmark: what a program of a second process prints, line by line."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def rows(program: str, *arguments: str) -> Iterator[dict[str, Any]]:
    """The rows of a program beside this file, as they come; says so if it ends badly."""
    command = [sys.executable, str(Path(__file__).with_name(program)), *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as running:
        assert running.stdout is not None
        yield from (json.loads(line) for line in running.stdout if line.startswith("{"))
    if running.returncode:
        print(f"{program} ended with {running.returncode}: rows may be missing", file=sys.stderr)
