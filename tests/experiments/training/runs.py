"""Start ``train_maml.py`` in tests, in this process or in another."""

import io
import os
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import torch

from experiments.training.main import main

ROOT = Path(__file__).parents[3]
SMOKE = ["experiment=smoke", "threads=1"]


def run_main(cwd, *arguments):
    """Run ``train_maml.py`` in this process, in a directory; return the exit code, stdout and stderr."""
    code, out, err = 0, io.StringIO(), io.StringIO()
    precision = torch.get_float32_matmul_precision()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.chdir(cwd)
        patch.setattr(sys, "argv", ["train_maml.py", *arguments])
        try:
            main()
        except SystemExit as end:
            code = end.code
        finally:
            torch.set_float32_matmul_precision(precision)  # precision=tf32 sets it
    return code, out.getvalue(), err.getvalue()


def program(*arguments):
    """Return the command line of ``train_maml.py``, and the options to start it as a process."""
    options = {"env": {**os.environ, "PYTHONPATH": str(ROOT)}, "text": True}
    return [sys.executable, str(ROOT / "train_maml.py"), *arguments], options


def only(path):
    (found,) = path.iterdir()
    return found


def assert_mistake(result, message):
    code, _, err = result
    lines = [line for line in err.strip().splitlines() if "it/s" not in line]
    assert code == 2
    assert len(lines) == 1, err
    assert lines[0].startswith("error: ")
    assert message in lines[0]
