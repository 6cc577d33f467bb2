"""``metaattn bench``: its rows and its file; a wrong result has no time."""

import json

import pytest
import torch

from metaattn.backends.blockwise import backend as blockwise
from metaattn.cli import bench, main

SMALL = ["bench", "--device", "cpu", "--shape", "1,2,16,8"]


@pytest.fixture(autouse=True)
def _short(monkeypatch):
    monkeypatch.setattr(bench, "MIN_SECONDS", 1e-3)


def test_writes_what_it_prints(tmp_path, capsys):
    path = tmp_path / "bench.json"
    assert main([*SMALL, "--shape", "2,1,24,8", "--causal", "--dtype", "float64", "--json", str(path)]) == 0
    out = capsys.readouterr().out
    content = json.loads(path.read_text())
    assert content["setting"] == {"device": "cpu", "dtype": "float64", "causal": True}
    assert content["machine"]["PyTorch"].startswith(torch.__version__)
    rows = content["rows"]
    assert [(tuple(r["shape"]), r["rule"]) for r in rows] == [
        (shape, rule) for shape in [(1, 2, 16, 8), (2, 1, 24, 8)] for rule in bench.TIMED
    ]
    for row in rows:
        assert set(row) - {"shape", "rule"} == {"metaattn", "math"} | ({"torch"} & set(row))
        assert ("torch" in row) == (row["rule"] in ("fwd", "bwd"))
        for who in set(row) - {"shape", "rule"}:
            assert row[who]["error"] < 1e-12
            assert row[who]["ms"] > 0
        assert f"{row['metaattn']['ms']:.2f}" in out


def test_a_wrong_result_has_no_time(monkeypatch, capsys):
    right = blockwise.backward_jvp
    monkeypatch.setattr(blockwise, "backward_jvp", lambda *a, **o: type(g := right(*a, **o))(-g[0], *g[1:]))
    assert main(SMALL) == 1
    out = capsys.readouterr().out
    assert "WRONG: hvp at [1, 2, 16, 8] wrong; dbl at [1, 2, 16, 8] wrong" in out
    assert sum("wrong" in line for line in out.splitlines()[2:-1]) == 2


def test_an_exception_is_reported(monkeypatch):
    def lost(*_, **__):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(blockwise, "backward", lost)
    rows = {r["rule"]: r for r in bench.measure([(1, 2, 16, 8)], torch.float32, torch.device("cpu"), False)}
    assert rows["bwd"]["metaattn"] == {"failed": "raises", "note": "no such kernel"}
    assert "raises" in bench.line(rows["bwd"])
    assert "ms" in rows["fwd"]["metaattn"]
