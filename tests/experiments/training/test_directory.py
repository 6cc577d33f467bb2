"""The output directory: new for each run, one owner at a time, and never overwritten by another run."""

import hashlib
import os
import re
import signal
import subprocess
import sys
from datetime import datetime

import pytest

from experiments.errors import UserError
from experiments.training import directory, main
from tests.experiments.training.runs import ROOT, SMOKE, assert_mistake, program

# Owns a directory in a process that has a child, and then waits.
OWNER = """
import os, sys, time
from pathlib import Path
from experiments.training import directory
with directory.owned(Path(sys.argv[1])):
    if os.fork() == 0:
        os.close(1)
        time.sleep(100)
    print("owned", flush=True)
    time.sleep(100)
"""
SHORT = [*SMOKE, "train.steps=1", "train.tasks=1", "train.validation_tasks=1", "test.tasks=2"]


def _digests(folder):
    return {p: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob("*") if p.is_file()}


def test_new_directories_of_one_second_differ(tmp_path):
    wanted, paths = str(tmp_path / "a" / "now"), []
    for _ in range(3):
        directory.forget()  # as another process
        paths += [directory.new(wanted), directory.new(wanted)]
    assert paths == [p for p in (wanted, f"{wanted}_2", f"{wanted}_3") for _ in range(2)]


@pytest.mark.parametrize("sweep", [False, True])
def test_two_runs_of_one_second_have_two_directories(command, tmp_path, monkeypatch, sweep):
    class Clock(datetime):
        @classmethod
        def now(cls):
            return datetime(2026, 1, 1)

    monkeypatch.setattr(main, "datetime", Clock)
    arguments = [*(["-m", "seed=0,1"] if sweep else []), *SHORT]
    assert [command(*arguments)[0] for _ in range(2)] == [0, 0]
    runs = sorted(p.parent.relative_to(tmp_path / "outputs") for p in tmp_path.rglob("latest.pt"))
    if sweep:
        assert {r.parts[1] for r in runs} == {"2026-01-01_00-00-00", "2026-01-01_00-00-00_2"}
        assert len(runs) == 4
    else:
        assert [r.name for r in runs] == ["2026-01-01_00-00-00", "2026-01-01_00-00-00_2"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["resume={run}"],
        ["resume={run}/latest.pt"],
        [*SHORT, "hydra.run.dir={run}"],
        ["mode=evaluate", "checkpoint={run}"],
    ],
    ids=["resume", "checkpoint", "run", "evaluate"],
)
def test_a_directory_has_one_owner(command, copy, arguments):
    arguments = [a.format(run=copy) for a in arguments]
    if "mode=evaluate" in arguments:
        arguments.append(f"hydra.run.dir={copy}")
    with directory.owned(copy):
        before = _digests(copy)
        assert_mistake(command(*arguments), f"{copy} is in use by process {os.getpid()} on ")
        assert _digests(copy) == before
    assert not (copy / directory.LOCK).exists()


@pytest.mark.slow
def test_a_lock_ends_with_its_process(tmp_path):
    """It does so after SIGKILL too, and although a child of the process is alive."""
    arguments = [sys.executable, "-c", OWNER, str(tmp_path)]
    owner = subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        assert owner.stdout.readline() == "owned\n"
        with pytest.raises(UserError, match=f"in use by process {owner.pid} "), directory.owned(tmp_path):
            pass
        owner.kill()
        owner.wait()
        assert (tmp_path / directory.LOCK).exists()
        with directory.owned(tmp_path):
            pass
        assert list(tmp_path.iterdir()) == []
    finally:
        os.killpg(owner.pid, signal.SIGKILL)  # the child
        owner.stdout.close()


