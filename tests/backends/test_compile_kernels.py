"""The kernels compile for GPUs that this machine does not have.

Tests without a GPU run the kernels in Triton's interpreter, which accepts what the compiler does not.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from metaattn.backends import PRIMITIVES

pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]


def compile_kernels(tmp_path, *arguments):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    program = [sys.executable, str(ROOT / "scripts/compile_kernels.py"), "--cache", str(tmp_path), *arguments]
    done = subprocess.run([*program, "--processes", "1"], env=environment, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
    ("gpu", "dtype", "size", "kinds"),
    [
        ("h100", "bfloat16", "64", ["bias"]),
        ("a100", "float16", "32", ["mask"]),
        ("rtx4090", "float32", "64", ["short"]),
        ("b200", "bfloat16", "64", ["causal"]),
        ("a100", "tf32", "64", ["full"]),
    ],
)
def test_all_primitives_compile(gpu, dtype, size, kinds, tmp_path):
    code, out, err = compile_kernels(
        tmp_path, "--gpus", gpu, "--dtypes", dtype, "--head-sizes", size, "--kinds", *kinds
    )
    assert code == 0, out + err
    rows = [line.split() for line in out.splitlines() if line.startswith(gpu)]
    assert {row[4] for row in rows} >= {*PRIMITIVES} - {"backward_with_jvp"}  # fused only for some sizes
    for row in rows:
        registers, stack, _ = map(int, row[-4:-1])
        # With 32 registers and a large stack a kernel would compile too, but it would be far too slow.
        assert registers > 64 or row[4] == "matmul_jvp", row
        assert stack < 4096, row


def test_a_kernel_that_fits_with_no_block_sizes_fails(tmp_path):
    options = ["--gpus", "rtx4090", "--dtypes", "float32", "--head-sizes", "256", "--kinds", "full"]
    code, out, _ = compile_kernels(tmp_path, *options, "--primitives", "backward_jvp")
    assert code == 1
    assert "OutOfResources: out of resource: shared memory" in out


def test_digests_are_compared_with_a_saved_table(tmp_path):
    options = ["--gpus", "h100", "--dtypes", "bfloat16", "--head-sizes", "64", "--kinds", "full"]
    options += ["--primitives", "forward", "forward_jvp"]
    code, table, err = compile_kernels(tmp_path, *options)
    assert code == 0, table + err
    digests = {row[4]: row[-1] for row in map(str.split, table.splitlines()) if row[0] == "h100"}
    assert all(re.fullmatch("[0-9a-f]{12}", digest) for digest in digests.values())
    assert digests["forward"] != digests["forward_jvp"]

    saved = tmp_path / "saved.txt"
    saved.write_text(table)
    code, out, err = compile_kernels(tmp_path, *options, "--compare", str(saved))
    assert code == 0, out + err
    assert f"2 of 2 kernels have the digest of {saved}" in out

    saved.write_text(table.replace(digests["forward"], "0" * 12))
    code, out, _ = compile_kernels(tmp_path, *options, "--compare", str(saved))
    assert code == 1
    assert f"1 of 2 kernels have the digest of {saved}" in out
    (differs,) = (line for line in out.splitlines() if line.startswith("DIFFERS"))
    assert differs.startswith("DIFFERS h100 bfloat16 64 full forward attention_forward ")
    assert differs.endswith(f": {'0' * 12} -> {digests['forward']}")

    saved.write_text("\n".join(line for line in table.splitlines() if digests["forward_jvp"] not in line))
    code, out, _ = compile_kernels(tmp_path, *options, "--compare", str(saved))
    assert code == 1
    assert "DIFFERS h100 bfloat16 64 full forward_jvp attention_forward: not in the saved table" in out
