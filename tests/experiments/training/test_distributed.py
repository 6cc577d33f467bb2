"""A run on several processes equals the run on one process, and survives the death of a process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from experiments.errors import UserError
from experiments.training import checkpoint, distributed, metrics
from tests.helpers import assert_close, error

ROOT = Path(__file__).parents[3]
STEPS = 12
# Five tasks, which cannot be split evenly over the numbers of processes below.
TINY = [
    *("experiment=smoke", "task=sinusoid", "precision=float64", "threads=1", "algorithm.learning_rate=0.02"),
    *(f"train.steps={STEPS}", "train.tasks=5", "train.validate_every=4", "train.checkpoint_every=100"),
    *("test.tasks=5", "test.chunk_size=2", "test.steps=3"),
]
FILES = {"config.yaml", "metrics.csv", "summary.json", "latest.pt", "best.pt", "tensorboard"}
FILES |= {"learning.png", "adaptation.png", "episode.png"}
# The program, with a failure of the second process in its sixth step.
DRIVER = """
import os, signal
from experiments.training import loop
from experiments.training.main import main

take_step = loop.Trainer._take_step

def failing(self):
    if os.environ["RANK"] == "1" and self.state.step == 5:
        {what}
    return take_step(self)

loop.Trainer._take_step = failing
main()
"""


def _run(cwd, ranks, *arguments, program=ROOT / "train_maml.py"):
    """Run the program on a number of processes, and capture its output."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    return subprocess.run(
        [sys.executable, *torchrun, str(program), *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )


def _only(path):
    (found,) = path.iterdir()
    return found


def _fail(tmp_path, what):
    """Run a job of two processes, the second of which fails."""
    program = tmp_path / "failing.py"
    program.write_text(DRIVER.format(what=what))
    done = _run(tmp_path, 2, *TINY, program=program)
    assert done.returncode != 0
    return _only(tmp_path / "outputs" / "sinusoid"), _errors(done)


def _errors(done):
    """The error lines of our program, from all processes."""
    return [line.split("\r")[-1] for line in done.stderr.splitlines() if "error: " in line]


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    """The run in a single ordinary process."""
    cwd = tmp_path_factory.mktemp("single")
    done = _run(cwd, 1, *TINY)
    assert done.returncode == 0, done.stderr
    return _only(cwd / "outputs" / "sinusoid")


def _assert_same_run(got, want):
    """Metrics, summaries, parameters and the optimizer's state, all within rounding; files by name."""
    assert {p.name for p in got.iterdir()} == {p.name for p in want.iterdir()} == FILES
    rows = [metrics.read_metrics(run / "metrics.csv") for run in (got, want)]
    assert [(r["step"], r["split"]) for r in rows[0]] == [(r["step"], r["split"]) for r in rows[1]]
    for name in ("loss_before", "loss_after"):
        assert_close(*([torch.tensor([r[name] for r in part], dtype=torch.float64)] for part in rows))
    summaries = [json.loads((run / "summary.json").read_text()) for run in (got, want)]
    for summary in summaries:
        del summary["seconds"]
    assert summaries[0].pop("at_each_step") == pytest.approx(summaries[1].pop("at_each_step"), rel=1e-10)
    for key in ("before", "after", "nearest_neighbour"):
        assert summaries[0].pop(key) == pytest.approx(summaries[1].pop(key), rel=1e-10)
    assert summaries[0] == summaries[1]
    contents = [checkpoint.load(run / "latest.pt") for run in (got, want)]
    assert contents[0]["step"] == contents[1]["step"] == STEPS
    assert contents[0]["best"] == pytest.approx(contents[1]["best"], rel=1e-10)
    # The loss does not depend on the keys' bias: its gradient is rounding, which Adam divides by its own size.
    keys = [c["meta"]["params"].pop("blocks.0.attention.qkv.bias") for c in contents]
    assert_close(*keys, factor=100)
    assert_close(*(c["meta"] for c in contents))
    assert_close(*(c["optimizer"]["state"] for c in contents))


