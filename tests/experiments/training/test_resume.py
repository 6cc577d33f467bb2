"""A run that is resumed from a damaged, foreign or absurd checkpoint, or while the disk is full."""

import copy as copying
import hashlib
import json
import math
import resource
import signal
import subprocess
import sys

import pytest
import torch

from experiments.training import checkpoint, metrics
from tests.experiments.training.runs import ROOT, SMOKE, assert_mistake, program

MORE = ("train.steps=22", "test.tasks=2", "train.validation_tasks=2")


def _digests(folder):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir() if p.is_file()}


def _set(*path_and_value):
    """Return a change of a checkpoint's content: the value at a path, or, if it is a function, of the old value."""
    *path, value = path_and_value

    def change(content):
        for key in path[:-1]:
            content = content[key]
        content[path[-1]] = value(content[path[-1]]) if callable(value) else value

    return change


def _without(*path):
    def change(content):
        for key in path[:-1]:
            content = content[key]
        del content[path[-1]]

    return change


WEIGHT = ("meta", "params", "head.weight")
ADAM = ("optimizer", "state", 0)
CHANGES = {
    "shape": (_set(*WEIGHT, torch.zeros(3, 3)), "meta-parameter 'head.weight' should be [5, 16] of torch.float32; got"),
    "dtype": (_set(*WEIGHT, torch.Tensor.double), "should be [5, 16] of torch.float32; got [5, 16] of torch.float64"),
    "no tensor": (_set(*WEIGHT, [1.0]), "should be [5, 16] of torch.float32; got list"),
    "nan": (_set(*WEIGHT, lambda t: t * math.nan), "meta-parameter 'head.weight' has values that are not finite"),
    "infinite": (_set(*WEIGHT, lambda t: t + math.inf), "meta-parameter 'head.weight' has values that are not finite"),
    "parameter missing": (
        _without(*WEIGHT),
        "its meta-parameters 'params' should be those of its config; these differ",
    ),
    "parameter too many": (_set("meta", "params", "more", torch.zeros(2)), "these differ: more"),
    "group missing": (
        _without("meta", "rates"),
        "its meta-parameters should be those of its config; these differ: rates",
    ),
    "group of a number": (_set("meta", 3, {}), "these differ: 3"),
    "another order": (_set("meta", "params", lambda p: dict(reversed(p.items()))), "these differ: the order"),
    "optimizer without state": (_without("optimizer", "state"), "its optimizer's parts should be those of its config"),
    "state of a number": (_set("optimizer", "state", 3), "its optimizer's tensors should be those of its config"),
    "state of nothing": (_set("optimizer", "state", {}), "its optimizer's tensors should be those of its config"),
    "state missing": (_without(*ADAM), "its optimizer's tensors should be those of its config; these differ: 0"),
    "square missing": (_without(*ADAM, "exp_avg_sq"), "its optimizer's tensors of parameter 0 should be those"),
    "square negative": (_set(*ADAM, "exp_avg_sq", lambda t: -t - 1), "its optimizer's exp_avg_sq of parameter 0 has a"),
    "average of another shape": (
        _set(*ADAM, "exp_avg", torch.zeros(1)),
        "its optimizer's exp_avg of parameter 0 should",
    ),
    "average of nan": (
        _set(*ADAM, "exp_avg", lambda t: t * math.nan),
        "exp_avg of parameter 0 has values that are not",
    ),
    "step of nan": (_set(*ADAM, "step", torch.tensor(math.nan)), "its optimizer's step of parameter 0 has values"),
    "step of another run": (_set(*ADAM, "step", torch.tensor(7.0)), "its optimizer is at step 7; its own step is 20"),
    "no groups": (_set("optimizer", "param_groups", []), "its optimizer should have one group of parameters"),
    "groups of a word": (_set("optimizer", "param_groups", ["x"]), "its optimizer should have one group of parameters"),
    "no betas": (
        _without("optimizer", "param_groups", 0, "betas"),
        "its optimizer's betas should be (0.9, 0.999); got None",
    ),
    "betas": (
        _set("optimizer", "param_groups", 0, "betas", "ab"),
        "its optimizer's betas should be (0.9, 0.999); got ab",
    ),
    "a tensor as eps": (
        _set("optimizer", "param_groups", 0, "eps", torch.zeros(2)),
        "its optimizer's eps should be 1e-08",
    ),
    "rate": (_set("optimizer", "param_groups", 0, "lr", math.nan), "its optimizer's lr should be a finite number"),
    "fewer parameters": (
        _set("optimizer", "param_groups", 0, "params", [0]),
        "its optimizer's params should be [0, 1,",
    ),
    "step -1": (_set("step", -1), "its step should be at least 0; got -1"),
    "step true": (_set("step", True), "its entry 'step' should be of type int; got bool"),
    "step 2**70": (_set("step", 2**70), f"the run is at step {2**70} already"),
    "best nan": (_set("best", math.nan), "its best score should be a number; got nan"),
    "best infinite": (_set("best", math.inf), "its best score should be a number; got inf"),
    "best of an integer": (_set("best", 1), "its entry 'best' should be of type float; got int"),
    "seconds": (_set("seconds", "x"), "its seconds should be a finite number; got x"),
    "rows": (_set("rows", -1), "its rows should be an integer; got -1"),
    "torch generator": (_set("rng", "torch", torch.zeros(3, dtype=torch.uint8)), "its states of the random number gen"),
    "numpy generator": (_set("rng", "numpy", None), "its states of the random number generators cannot be restored"),
    "python generator": (
        _set("rng", "python", (1, 2)),
        "its states of the random number generators cannot be restored",
    ),
    "no generator": (_without("rng", "cuda"), "its states of the random number generators cannot be restored"),
    "config empty": (_set("config", {}), "its config is not valid ("),
    "config of a number": (_set("config", {1: 2}), "its config is not valid (a key of config is not a string)"),
    "config of a tensor": (
        _set("config", "seed", torch.zeros(1)),
        "its config is not valid (config.seed is of type Tensor",
    ),
    "unknown key": (
        _set("config", "train", "nonsense", 3),
        "its config is not valid (Key 'nonsense' not in 'TrainConfig'",
    ),
    "word": (
        _set("config", "train", "steps", "many"),
        "its config is not valid (Value 'many' of type 'str' could not be",
    ),
    "null": (_set("config", "train", None), "its config is not valid ("),
    "limit": (_set("config", "train", "tasks", -3), "its config is not valid (train.tasks must be at least 1; got -3)"),
    "absurd": (_set("config", "model", "dim", 10**7), "its config is not valid (model.dim must be at most 65536"),
    "too large": (_set("config", "model", "dim", 2**16), "the model's parameters need "),
    "another model": (_set("config", "model", "dim", 32), "should be [16, 32] of torch.float32; got [16, 16]"),
    "heads": (_set("config", "model", "heads", 3), "heads must be a divisor of dim, 16; got 3"),
    "environment": (
        _set("config", "device", "${oc.env:HOME}"),
        "its config is not valid (config.device is an expression)",
    ),
    "device": (_set("config", "device", "cuda:99"), "device=cuda:99 cannot be used here"),
    "threads": (
        _set("config", "threads", 10**9),
        "its config is not valid (threads must be at most 1024; got 1000000000)",
    ),
    "patterns": (_set("config", "algorithm", "adapts", ["["]), "adapts must match the name of a parameter"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_content_that_does_not_fit_is_one_line(name, finished, command, tmp_path):
    change, message = CHANGES[name]
    content = copying.deepcopy(checkpoint.load(finished[0] / "latest.pt"))
    change(content)
    path = tmp_path / "run" / "latest.pt"
    path.parent.mkdir()
    checkpoint.save(path, content)
    before = _digests(path.parent)
    result = command(f"resume={path.parent}", "train.steps=30")
    assert_mistake(result, message)
    assert str(path) in result[2]
    assert _digests(path.parent) == before


def test_evaluation_checks_the_meta_parameters(finished, command, tmp_path):
    content = checkpoint.load(finished[0] / "best.pt")
    content["meta"]["params"]["head.weight"] *= math.nan
    checkpoint.save(tmp_path / "best.pt", content)
    result = command("mode=evaluate", f"checkpoint={tmp_path / 'best.pt'}")
    assert_mistake(result, f"{tmp_path / 'best.pt'}: meta-parameter 'head.weight' has values that are not finite")


def test_a_damaged_best_checkpoint_is_set_aside(copy, command):
    damaged = (copy / "best.pt").read_bytes()[:-100]
    (copy / "best.pt").write_bytes(damaged)
    with pytest.warns(
        UserWarning, match=r"best\.pt cannot be used \(.* is truncated.*best\.damaged\.pt; the run validates"
    ):
        assert command(f"resume={copy}", *MORE)[0] == 0
    assert (copy / "best.damaged.pt").read_bytes() == damaged
    assert checkpoint.load(copy / "best.pt")["step"] == 22


def test_a_damaged_metrics_file_does_not_stop_a_run(copy, command):
    rows = metrics.read_metrics(copy / "metrics.csv")
    text = (copy / "metrics.csv").read_bytes()
    (copy / "metrics.csv").write_bytes(text.replace(b"train", b"tr\0in", 1))
    with pytest.warns(UserWarning, match=r"metrics\.csv is damaged \(line 2 is not a row|lacks 1 of the \d+ rows"):
        assert command(f"resume={copy}", *MORE)[0] == 0
    assert metrics.read_metrics(copy / "metrics.csv")[: len(rows) - 1] == rows[1:]


# Resumes a run and is killed when metrics.csv is written again, as after a checkpoint that is older than its rows.
KILLED = """
import os, signal, sys
from metaattn.tasks import cache
from experiments.training import metrics
from experiments.training.main import main

def killed(path):
    os.kill(os.getpid(), signal.SIGKILL)

metrics.replacing = killed
sys.argv = ["train_maml.py", *sys.argv[1:]]
main()
"""


@pytest.mark.slow
def test_a_kill_while_a_resumed_run_starts_loses_no_row(copy, command, tmp_path):
    rows = (copy / "metrics.csv").read_bytes()
    (copy / "metrics.csv").write_bytes(rows + b"21,train,1.0")  # the row was cut short by an earlier kill
    arguments, options = program(f"resume={copy}", *MORE)
    killed = [sys.executable, "-c", KILLED, *arguments[2:]]
    assert subprocess.run(killed, cwd=ROOT, capture_output=True, **options).returncode == -signal.SIGKILL
    assert (copy / "metrics.csv").read_bytes() == rows + b"21,train,1.0"
    assert command(f"resume={copy}", *MORE)[0] == 0
    assert (copy / "metrics.csv").read_bytes().startswith(rows)


@pytest.mark.parametrize("kibibytes", [0, 1, 8, 60])
def test_a_full_disk_is_one_line_and_no_file_shrinks(copy, command, tmp_path, kibibytes):
    """The limit of the size of files stands for the disk: a write beyond it fails in the same way."""
    before = _digests(copy)
    sizes = {p.name: p.stat().st_size for p in copy.iterdir()}
    assert max(sizes.values()) > 60 * 1024
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (kibibytes * 1024, limits[1]))
    try:
        code, _, err = command(f"resume={copy}", *MORE)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    last = [line for line in err.strip().splitlines() if "it/s" not in line][-1]
    assert code in (1, 2)
    assert last.startswith("error: ")
    assert "File too large" in last
    assert "Traceback" not in err
    for name, digest in before.items():
        assert (copy / name).exists()
        if name != "metrics.csv":
            assert _digests(copy)[name] == digest or (copy / name).stat().st_size >= sizes[name]
    assert (copy / "metrics.csv").stat().st_size >= sizes["metrics.csv"]
    assert not [p for p in copy.iterdir() if p.name.startswith(".")]
    assert command(f"resume={copy}", *MORE)[0] == 0
    assert json.loads((copy / "summary.json").read_text())["step"] in (10, 20, 22)


@pytest.mark.parametrize("name", ["latest.pt", "tensorboard", "learning.png", "summary.json"])
def test_a_file_or_folder_in_the_place_of_the_other(copy, command, name):
    path = copy / name
    path.rename(copy / "moved")
    if name == "tensorboard":
        path.write_text("a file")
    else:
        path.mkdir()
        (path / "file").write_text("in the way")
    code, _, err = command(f"resume={copy}", *MORE, draw=True)
    lines = [line for line in err.strip().splitlines() if "it/s" not in line]
    assert code in (1, 2), err
    assert lines[-1].startswith("error: ")
    assert name in lines[-1]
    assert "Traceback" not in err


@pytest.mark.parametrize("algorithm", ["cavia", "prototypical", "meta_sgd"])
def test_runs_with_other_meta_parameters_resume(command, tmp_path, algorithm):
    short = ("test.tasks=2", "train.validation_tasks=2")
    code, _, err = command(*SMOKE, f"algorithm={algorithm}", "train.steps=1", *short, f"hydra.run.dir={tmp_path}/run")
    assert code == 0, err
    code, _, err = command(f"resume={tmp_path}/run", "train.steps=2")
    assert code == 0, err
    code, _, err = command("mode=evaluate", f"checkpoint={tmp_path}/run")
    assert code == 0, err
