"""The table of the derivatives that each attention supports."""

import json
import sys

import pytest
import torch

from experiments.studies import boundary
from experiments.studies._dense import dense_attention


def _run(monkeypatch, module, *arguments):
    monkeypatch.setattr(sys, "argv", [module.__name__, *arguments])
    try:
        module.main()
    except SystemExit as end:
        return end.code
    return 0


def test_boundary(monkeypatch, tmp_path, capsys):
    assert _run(monkeypatch, boundary, "device=cpu", f"out={tmp_path}") == 0
    table = json.loads((tmp_path / "boundary.json").read_text())["table"]
    for name in ("metaattn reference", "metaattn blockwise", "written out"):
        assert {cell["status"] for cell in table[name].values()} == {"right"}
    flash = table["PyTorch flash"]
    assert flash["backward"]["status"] == "right"
    assert flash["double backward"]["status"] == flash["func.jvp"]["status"] == "raises"
    assert table["PyTorch cuDNN"]["forward"]["status"] == "absent"
    assert (tmp_path / "boundary.png").stat().st_size > 10_000
    assert "metaattn blockwise" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="the error of a machine without a GPU")
def test_a_device_that_does_not_exist(monkeypatch, capsys, tmp_path):
    assert _run(monkeypatch, boundary, "device=cuda", f"out={tmp_path}") == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: device=cuda cannot be used here (")


def test_boundary_tells_wrong_from_right():
    q, k, v, t = (torch.randn(1, 2, 16, 32) for _ in range(4))
    wrong = lambda q, k, v: dense_attention(q, k, v).detach() * 1.5
    assert boundary.probe(wrong, boundary.NESTINGS["forward"], (q, k, v, t))["status"] == "wrong"
