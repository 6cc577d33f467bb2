"""Metrics of a run in files, and on the terminal."""

import os
import random
import resource

import pytest

from experiments.training import distributed
from experiments.training import metrics as module
from experiments.training.metrics import Metrics, RunLog, read_metrics

ROW = {"loss_before": 1.0, "loss_after": 0.5, "accuracy_before": None, "accuracy_after": 1e-05}


@pytest.fixture
def path(tmp_path):
    """A ``metrics.csv`` with four rows."""
    metrics = Metrics(tmp_path, 0)
    for step, split in ((1, "train"), (2, "train"), (2, "validation"), (3, "train")):
        metrics.add({"step": step, "split": split, **ROW})
    metrics.close()
    return tmp_path / "metrics.csv"


DAMAGED = {
    "binary": lambda text: random.Random(0).randbytes(3000),
    "zeros": lambda text: bytes(len(text)),
    "a nul byte": lambda text: text.replace(b"train", b"tr\0in", 1),
    "not text": lambda text: text.replace(b"train", b"\xff\xfe", 1),
    "a word as step": lambda text: text.replace(b"\n2,", b"\nxx,", 1),
    "a float as step": lambda text: text.replace(b"\n2,", b"\n2.0,", 1),
    "other digits": lambda text: text.replace(b"\n2,", "\n٢,".encode(), 1),
    "a huge step": lambda text: text.replace(b"\n2,", b"\n" + b"2" * 10_000 + b",", 1),
    "a word as number": lambda text: text.replace(b"0.5", b"0_5", 1),
    "no header": lambda text: text.split(b"\n", 1)[1],
    "an unknown column": lambda text: text.replace(b"loss_before", b"other"),
    "no column of steps": lambda text: text.replace(b"step,", b"stop,", 1),
    "two equal columns": lambda text: text.replace(b"loss_after", b"loss_before"),
    "short lines": lambda text: b"\n".join(line[: len(line) // 2] for line in text.split(b"\n")),
    "a long line": lambda text: text + b"1," * 200_000 + b"\n",
    "a huge field": lambda text: text.replace(b"\n2,", b'\n"' + b"x" * 200_000 + b'"\n2,', 1),
    "an open quote": lambda text: text.replace(b"\n2,", b'\n"2,', 1),
    "a row twice": lambda text: text + text.split(b"\n", 1)[1],
}


@pytest.mark.parametrize("how", DAMAGED)
def test_a_damaged_file_is_set_aside_and_its_rows_are_kept(path, how):
    whole = read_metrics(path)
    damaged = DAMAGED[how](path.read_bytes())
    path.write_bytes(damaged)
    with pytest.warns(UserWarning, match=r"is damaged \(|lacks") as warned:
        again = Metrics(path.parent, 3, expected=4)
    again.close()
    assert f"{path} is damaged (" in str(warned[0].message)
    assert f"see {path.with_name('metrics.damaged.csv')}" in str(warned[0].message)
    assert path.with_name("metrics.damaged.csv").read_bytes() == damaged
    assert all(row in whole for row in again.rows)
    assert again.rows == read_metrics(path)
    lost = 4 - len(again.rows)
    assert (len(warned) == 2) == (lost > 0)
    if lost:
        assert f"lacks {lost} of the 4 rows up to step 3" in str(warned[1].message)
    assert lost == {"no header": 0, "a row twice": 0, "a long line": 0, "a huge field": 0}.get(how, lost)


@pytest.mark.parametrize("what", ["folder", "missing", "empty", "header"])
def test_lost_rows_are_told(path, what):
    header = path.read_bytes().split(b"\n")[0] + b"\n"
    path.unlink()
    if what == "folder":
        path.mkdir()
    elif what != "missing":
        path.write_bytes(b"" if what == "empty" else header)
    with pytest.warns(UserWarning, match="lacks 4 of the 4 rows up to step 3|is damaged") as warned:
        Metrics(path.parent, 3, expected=4).close()
    assert len(warned) == 1 + (what == "folder")
    assert path.with_name("metrics.damaged.csv").is_dir() == (what == "folder")
    assert path.read_bytes().strip() == header.strip()


def test_random_bytes_never_stop_a_run(path):
    whole, draw = path.read_bytes(), random.Random(0)
    for _ in range(200):
        damaged = bytearray(whole)
        for _ in range(draw.randint(1, 4)):
            damaged[draw.randrange(len(whole))] = draw.randrange(256)
        path.write_bytes(damaged)
        for row in read_metrics(path):
            assert row["step"] >= 0
            assert row["split"] in module.SPLITS


def test_a_whole_file_is_not_written_again(path, monkeypatch):
    def replacing(path):
        raise AssertionError("written")

    monkeypatch.setattr(module, "replacing", replacing)
    before = path.stat()
    again = Metrics(path.parent, 3, expected=4)
    again.close()
    assert len(again.rows) == 4
    assert path.stat() == before


def test_a_failure_while_rows_are_dropped_keeps_the_file(path, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    whole = path.read_bytes()
    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        Metrics(path.parent, 2)
    assert path.read_bytes() == whole


def test_a_full_disk_leaves_no_part_of_a_row(path):
    metrics, whole = Metrics(path.parent, 3), path.read_bytes()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) + 5, before[1]))
    try:
        with pytest.raises(OSError, match="too large"):
            metrics.add({"step": 4, "split": "train", **ROW})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    metrics.close()
    assert path.read_bytes() == whole
    assert len(metrics.rows) == 4


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
