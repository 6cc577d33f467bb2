"""The kernels compile for GPUs that this machine lacks: Triton's interpreter also accepts what its compiler rejects."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from metaattn.backends import PRIMITIVES

pytest.importorskip("triton")
pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
ROWS = [
    ("h100", "bfloat16", "64", "bias"),
    ("a100", "float16", "32", "mask"),
    ("rtx4090", "float32", "64", "short"),
    ("b200", "bfloat16", "64", "causal"),
    ("a100", "tf32", "64", "full"),
]
# One process for all commands: importing PyTorch and Triton takes as long as compiling a row.
PROGRAM = """
import json, sys
from pathlib import Path

root = Path(sys.argv[1])
sys.path[:0] = [str(root), str(root / "scripts")]
import compile_kernels

exec(sys.argv[3])
for arguments in json.loads(sys.argv[2]):
    sys.argv = ["compile_kernels.py", "--processes", "0", *arguments]
    code = 0
    try:
        compile_kernels.main()
    except SystemExit as end:
        code = end.code
    print("exit code", code, flush=True)
"""


def compile_kernels(*commands, before=""):
    """Run the script once for each list of arguments, after a statement; return the exit code and output of each."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    program = [sys.executable, "-c", PROGRAM, str(ROOT), json.dumps(commands), before]
    done = subprocess.run(program, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    parts = re.split(r"^exit code (\d+)\n", done.stdout, flags=re.MULTILINE)
    return [(int(code), out) for out, code in zip(parts[:-1:2], parts[1::2], strict=True)]


def options(gpu, dtype, size, kind, *primitives):
    found = ["--gpus", gpu, "--dtypes", dtype, "--head-sizes", size, "--kinds", kind]
    return [*found, "--primitives", *primitives] if primitives else found


def test_all_primitives_compile():
    """All compile in each row; and a kernel that fits with no block sizes fails.

    Triton caches what it compiled by source, options and version, so that only changed kernels are compiled again.
    """
    too_large = options("rtx4090", "float32", "256", "full", "backward_jvp")
    *done, (code, out) = compile_kernels(*(options(*row) for row in ROWS), too_large)
    assert code == 1
    assert "OutOfResources: out of resource: shared memory" in out
    for (gpu, *_), (code, out) in zip(ROWS, done, strict=True):
        assert code == 0, out
        rows = [line.split() for line in out.splitlines() if line.startswith(gpu)]
        assert {row[4] for row in rows} >= {*PRIMITIVES} - {"backward_with_jvp"}  # fused only for some sizes
        for row in rows:
            registers, stack, _ = map(int, row[-4:-1])
            # With 32 registers, and everything else on the stack, a kernel compiles as well, but is far too slow.
            assert registers > 64 or row[4] == "matmul_jvp", row
            assert stack < 4096, row


def test_digests_are_compared_with_a_saved_table(tmp_path):
    command = options("h100", "bfloat16", "64", "full", "forward", "forward_jvp")
    ((code, table),) = compile_kernels(command)
    assert code == 0, table
    digests = {row[4]: row[-1] for row in map(str.split, table.splitlines()) if row[0] == "h100"}
    assert all(re.fullmatch("[0-9a-f]{12}", digest) for digest in digests.values())
    assert digests["forward"] != digests["forward_jvp"]

    same, changed, short = (tmp_path / name for name in ("same.txt", "changed.txt", "short.txt"))
    same.write_text(table)
    changed.write_text(table.replace(digests["forward"], "0" * 12))
    short.write_text("\n".join(line for line in table.splitlines() if digests["forward_jvp"] not in line))
    # A process each: what one has loaded before it does not load again.
    (code, out), other, missing = (compile_kernels([*command, "--compare", str(f)])[0] for f in (same, changed, short))
    assert code == 0, out
    assert f"2 of 2 kernels have the digest of {same}" in out

    code, out = other
    assert code == 1
    assert f"1 of 2 kernels have the digest of {changed}" in out
    (differs,) = (line for line in out.splitlines() if line.startswith("DIFFERS"))
    assert differs.startswith("DIFFERS h100 bfloat16 64 full forward attention_forward ")
    assert differs.endswith(f": {'0' * 12} -> {digests['forward']}")

    code, out = missing
    assert code == 1
    assert "DIFFERS h100 bfloat16 64 full forward_jvp attention_forward: not in the saved table" in out


def test_head_sizes_of_two_layouts_are_padded_to_one():
    """With two layouts at one address, the assembler of CUDA 12.8 takes the address from an unrelated register.

    The script finds the cause, and without the padding it is there: the check could fail.
    """
    command = options("h100", "bfloat16", "256/16", "short", "forward_jvp")
    unpadded = "from metaattn.backends.triton import interface; interface.least_columns = lambda x: 1"
    ((code, out),) = compile_kernels(command, before=unpadded)
    assert code == 1, out
    assert "FAILED attention_forward 64x64 4 1: layouts 0x40000040 and 0xc0000010 at one address" in out
    ((code, out),) = compile_kernels(command)
    assert code == 0, out
