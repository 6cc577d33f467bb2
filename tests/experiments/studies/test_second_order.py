"""Verification of meta-gradients: it passes, it can fail, and it writes its results."""

import json
import subprocess
import sys

import pytest
import torch

from experiments.studies import second_order
from experiments.training.config import Backend, Precision

FAST = {"inner_steps": [1, 2], "tasks": 2, "way": 3, "dim": 8, "depth": 1}


def _run(monkeypatch, module, *arguments):
    monkeypatch.setattr(sys, "argv", [module.__name__, *arguments])
    try:
        module.main()
    except SystemExit as end:
        return end.code
    return 0


@pytest.mark.parametrize("backend", [Backend.reference, Backend.blockwise])
def test_second_order_holds(backend):
    rows = second_order.check(second_order.Settings(backend=backend, **FAST))
    bounds = second_order.BOUNDS[Precision.float64]
    assert all(r[k] <= bounds[k] for r in rows for k in bounds)
    assert all(r["first_order_error"] > 0.01 for r in rows)


def test_second_order_writes_results_and_checks_bounds(monkeypatch, tmp_path, capsys):
    arguments = [f"{k}={v}".replace(" ", "") for k, v in FAST.items()] + [f"out={tmp_path}"]
    assert _run(monkeypatch, second_order, *arguments) == 0
    content = json.loads((tmp_path / "second_order.json").read_text())
    assert content["exceeded"] == []
    assert [r["inner_steps"] for r in content["rows"]] == [1, 2]
    assert (tmp_path / "second_order.png").stat().st_size > 10_000
    assert "first order" in capsys.readouterr().out
    # An error above its bound ends with code 1 and is named: a wrong gradient cannot pass.
    monkeypatch.setitem(second_order.BOUNDS, Precision.float64, {"dense": 0.0, "symmetry": 1.0, "differences": 1.0})
    assert _run(monkeypatch, second_order, *arguments) == 1
    assert "bounds exceeded: dense at 1 steps" in capsys.readouterr().err


def test_second_order_detects_a_wrong_meta_gradient(monkeypatch):
    """With detached inner gradients the check must fail."""
    monkeypatch.setattr(second_order, "maml", second_order.first_order_maml)
    rows = second_order.check(second_order.Settings(**FAST))
    assert all(r["differences"] > 1e-3 for r in rows)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the error of a machine without a GPU")
def test_second_order_errors(monkeypatch, capsys, tmp_path):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert _run(monkeypatch, second_order, "backend=triton", f"out={tmp_path}") == 2
    assert "needs a CUDA device" in capsys.readouterr().err
    assert _run(monkeypatch, second_order, "bakend=triton") == 2
    assert "the keys are backend" in capsys.readouterr().err
    assert _run(monkeypatch, second_order, "reference") == 2
    assert "expected key=value" in capsys.readouterr().err
    assert _run(monkeypatch, second_order, "--help") == 0
    assert "inner_steps" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="the error of a machine without a GPU")
def test_a_device_that_does_not_exist(monkeypatch, capsys, tmp_path):
    assert _run(monkeypatch, second_order, "device=cuda", f"out={tmp_path}") == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: device=cuda cannot be used here (")


def test_as_a_command():
    """One study in a process; test_moved.py runs all of them in this one."""
    command = [sys.executable, "-m", "experiments.second_order", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0
    assert "Usage: python -m experiments.second_order" in done.stdout