@pytest.mark.slow
def test_two_processes_give_the_same_run(tmp_path, single):
    done = _run(tmp_path, 2, *TINY)
    assert done.returncode == 0, done.stderr
    _assert_same_run(_only(tmp_path / "outputs" / "sinusoid"), single)
    # Only one process prints.
    assert done.stdout.count("held-out test tasks") == 1
    assert [line.split()[1] for line in done.stdout.splitlines() if "validation" in line] == ["4", "8", "12"]
    assert done.stderr.count("| 0/12 [00:00<?, ?it/s]") == 1


@pytest.mark.slow
def test_a_death_ends_the_job_which_resumes_at_another_size(tmp_path, single):
    run, errors = _fail(tmp_path, "os.kill(os.getpid(), signal.SIGKILL)")
    assert len(errors) == 1
    assert errors[0].startswith("error: another process of this job has ended or does not answer; continue from the")
    assert errors[0].endswith(f"last checkpoint with resume={run}")
    assert checkpoint.load(run / "latest.pt")["step"] == 5  # not 0, the last regular one
    # It differs from the final state, so that the comparison below can fail.
    assert error(checkpoint.load(run / "latest.pt")["meta"], checkpoint.load(single / "latest.pt")["meta"]) > 1e-4
    resumed = _run(tmp_path, 3, f"resume={run}", "threads=1")
    assert resumed.returncode == 0, resumed.stderr
    _assert_same_run(run, single)


@pytest.mark.slow
def test_an_exception_of_one_process_ends_the_job(tmp_path):
    run, errors = _fail(tmp_path, "raise ArithmeticError('of one rank')")
    assert errors == ["error: rank 1: ArithmeticError: of one rank (METAATTN_TRACEBACK=1 shows where)"]
    assert checkpoint.load(run / "latest.pt")["step"] == 5


@pytest.mark.slow
def test_a_sweep_shares_its_directory(tmp_path):
    short = ["train.steps=1", "test.tasks=2", "algorithm=maml,first_order_maml"]
    done = _run(tmp_path, 2, "-m", *TINY, *short)
    assert done.returncode == 0, done.stderr
    runs = [p for p in _only(tmp_path / "outputs" / "sweep").iterdir() if p.is_dir()]
    assert len(runs) == 2
    for run in runs:
        assert {p.name for p in run.iterdir()} == FILES


@pytest.fixture
def be(monkeypatch):
    """Make this process appear as one of several."""

    def call(rank, size):
        monkeypatch.setattr(distributed, "rank", lambda: rank)
        monkeypatch.setattr(distributed, "size", lambda: size)
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(size))

    return call


@pytest.mark.parametrize(("tasks", "size"), [(5, 1), (5, 2), (7, 4), (16, 8), (3, 3)])
def test_shares_are_a_partition(be, tasks, size):
    taken = []
    for rank in range(size):
        be(rank, size)
        start, count = distributed.share(tasks)
        assert count in (tasks // size, -(-tasks // size))
        taken += range(start, start + count)
    assert taken == list(range(tasks))


def test_fewer_tasks_than_processes(be):
    be(0, 4)
    with pytest.raises(UserError, match=r"train\.tasks=3 cannot be split over 4 processes"):
        distributed.share(3)


def test_ranks_draw_different_numbers_the_same_again(be):
    def draw(rank, step):
        be(rank, 2)
        distributed.seed(7, step)
        return torch.rand(1).item()

    drawn = [draw(rank, step) for rank in (0, 1) for step in (0, 1)]
    assert len(set(drawn)) == 4
    assert drawn == [draw(rank, step) for rank in (0, 1) for step in (0, 1)]


def test_a_single_process_is_not_seeded():
    state = torch.get_rng_state()
    distributed.seed(7, 0)
    assert torch.equal(torch.get_rng_state(), state)


def test_devices(be, monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert distributed.device("cuda:1") == "cuda:1"
    assert chosen == []
    be(1, 2)
    assert [distributed.device(name) for name in ("auto", "cuda", "cpu")] == ["cuda:1", "cuda:1", "cpu"]
    assert chosen == [1, 1]
    with pytest.raises(UserError, match="device=cuda:1 is one device for 2 processes"):
        distributed.device("cuda:1")
    be(2, 4)
    with pytest.raises(UserError, match="4 processes need as many GPUs, but there are 2; give --nproc-per-node=2"):
        distributed.device("auto")
