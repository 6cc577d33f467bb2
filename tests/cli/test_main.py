"""The command ``metaattn``: mistakes, exit codes, help."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import metaattn
from metaattn.cli import bench, main

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "doctor|bench"),
        (["repair"], "invalid choice: 'repair'"),
        (["doctor", "--backend", "flash"], "invalid choice: 'flash'"),
        (["doctor", "--device", "tpu"], "expected cpu, cuda or cuda:N; got 'tpu'"),
        (["doctor", "--device", "cuda:99"], "cuda:99 does not exist"),
        (["bench", "--shape", "1,8,64"], "four positive integers such as 1,8,1024,64; got '1,8,64'"),
        (["bench", "--shape", "1,8,0,64"], "four positive integers"),
        (["bench", "--dtype", "int8"], "expected one of float64, float32, float16, bfloat16; got 'int8'"),
        (["bench", "--threads", "0"], "expected a positive integer; got '0'"),
        (["bench", "--json", "no/such/folder/x.json"], "there is no directory no/such/folder"),
        (["bench", "--json", "/"], "it is a directory"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(arguments, message, capsys):
    with pytest.raises(SystemExit) as end:
        main(arguments)
    out, err = capsys.readouterr()
    assert end.value.code == 2
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert message in err


def test_help_explains_the_table(capsys):
    with pytest.raises(SystemExit) as end:
        main(["bench", "--help"])
    assert end.value.code == 0
    assert "Ratios above 1 mean that ours is faster" in capsys.readouterr().out


def test_version(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out == f"metaattn {metaattn.__version__}\n"


def test_interruption(monkeypatch, capsys):
    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(bench, "measure", stopped)
    assert main(["bench"]) == 130
    assert capsys.readouterr().err == "stopped\n"


def test_as_a_module(tmp_path):
    """It runs in any directory; without Triton's interpreter the triton backend is reported as unavailable."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "metaattn", "doctor", "--device", "cpu", "--backend", "reference"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "triton      backend='triton' needs a CUDA device" in done.stdout
    # A PyTorch for CUDA warns on some machines that there is no driver.
    assert [line for line in done.stderr.splitlines() if "torch/utils/cpp_extension.py" not in line] == []
