"""The command ``train_maml.py``: the files of a run, errors and exit codes, kill and resume."""

import csv
import json
import os
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from experiments.training import checkpoint, loop, metrics, setup
from experiments.training.config import Backend, Config, TaskConfig, TaskName
from metaattn.compile import compiler
from metaattn.compile.piecewise import as_recorded
from tests.conftest import NO_KERNELS
from tests.experiments.training.runs import SMOKE, assert_mistake, only, program, run_main

ROOT = Path(__file__).parents[3]


def _start(cwd, *arguments):
    arguments, options = program(*SMOKE, *arguments)
    return subprocess.Popen(arguments, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)


def _wait_for_step(out, step, process):
    """Wait until ``latest.pt`` has reached a step; return its path."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()[1]
        for path in out.glob("*/latest.pt"):
            if checkpoint.load(path)["step"] >= step:
                return path
        time.sleep(0.05)
    raise AssertionError("no checkpoint in two minutes")


def test_a_run_writes_all_files(finished):
    run, out = finished
    names = {p.name for p in run.iterdir()}
    plots = {"adaptation.png", "learning.png", "episode.png"}
    assert names == plots | {"config.yaml", "metrics.csv", "summary.json", "latest.pt", "best.pt", "tensorboard"}
    for name in plots:
        pixels = np.asarray(Image.open(run / name).convert("L"))
        assert min(pixels.shape) > 200
        assert pixels.std() > 5  # not an empty canvas
    assert list((run / "tensorboard").glob("events.out.tfevents.*"))
    assert "accuracy on 20 held-out test tasks" in out
    assert "nearest neighbour" in out
    assert "chance" in out


def test_metrics(finished):
    with (finished[0] / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {r["split"] for r in rows} == {"train", "validation"}
    assert [int(r["step"]) for r in rows if r["split"] == "validation"] == [10, 20]
    assert [int(r["step"]) for r in rows if r["split"] == "train"] == [1, 5, 10, 15, 20]
    for r in rows:
        assert 0 <= float(r["accuracy_before"]) <= 1
        assert float(r["loss_after"]) > 0


def test_summary(finished):
    summary = json.loads((finished[0] / "summary.json").read_text())
    assert summary["tasks"] == 20
    assert summary["chance"] == 0.2
    assert len(summary["at_each_step"]) >= 6
    assert summary["at_each_step"][0] == summary["before"]["mean"]
    assert summary["at_each_step"][summary["inner_steps"]] == summary["after"]["mean"]
    assert 0 < summary["after"]["ci95"] < 0.5


def test_config_is_resolved(finished):
    text = (finished[0] / "config.yaml").read_text()
    assert "steps: 20" in text
    assert "${" not in text


def test_checkpoint_has_what_a_resumed_run_needs(finished):
    content = checkpoint.load(finished[0] / "latest.pt")
    assert content["step"] == 20
    assert {"torch", "cuda", "numpy", "python"} == set(content["rng"])
    assert content["config"]["task"]["name"] == "glyphs"
    assert content["meta"]["params"]["head.weight"].shape == (5, 16)


@pytest.mark.slow
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_kill_and_resume_is_bit_exact(tmp_path, dropout, finished):
    """20 steps equal some steps, kill -9, and the rest after a resume. Dropout depends on the random generators."""
    extra = [f"model.dropout={dropout}", f"model.attention_dropout={dropout}"]
    killed = _start(tmp_path, *extra, "train.checkpoint_every=1")
    if dropout:
        reference = tmp_path / "whole"
        code, _, err = run_main(
            tmp_path, *SMOKE, *extra, f"hydra.run.dir={reference}"
        )  # while the other process starts
        assert code == 0, err
    else:
        reference = finished[0]
    path = _wait_for_step(tmp_path / "outputs" / "glyphs", 8, killed)
    killed.send_signal(signal.SIGKILL)
    killed.communicate(timeout=30)
    assert checkpoint.load(path)["step"] < 20
    resume = [f"resume={path.parent}", "threads=1"]
    if dropout:
        code, _, err = run_main(tmp_path, *resume)
    else:
        arguments, options = program(*resume)
        done = subprocess.run(arguments, cwd=tmp_path, capture_output=True, timeout=300, **options)
        code, err = done.returncode, done.stderr
    assert code == 0, err
    got, want = checkpoint.load(path), checkpoint.load(reference / "latest.pt")
    for part in ("meta", "optimizer", "step", "best", "rng"):
        _assert_identical(got[part], want[part])
    rows = [
        [{k: v for k, v in r.items() if k != "steps_per_second"} for r in metrics.read_metrics(p / "metrics.csv")]
        for p in (path.parent, reference)
    ]
    assert rows[0] == rows[1]


def _assert_identical(a, b):
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for k in a:
            _assert_identical(a[k], b[k])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            _assert_identical(x, y)
    else:
        assert a == b


@pytest.mark.slow
def test_ctrl_c_saves_and_stops(tmp_path):
    process = _start(tmp_path, "train.steps=100000", "train.checkpoint_every=100000")
    run = tmp_path / "outputs" / "glyphs"
    _wait_for_step(run, 0, process)
    while not any(len(p.read_text().splitlines()) > 2 for p in run.glob("*/metrics.csv")):
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "continue with resume=" in err
    assert "Traceback" not in err
    assert checkpoint.load(only(run) / "latest.pt")["step"] >= 5


@pytest.fixture
def signals(monkeypatch):
    """Send signals to this process in the sixth step; a signal that the program does not handle fails the test."""

    def unhandled(number, _):
        raise AssertionError(f"signal {number} is not handled")

    def send(*numbers):
        take_step = loop.Trainer._take_step

        def step(trainer):
            if trainer.state.step == 5:
                for number in numbers:
                    os.kill(os.getpid(), number)
            return take_step(trainer)

        monkeypatch.setattr(loop.Trainer, "_take_step", step)

    before = {number: signal.signal(number, unhandled) for number in (signal.SIGINT, signal.SIGTERM)}
    yield send
    assert all(signal.signal(number, handler) is unhandled for number, handler in before.items())


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_stops_after_the_step(command, tmp_path, signals, number, code):
    signals(number)
    result, out, err = command(*SMOKE, "train.checkpoint_every=100")
    run = only(tmp_path / "outputs" / "glyphs")
    assert (result, out) == (code, "")
    assert err.endswith(f"stopped after a complete step, which is saved; continue with resume={run}\n")
    assert checkpoint.load(run / "latest.pt")["step"] == 6
    assert (run / "learning.png").exists()


def test_a_second_signal_stops_immediately(command, tmp_path, signals):
    signals(signal.SIGTERM, signal.SIGINT)
    result, _, err = command(*SMOKE, "train.checkpoint_every=100")
    assert (result, err.splitlines()[-1]) == (130, "stopped immediately")
    assert checkpoint.load(only(tmp_path / "outputs" / "glyphs") / "latest.pt")["step"] == 0


def test_evaluate(finished, command):
    code, out, _ = command("mode=evaluate", f"checkpoint={finished[0]}", "test.tasks=30")
    assert code == 0
    assert "accuracy on 30 held-out test tasks" in out
    again = command("mode=evaluate", f"checkpoint={finished[0] / 'best.pt'}", "test.tasks=30", "backend=reference")[1]
    assert again.splitlines()[1] == out.splitlines()[1]


def test_evaluation_repeats_that_of_the_run(finished, command):
    out = command("mode=evaluate", f"checkpoint={finished[0]}")[1]
    assert out.splitlines()[1] in finished[1]


def test_evaluation_accepts_changes_of_tasks_and_execution(finished, command, tmp_path):
    changes = ["task.shot=5", "task.queries=2", "task.augment=false", "seed=3", "test.steps=2", "test.chunk_size=7"]
    code, out, err = command("mode=evaluate", f"checkpoint={finished[0]}", "test.tasks=30", "threads=1", *changes)
    assert code == 0, err
    summary = json.loads((only(tmp_path / "outputs" / "evaluate") / "summary.json").read_text())
    assert (summary["tasks"], summary["inner_steps"], len(summary["at_each_step"])) == (30, 2, 3)
    plain = command("mode=evaluate", f"checkpoint={finished[0]}", "test.tasks=30", "threads=1")[1]
    assert [line.split()[:2] for line in plain.splitlines()] != [line.split()[:2] for line in out.splitlines()]


LEARNED = ["task=sinusoid", "task.way=3", "task.way=7", "model.dim=64", "algorithm=anil", "precision=float64"]


@pytest.mark.parametrize("override", [*LEARNED, "train.steps=3", "experiment=smoke", "resume=x", "+foo=1", "test={}"])
def test_evaluation_rejects_other_changes(finished, command, override):
    assert_mistake(
        command("mode=evaluate", f"checkpoint={finished[0]}", override),
        f"{override.split('=')[0].lstrip('+')} cannot change when a run is evaluated, it comes from the checkpoint; "
        "these can: mode, checkpoint,",
    )


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("test.tasks=1", "test.tasks must be at least 2; got 1"),
        ("+test.foo=1", "Key 'foo' not in 'TestConfig'"),
        ("task.shot=9", "9 shots and 5 queries need 14 samples of each class"),
    ],
)
def test_evaluation_checks_the_changes(finished, command, override, message):
    assert_mistake(command("mode=evaluate", f"checkpoint={finished[0]}", override), message)


def test_null_resets_a_value_of_the_checkpoint(command, tmp_path):
    assert command(*SMOKE, "train.steps=1", "test.tasks=2", "test.steps=1", f"hydra.run.dir={tmp_path}/run")[0] == 0
    steps = lambda: len(json.loads((tmp_path / "e" / "summary.json").read_text())["at_each_step"])
    evaluate = ["mode=evaluate", f"checkpoint={tmp_path}/run", f"hydra.run.dir={tmp_path}/e"]
    code, out, _ = command(*evaluate)
    assert (code, steps()) == (0, 2)
    assert "after 1 inner step " in out
    assert (command(*evaluate, "test.steps=null")[0], steps()) == (0, 11)


def test_sweep(command, tmp_path):
    code, _, _ = command("-m", *SMOKE, "algorithm=first_order_maml,anil", "train.steps=2", "test.tasks=4")
    assert code == 0
    runs = [p for p in (tmp_path / "outputs" / "sweep").glob("*/*") if p.is_dir()]
    assert len(runs) == 2
    assert all((r / "summary.json").exists() for r in runs)


REGRESSION = ["maml", "first_order_maml", "anil", "boil", "meta_sgd", "maml_plus_plus", "reptile", "imaml", "cavia"]


@pytest.mark.parametrize("algorithm", REGRESSION)
def test_algorithms_and_sinusoids(command, algorithm, tmp_path):
    code, out, _ = command(
        *SMOKE,
        "task=sinusoid",
        f"algorithm={algorithm}",
        "train.steps=3",
        "train.validate_every=3",
        "test.tasks=4",
        draw=algorithm in ("maml", "reptile"),
    )
    assert code == 0
    assert "loss on 4 held-out test tasks" in out
    assert (only(tmp_path / "outputs" / "sinusoid") / "episode.png").exists()


@pytest.mark.parametrize("algorithm", ["prototypical", "proto_maml"])
def test_algorithms_of_classification(command, algorithm, tmp_path):
    code, out, _ = command(
        *SMOKE, f"algorithm={algorithm}", "train.steps=3", "train.validate_every=3", "test.tasks=4", draw=True
    )
    assert code == 0
    inner = algorithm != "prototypical"
    assert ("after 3 inner steps" in out) == ("before adaptation" in out) == inner
    assert ("from prototypes, no inner steps" in out) != inner
    assert (only(tmp_path / "outputs" / "glyphs") / "adaptation.png").exists() == inner


@pytest.mark.parametrize("gradient", ["mixed", "truncated", "implicit"])
def test_gradients(command, gradient):
    options = [f"algorithm.gradient={gradient}", "algorithm.segments=2", "algorithm.proximal=10"]
    options += ["algorithm.learning_rate=0.05", "train.steps=2", "test.tasks=2"]
    assert command(*SMOKE, "task=sinusoid", *options)[0] == 0


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ([], "a CUDA graph needs tensors on a GPU"),
        (["algorithm=maml_plus_plus"], "algorithm=maml_plus_plus changes from step to step, and a compiled or"),
    ],
)
def test_a_step_that_cannot_be_captured_runs_eagerly(command, options, reason):
    with pytest.warns(UserWarning, match=f"run.? eagerly: {reason}") as warned:
        assert command(*SMOKE, "train.steps=2", "device=cpu", "compile=graph", *options)[0] == 0
    assert len([w for w in warned if "eagerly" in str(w.message)]) == 1


def test_compiled_steps_learn_as_eager_ones_do(command, monkeypatch):
    """The steps are recorded and split, but not lowered, because the C++ compiler would take minutes."""
    lowered = []
    monkeypatch.setattr(
        compiler,
        "inductor_compiler",
        lambda options: lambda module, inputs: lowered.append(module) or as_recorded(module),
    )
    losses = {}
    for how in ("none", "inductor"):
        options = ["train.steps=2", "test.tasks=2", "precision=float64", "device=cpu", f"hydra.run.dir={how}"]
        assert command(*SMOKE, *options, f"compile={how}")[0] == 0
        losses[how] = [row["loss_after"] for row in metrics.read_metrics(Path(how) / "metrics.csv")]
    assert lowered
    assert losses["inductor"] == pytest.approx(losses["none"], rel=1e-9)


def test_every_algorithm_is_tested():
    assert {*REGRESSION, "prototypical", "proto_maml"} == {p.stem for p in (ROOT / "conf" / "algorithm").iterdir()}


@pytest.mark.parametrize(
    "options",
    [[f"precision={p}"] for p in ("float64", "tf32", "bfloat16", "autocast")]
    + [["backend=reference"], ["model.norm=rms"]],
)
def test_options(command, options):
    assert command(*SMOKE, *options, "train.steps=2", "test.tasks=2")[0] == 0


@pytest.mark.skipif(NO_KERNELS is not None, reason=NO_KERNELS or "")
def test_the_triton_backend_runs_in_its_interpreter():
    c = Config(TaskConfig(TaskName.sinusoid), backend=Backend.triton, device="cpu")
    assert setup.setup(c).model.config.backend == "triton"


def test_help(command):
    code, out, _ = command("--help")
    assert code in (0, None)
    for words in ("resume=", "mode=evaluate", "experiment=smoke", "algorithm: anil", "Ctrl-C", "train.steps=5000"):
        assert words in out
    for line in ("backend: auto, reference, blockwise, triton, vendor", "task: glyphs, omniglot, sinusoid"):
        assert line in out.splitlines()
    assert "model.norm: layer, rms" in out.splitlines()


MISTAKES = {
    "key": (["trian.steps=3"], "did you mean 'train'"),
    "nested_key": (["train.stps=3"], "did you mean 'steps'"),
    "value": (["backend=tritn"], "auto, reference, blockwise, triton"),
    "type": (["train.steps=many"], "many"),
    "group": (["task=glyph"], "did you mean 'glyphs'?); the choices are glyphs, omniglot, sinusoid"),
    "far_group": (["task=foo"], "Could not find 'task/foo'; the choices are glyphs, omniglot, sinusoid"),
    "no_value": (["train.steps"], "Error parsing override 'train.steps'; expected key=value"),
    "flag": (["--steps", "3"], "unrecognized arguments: --steps; settings are key=value, without dashes"),
    "experiment": (["experiment=smok"], "did you mean 'smoke'"),
    "no_experiment": (
        ["experiment=null"],
        "experiment must be one of glyphs_20way, glyphs_gpu, sinusoid, smoke, or be",
    ),
    "no_task": (["task="], "task must be one of glyphs, omniglot, sinusoid, or be left out; got task="),
    "null_in_a_sweep": (["-m", "algorithm=maml,null"], "algorithm must be one of anil, boil,"),
    "no_key": (["=3"], "expected key=value; got =3"),
    "enum": (
        ["backend=trition"],
        "expected one of [auto, reference, blockwise, triton, vendor] (did you mean 'triton'?)",
    ),
    "far_enum": (["precision=half"], "expected one of [float32, tf32, float64, bfloat16, autocast]"),
    "null": (["hydra.run.dir=null"], "field 'hydra.run.dir' is not Optional"),
    "absurd": (["model.dim=10000000"], "model.dim must be at most 65536; got 10000000"),
    "too_large": (["model.dim=65536", "model.depth=1024"], "the model's parameters need "),
    "no_folder": (["hydra.run.dir=/proc/nothing/here"], "the output directory cannot be created: /proc/nothing: "),
    "file_as_folder": (
        [f"hydra.run.dir={__file__}"],
        f"the output directory cannot be created: {__file__}: File exists",
    ),
    "file_above": ([f"hydra.run.dir={__file__}/a"], "the output directory cannot be created: "),
    "triton": (["backend=triton"], "backend='triton' needs a CUDA device; the tensors are on cpu"),
    "vendor": (["backend=vendor"], "backend='vendor' needs a CUDA device; the tensors are on cpu"),
    "device": (["device=cuda:7"], "device=cuda:7 cannot be used here"),
    "heads": (["model.heads=5"], "heads must be a divisor of dim, 64; got 5"),
    "patch": (["model.patch_size=5"], "patch_size must be a divisor of image_size, 28; got 5"),
    "way": (["task.way=3000"], "3000-way episodes need at least 3000 classes"),
    "shots": (["task.shot=10"], "need 15 samples of each class; class"),
    "patterns": (["algorithm.adapts=[tail.*]"], "adapts must match the name of a parameter; got ['tail.*']"),
    "no_steps": (["algorithm.steps=0"], "steps must be at least 1; got 0"),
    "no_classes": (
        ["task=sinusoid", "algorithm=prototypical"],
        "algorithm=prototypical is for classification; use task=glyphs or task=omniglot",
    ),
    "reptile": (["algorithm=reptile", "algorithm.learns=scalar"], "learns must be 'nothing'; got 'scalar'"),
    "omniglot": (["task=omniglot"], "task=omniglot needs task.root=PATH"),
    "omniglot_root": (["task=omniglot", "task.root=/nowhere"], "no Omniglot in /nowhere"),
    "clip": (["train.clip=-1"], "train.clip must be positive and finite, or null; got -1.0"),
    "rate": (["train.learning_rate=nan"], "train.learning_rate must be positive and finite; got nan"),
    "seed": (["seed=-1"], "seed must be at least 0 and below 2**63; got -1"),
    "one_way": (["task.way=1"], "task.way must be at least 2; got 1"),
    "added_key": (["+foo=1"], "Key 'foo' not in 'Config'"),
    "added_nested_key": (["++train.stps=1"], "Key 'stps' not in 'TrainConfig' (did you mean 'steps'?)"),
    "mlp_ratio": (
        ["model.mlp_ratio=1e-5"],
        "mlp_ratio must be positive and finite, and large enough for a hidden unit at dim=64",
    ),
    "training_a_checkpoint": (
        ["checkpoint=a/b"],
        "checkpoint=a/b is for mode=evaluate; to train it further give resume=",
    ),
    "no_checkpoint": (["mode=evaluate"], "mode=evaluate needs checkpoint=PATH"),
    "lost_checkpoint": (["resume=/nowhere/latest.pt"], "no checkpoint at /nowhere/latest.pt"),
}


@pytest.mark.skipif(torch.cuda.is_available(), reason="the errors of a machine without a GPU")
@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_and_exit_code_2(name, command, tmp_path, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    arguments, message = MISTAKES[name]
    assert_mistake(command(*arguments), message)
    assert not list(tmp_path.glob("outputs/*/*"))


def test_damaged_checkpoints(finished, command, tmp_path):
    whole = (finished[0] / "latest.pt").read_bytes()
    flipped = bytearray(whole)
    flipped[whole.index(b"data.pkl") + 60] ^= 0xFF
    torch.save({"weights": torch.ones(3)}, tmp_path / "foreign.pt")
    torch.save(Path("x"), tmp_path / "pickle.pt")
    files = {
        "truncated.pt": (whole[: len(whole) // 2], "is truncated"),
        "empty.pt": (b"", "is truncated"),
        "flipped.pt": (bytes(flipped), "is damaged"),
        "text.pt": (b"hello", "not a checkpoint of train_maml.py"),
        "foreign.pt": (None, "is not a checkpoint of train_maml.py"),
        "pickle.pt": (None, "is not a checkpoint of train_maml.py"),
    }
    for name, (content, message) in files.items():
        if content is not None:
            (tmp_path / name).write_bytes(content)
        code, _, err = command("mode=evaluate", f"checkpoint={tmp_path / name}")
        assert (code, name in err, message in err) == (2, True, True), err


def test_a_directory_without_a_run(command, tmp_path):
    (tmp_path / "empty").mkdir()
    code, _, err = command(f"resume={tmp_path / 'empty'}")
    assert code == 2
    assert "contains no latest.pt" in err


def test_only_an_empty_directory_of_this_command_is_removed(command, tmp_path):
    mistake = ["model.heads=5", "threads=1"]
    (tmp_path / "empty").mkdir()
    assert command(*mistake, f"hydra.run.dir={tmp_path / 'empty'}")[0] == 2
    assert command(f"resume={tmp_path / 'empty'}")[0] == 2
    assert (tmp_path / "empty").is_dir()
    assert command(f"resume={tmp_path / 'lost' / 'latest.pt'}")[0] == 2
    assert not (tmp_path / "lost").exists()
    assert command("-m", *mistake, "seed=0,1")[0] == 2
    assert not [p for p in (tmp_path / "outputs" / "sweep").glob("*/*") if p.is_dir()]


def test_resume_rejects_another_model(finished, command):
    code, _, err = command(f"resume={finished[0]}", "model.dim=32")
    assert code == 2
    assert "model.dim cannot change when a run is resumed" in err


def test_resume_rejects_fewer_steps_than_were_taken(copy, command):
    assert_mistake(
        command(f"resume={copy}", "train.steps=3"),
        "the run is at step 20 already; train.steps=3 would do nothing",
    )


def test_resuming_a_finished_run_evaluates_it_again(copy, finished, command):
    summary = json.loads((copy / "summary.json").read_text())
    code, out, _ = command(f"resume={copy}")
    again = json.loads((copy / "summary.json").read_text())
    assert code == 0
    assert out.splitlines()[:-1] == finished[1].splitlines()[-6:-1]
    assert again.pop("seconds") == pytest.approx(summary.pop("seconds"), abs=30)
    assert again == summary


def test_a_copy_without_its_best_checkpoint_validates_again(copy, command):
    (copy / "best.pt").unlink()
    assert command(f"resume={copy}", "threads=1", "test.tasks=2")[0] == 0
    assert checkpoint.load(copy / "best.pt")["step"] == 20


@pytest.mark.parametrize("before", [{"seconds": 1000.0}, {}])  # older checkpoints do not have it
def test_the_seconds_of_all_sessions_count(before, copy, command):
    content = checkpoint.load(copy / "latest.pt")
    del content["seconds"]
    checkpoint.save(copy / "latest.pt", {**content, **before})
    assert command(f"resume={copy}", "threads=1", "train.steps=21", "test.tasks=2")[0] == 0
    assert 0 < json.loads((copy / "summary.json").read_text())["seconds"] - before.get("seconds", 0.0) < 100


def test_a_validation_that_is_not_finite_stops(command):
    options = ("task=sinusoid", "model=tiny", "train.steps=1", "train.learning_rate=1e30", "train.warmup=0")
    code, _, err = command(*SMOKE, *options)
    last = err.strip().splitlines()[-1]
    assert code == 1
    assert last.startswith("error: the loss of validation is nan at step 1; the last good checkpoint is ")


def test_a_loss_that_is_not_finite_names_step_and_checkpoint(command, tmp_path):
    code, _, err = command(*SMOKE, "algorithm.learning_rate=1e30", "algorithm.learns=nothing")
    last = err.strip().splitlines()[-1]
    assert code == 1
    assert last.startswith("error: the loss is nan at step ")
    run = only(tmp_path / "outputs" / "glyphs")
    assert str(run / "latest.pt") in last
    step = checkpoint.load(run / "latest.pt")["step"]
    assert f"of step {step}" in last
    assert all(t.isfinite().all() for t in checkpoint.load(run / "latest.pt")["meta"]["params"].values())
