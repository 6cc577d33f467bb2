"""Metrics of a run in files, and on the terminal."""

from experiments.training import distributed
from experiments.training.metrics import Metrics, RunLog, read_metrics


def test_a_truncated_line_is_dropped(tmp_path):
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


def test_only_the_first_process_reports(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(distributed, "is_first", lambda: False)
    row = {"loss_before": 1.0, "loss_after": 0.5}
    with RunLog(tmp_path, 0, 10, "maml") as log:
        log.training(1, row)
        log.validation(1, row)
        log.advance()
    assert log.rows == []
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr() == ("", "")


def test_the_first_process_reports(tmp_path, capsys):
    row = {"loss_before": 1.0, "loss_after": 0.5, "accuracy_before": 0.2, "accuracy_after": 0.4}
    with RunLog(tmp_path, 0, 10, "maml") as log:
        log.training(1, {"loss_before": 1.0, "loss_after": 0.25})
        log.validation(2, row)
        log.advance()
    assert [(r["step"], r["split"], r["loss_after"]) for r in read_metrics(tmp_path / "metrics.csv")] == [
        (1, "train", 0.25),
        (2, "validation", 0.5),
    ]
    out, err = capsys.readouterr()
    assert out == "step      2  validation  loss 1.000 → 0.500, accuracy 20.0% → 40.0%\n"
    assert "maml" in err
    assert "loss 1.000 → 0.250" in err
