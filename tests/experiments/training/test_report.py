"""The plots of a run."""

import math

import pytest
import torch

from experiments.training import report

NUMBERS = {f"{name}_{when}": 0.5 for name in ("loss", "accuracy") for when in ("before", "after")}


@pytest.fixture
def figures(monkeypatch):
    """The figures that were saved."""
    figures = []
    save = report.save_figure
    monkeypatch.setattr(report, "save_figure", lambda figure, path: (save(figure, path), figures.append(figure)))
    return figures


def _legend(axis):
    return [text.get_text() for text in axis.get_legend().get_texts()]


@pytest.mark.parametrize("metric", ["accuracy", "loss"])
def test_legends_cover_no_data_and_ticks_are_integers(metric, tmp_path, figures):
    rows = [{"step": step, "split": split, **NUMBERS} for split in ("train", "validation") for step in (1, 4, 7)]
    chance = None if metric == "loss" else 0.2
    report.learning(tmp_path / "learning.png", rows, metric, chance)
    report.adaptation(tmp_path / "adaptation.png", torch.rand(5, 4), metric, 3, 0.5, chance)
    for figure in figures:
        for axis in figure.axes:
            assert not axis.get_legend().get_window_extent().overlaps(axis.get_window_extent())
            assert all(float(tick).is_integer() for tick in axis.get_xticks())


@pytest.mark.parametrize("far", [[1e3, 1e26], [math.inf, math.nan]])
def test_the_axis_fits_the_trained_steps_of_a_diverging_inner_loop(far, tmp_path, figures):
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
def test_the_legend_says_that_training_adapts_to_the_query_set(seen, tmp_path, figures):
    report.learning(
        tmp_path / "learning.png", [{"step": 1, "split": "train", **NUMBERS}], "loss", None, adapts_to_query=seen
    )
    assert ("train, adapted to these samples too" in _legend(figures[0].axes[0])) == seen
    assert ("train, after adaptation" in _legend(figures[0].axes[0])) != seen


@pytest.mark.parametrize(("way", "title"), [(10, "correct"), (12, "correct\n(10 of 12 classes shown)")])
def test_the_title_says_how_many_classes_are_shown(way, title, tmp_path, figures):
    samples = [torch.rand(way, 4, 4), torch.arange(way)]
    report._classification(tmp_path / "episode.png", samples, samples, torch.arange(way), way)
    assert figures[0].get_suptitle() == f"One held-out task after adaptation: 100% of the queries {title}"