@pytest.mark.slow
def test_of_two_runs_that_start_together_one_owns_the_directory(tmp_path, copy):
    arguments, options = program(f"resume={copy}", "train.steps=22", "test.tasks=2")
    options |= {"cwd": tmp_path, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    runs = [subprocess.Popen(arguments, **options) for _ in range(2)]
    errors = [run.communicate(timeout=120)[1].strip().splitlines()[-1] for run in runs]
    codes = [run.returncode for run in runs]
    if sorted(codes) != [0, 0]:  # one may have ended before the other looked
        assert sorted(codes) == [0, 2], errors
        assert " is in use by process " in errors[codes.index(2)]


@pytest.mark.parametrize(
    ("arguments", "advice"),
    [
        (SHORT, "continue that run with resume="),
        (["mode=evaluate", "checkpoint={run}"], "give a new directory for the results of the evaluation"),
        (["resume={other}"], "continue that run with resume="),
    ],
    ids=["run", "evaluate", "resume"],
)
def test_a_directory_of_another_run_is_not_overwritten(command, copy, finished, arguments, advice):
    before = _digests(copy)
    arguments = [a.format(run=copy, other=finished[0]) for a in arguments]
    result = command(*arguments, f"hydra.run.dir={copy}")
    assert_mistake(result, f"{copy} contains latest.pt of another run; {advice}")
    assert _digests(copy) == before


@pytest.mark.parametrize("name", ["best.pt", "summary.json", "metrics.csv"])
def test_what_is_left_of_another_run_is_not_overwritten(command, tmp_path, name):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).write_text("1\n2\n")
    result = command(*SHORT, f"hydra.run.dir={tmp_path / 'run'}")
    assert_mistake(result, f"{tmp_path / 'run'} contains {name} of another run; ")


def test_a_run_that_was_killed_before_its_first_checkpoint_starts_again(command, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text("old")
    (run / ".latest.pt.abcdefgh").write_text("a leftover")
    (run / directory.LOCK).write_text("process 1")
    assert command(*SHORT, f"hydra.run.dir={run}")[0] == 0
    assert "steps: 1" in (run / "config.yaml").read_text()
    assert not [p.name for p in run.iterdir() if p.name.startswith(".")]


def test_leftovers_of_a_kill_are_removed(command, copy):
    leftovers = [copy / f".{name}.abcdefgh" for name in directory.FILES]
    for path in leftovers:
        path.write_text("a leftover")
    kept = copy / ".notes.txt.abcdefgh"
    kept.write_text("of the user")
    assert command(f"resume={copy}", "test.tasks=2")[0] == 0
    assert not any(path.exists() for path in leftovers)
    assert kept.exists()


def test_a_run_resumes_into_another_directory(command, copy, tmp_path):
    before = _digests(copy)
    with pytest.warns(UserWarning, match=r"lacks \d+ of the \d+ rows up to step 20"):
        result = command(f"resume={copy}", "train.steps=21", "test.tasks=2", f"hydra.run.dir={tmp_path / 'new'}")
    assert result[0] == 0, result[2]
    assert _digests(copy) == before
    assert {"config.yaml", "latest.pt", "best.pt", "metrics.csv"} <= {p.name for p in (tmp_path / "new").iterdir()}


def test_a_directory_without_locks_is_used_with_a_warning(tmp_path, monkeypatch):
    def flock(file, how):
        raise OSError("no locks available")

    monkeypatch.setattr(directory.fcntl, "flock", flock)
    with pytest.warns(UserWarning, match="its file system has no locks"), directory.owned(tmp_path):
        pass


def test_a_directory_that_cannot_be_written_is_one_line(tmp_path, monkeypatch):
    def denied(out):
        raise PermissionError(13, "Permission denied", str(out))

    monkeypatch.setattr(directory, "_lock", denied)
    message = f"cannot write to the output directory {tmp_path}: Permission denied"
    with pytest.raises(UserError, match=re.escape(message)), directory.owned(tmp_path):
        pass


@pytest.mark.parametrize("keep", [False, True])
def test_set_aside(tmp_path, keep):
    path = tmp_path / "a.csv"
    for n in ("", "_2", "_3"):
        path.write_text(n)
        assert directory.set_aside(path, keep=keep) == tmp_path / f"a.damaged{n}.csv"
        assert (tmp_path / f"a.damaged{n}.csv").read_text() == n
        assert path.exists() == keep
