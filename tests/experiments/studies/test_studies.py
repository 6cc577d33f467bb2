"""The experiments that verify: they pass, they can fail, and they write what they say."""

import itertools
import json
import math
import subprocess
import sys

import pytest
import torch

from experiments.output import write_json
from experiments.studies import boundary, second_order
from experiments.studies._dense import dense_attention
from experiments.training import report
from experiments.training.config import Backend, Precision
from experiments.training.loop import learning_rate
from experiments.training.metrics import Metrics, read_metrics

NUMBERS = {f"{name}_{when}": 0.5 for name in ("loss", "accuracy") for when in ("before", "after")}
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


def test_second_order_writes_and_judges(monkeypatch, tmp_path, capsys):
    arguments = [f"{k}={v}".replace(" ", "") for k, v in FAST.items()] + [f"out={tmp_path}"]
    assert _run(monkeypatch, second_order, *arguments) == 0
    content = json.loads((tmp_path / "second_order.json").read_text())
    assert content["exceeded"] == []
    assert [r["inner_steps"] for r in content["rows"]] == [1, 2]
    assert (tmp_path / "second_order.png").stat().st_size > 10_000
    assert "first order" in capsys.readouterr().out
    # A bound that is broken ends with 1 and says which: a wrong gradient cannot pass.
    monkeypatch.setitem(second_order.BOUNDS, Precision.float64, {"dense": 0.0, "symmetry": 1.0, "differences": 1.0})
    assert _run(monkeypatch, second_order, *arguments) == 1
    assert "bounds exceeded: dense at 1 steps" in capsys.readouterr().err


def test_second_order_sees_a_wrong_meta_gradient(monkeypatch):
    """With the inner gradients detached the check must fail: it is not blind."""
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
@pytest.mark.parametrize("module", [boundary, second_order])
def test_a_device_that_is_not_there(module, monkeypatch, capsys, tmp_path):
    assert _run(monkeypatch, module, "device=cuda", f"out={tmp_path}") == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: device=cuda cannot be used here (")


def test_boundary_tells_wrong_from_right():
    q, k, v, t = (torch.randn(1, 2, 16, 32) for _ in range(4))
    wrong = lambda q, k, v: dense_attention(q, k, v).detach() * 1.5
    assert boundary.probe(wrong, boundary.NESTINGS["forward"], (q, k, v, t))["status"] == "wrong"


def test_modules_run_as_commands(tmp_path):
    for module in ("experiments.second_order", "experiments.boundary", "experiments.data_weights"):
        done = subprocess.run([sys.executable, "-m", module, "--help"], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0
        assert "Usage: python -m " + module in done.stdout


def test_schedule():
    from experiments.training.config import Config, Schedule

    c = Config()
    c.train.steps, c.train.warmup, c.train.learning_rate = 100, 10, 1.0
    rates = [learning_rate(c, s) for s in range(101)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == rates[10] == pytest.approx(1.0)
    assert rates[100] == pytest.approx(0.01)
    assert all(a >= b for a, b in itertools.pairwise(rates[10:]))
    c.train.schedule = Schedule.constant
    assert learning_rate(c, 99) == 1.0


@pytest.fixture
def figures(monkeypatch):
    """What is drawn."""
    figures = []
    save = report.save_figure
    monkeypatch.setattr(report, "save_figure", lambda figure, path: (save(figure, path), figures.append(figure)))
    return figures


def _legend(axis):
    return [text.get_text() for text in axis.get_legend().get_texts()]


@pytest.mark.parametrize("metric", ["accuracy", "loss"])
def test_legends_cover_no_data_and_steps_are_whole(metric, tmp_path, figures):
    rows = [{"step": step, "split": split, **NUMBERS} for split in ("train", "validation") for step in (1, 4, 7)]
    chance = None if metric == "loss" else 0.2
    report.learning(tmp_path / "learning.png", rows, metric, chance)
    report.adaptation(tmp_path / "adaptation.png", torch.rand(5, 4), metric, 3, 0.5, chance)
    for figure in figures:
        for axis in figure.axes:
            assert not axis.get_legend().get_window_extent().overlaps(axis.get_window_extent())
            assert all(float(tick).is_integer() for tick in axis.get_xticks())


@pytest.mark.parametrize("far", [[1e3, 1e26], [math.inf, math.nan]])
def test_an_inner_loop_that_diverges_leaves_the_axis_to_what_was_trained(far, tmp_path, figures):
    values = torch.tensor([[4.0, 2.0, 5.0, *far]]).repeat(3, 1).double()
    report.adaptation(tmp_path / "adaptation.png", values, "loss", 1, 1.0, None)
    (axis,) = figures[0].axes
    low, high = axis.get_ylim()
    assert low < 1.0
    assert 5.0 < high < 10.0
    assert "trained for 1 step" in _legend(axis)
    assert f"beyond the axis, up to {'inf' if math.inf in far else '1e+26'}" in _legend(axis)


def test_a_single_row_is_drawn(tmp_path, figures):
    report.learning(tmp_path / "learning.png", [{"step": 1, "split": "train", **NUMBERS}], "loss", None)
    assert {line.get_marker() for line in figures[0].axes[0].lines if len(line.get_xdata())} == {"o"}


@pytest.mark.parametrize("seen", [False, True])
def test_a_curve_of_samples_that_were_adapted_to_says_so(seen, tmp_path, figures):
    report.learning(
        tmp_path / "learning.png", [{"step": 1, "split": "train", **NUMBERS}], "loss", None, adapts_to_query=seen
    )
    assert ("train, adapted to these samples too" in _legend(figures[0].axes[0])) == seen
    assert ("train, after adaptation" in _legend(figures[0].axes[0])) != seen


@pytest.mark.parametrize(("way", "said"), [(10, "correct"), (12, "correct\n(10 of 12 classes shown)")])
def test_an_episode_tells_how_many_of_its_classes_are_shown(way, said, tmp_path, figures):
    samples = [torch.rand(way, 4, 4), torch.arange(way)]
    report._classification(tmp_path / "episode.png", samples, samples, torch.arange(way), way)
    assert figures[0].get_suptitle() == f"One held-out task after adaptation: 100% of the queries {said}"


def test_json_has_no_numbers_that_are_not_finite(tmp_path):
    write_json(tmp_path / "a.json", {"at": [1.0, math.inf, math.nan], "of": {"chance": None}})
    assert json.loads((tmp_path / "a.json").read_text()) == {"at": [1.0, None, None], "of": {"chance": None}}


def test_metrics_survive_a_cut_line(tmp_path):
    metrics = Metrics(tmp_path, 0)
    row = {"loss_before": 1.0, "loss_after": 0.5, "accuracy_before": None, "accuracy_after": None}
    for step in (1, 2, 3):
        metrics.add({"step": step, "split": "train", **row})
    metrics.close()
    path = tmp_path / "metrics.csv"
    path.write_text(path.read_text() + "4,trai")
    again = Metrics(tmp_path, 2)
    again.close()
    assert [r["step"] for r in again.rows] == [r["step"] for r in read_metrics(path)] == [1, 2]
