"""The kernels compile for GPUs that this machine lacks: Triton's interpreter also accepts what its compiler rejects."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]


# What each process compiles: all rows in one, since importing PyTorch and Triton takes as long as compiling a row.
ROWS = [
    ("h100", "bfloat16", "64", "bias"),
    ("a100", "float16", "32", "mask"),
    ("rtx4090", "float32", "64", "short"),
    ("b200", "bfloat16", "64", "causal"),
    ("a100", "tf32", "64", "full"),
]
TOO_LARGE = ("rtx4090", "float32", "256", "full", "backward_jvp")
PROGRAM = """
import os, sys
from pathlib import Path

ROOT, rows = Path(sys.argv[1]), [argument.split(",") for argument in sys.argv[2:]]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]
import compile_kernels

for row in rows:
    options = ("--gpus", "--dtypes", "--head-sizes", "--kinds", "--primitives")
    sys.argv = ["compile_kernels.py", "--processes", "0", *(a for pair in zip(options, row) for a in pair)]
    code = 0
    try:
        compile_kernels.main()
    except SystemExit as end:
        code = end.code
    print("exit code", code, flush=True)
"""


@pytest.mark.slow
def test_all_primitives_compile():
    """Of each row; and a kernel that fits with no blocks fails.

    Triton caches what it compiled by source, options and version, so that only changed kernels are compiled again.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    program = [sys.executable, "-c", PROGRAM, str(ROOT), *map(",".join, [*ROWS, TOO_LARGE])]
    done = subprocess.run(program, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    *outputs, rest = re.split(r"^exit code ", done.stdout, flags=re.MULTILINE)
    codes = [int(part.split()[0]) for part in [*outputs[1:], rest]]
    assert codes == [0] * len(ROWS) + [1], done.stdout + done.stderr
    for (gpu, *_), out in zip(ROWS, outputs, strict=False):
        rows = [line.split() for line in out.splitlines() if line.startswith(gpu)]
        assert {row[4] for row in rows} >= {"forward", "forward_jvp", "forward_with_jvp", "backward", "backward_jvp"}
        for row in rows:
            registers, stack, _ = map(int, row[-3:])
            # With 32 registers, and everything else on the stack, a kernel compiles as well, but is far too slow.
            assert registers > 64 or row[4] == "products", row
            assert stack < 4096, row
    assert "OutOfResources: out of resource: shared memory" in outputs[-1]
