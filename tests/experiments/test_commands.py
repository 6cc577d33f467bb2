"""Every command line that the README, the documentation and ``--help`` print runs as printed, for two steps."""

import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import warnings

import pytest
import torch

from metaattn.compile import compiler
from metaattn.compile.piecewise import as_recorded
from tests.experiments.training.runs import ROOT, run_main

PRINTED = [
    *(ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))),
    *(ROOT / "conf" / "config.yaml", *sorted((ROOT / "experiments" / "studies").glob("*.py"))),  # the texts of --help
]
COMMAND = re.compile(r"(?:python train_maml\.py|torchrun [^`\n]*train_maml\.py|python -m experiments\.\w+)[^`\n#]*")
# What makes the lines short, beside the number of steps: fewer tasks, which change no more than the batch's size.
SHORT = ["train.tasks=4", "train.validation_tasks=2", "test.tasks=2", "threads=1"]
SHORT_STUDY = {
    "second_order": ["inner_steps=[1]", "dim=16", "tasks=2"],
    "boundary": [],
    "data_weights": ["meta_steps=2", "length=16", "batch=4", "dim=32", "depth=2", "heads=4", "inner_steps=4"],
    "long_context": ["meta_steps=2", "test_texts=4", "chunks=4", "batch=2", "chunk=16", "dim=24", "depth=2"],
    "curvature": ["meta_steps=2", "tasks=1"],
}


def commands():
    """Return the printed lines, without the words that explain them in ``--help`` and after two blanks."""
    found = {}
    for path in PRINTED:
        for match in COMMAND.findall(path.read_text()):
            line = re.split(r"  |&&| \(", match.replace('"', ""))[0].strip()
            if path.name == "config.yaml":  # one blank before the explanation, where the line is long
                line = " ".join(w for w in line.split() if re.search(r"python|torchrun|train_maml|=|^-", w))
            if "NAME" not in line:
                found.setdefault(line, path.relative_to(ROOT).as_posix())
    return found


COMMANDS = commands()


def _study(line):
    return re.match(r"python -m experiments\.(\w+)", line)


TRAIN = [line for line in COMMANDS if line.startswith("python train_maml.py")]
STUDIES = [line for line in COMMANDS if _study(line)]
TORCHRUN = [line for line in COMMANDS if line.startswith("torchrun")]


@pytest.fixture
def here(finished, tmp_path, monkeypatch):
    """A directory with a finished run at the path that the lines name."""
    shutil.copytree(finished[0], tmp_path / "outputs" / "glyphs" / "DATE")
    monkeypatch.chdir(tmp_path)
    # The steps are recorded and split, but not lowered, because the C++ compiler would take minutes.
    monkeypatch.setattr(compiler, "inductor_compiler", lambda options: lambda module, inputs: as_recorded(module))
    return tmp_path


def _short(line):
    """Return what to add to a line, so that it takes two steps."""
    if "--help" in line:
        return []
    cpu = [] if torch.cuda.is_available() else ["device=cpu"]
    if "mode=evaluate" in line:
        return ["test.tasks=2", "threads=1", *cpu]
    if "resume=" in line:  # the run is at step 20
        return ["train.steps=22", *SHORT[1:], *cpu]
    return ["train.steps=2", *SHORT, *cpu]


def test_the_lines_are_found():
    assert len(TRAIN) >= 15, TRAIN
    assert len(STUDIES) >= 6, STUDIES
    assert len(TORCHRUN) >= 2, TORCHRUN
    assert {"python train_maml.py", "python train_maml.py task=sinusoid algorithm=meta_sgd"} <= {*TRAIN}
    assert "README.md" in COMMANDS.values()
    assert "docs/guides/training.md" in COMMANDS.values()
    assert "conf/config.yaml" in COMMANDS.values()


@pytest.mark.parametrize("line", TRAIN)
def test_train_maml(line, here):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the steps? runs? eagerly")  # compile=graph on a CPU
        code, out, err = run_main(here, *shlex.split(line)[2:], *_short(line))
    assert code in (0, None), err
    assert "held-out test tasks" in out or "--help" in line


@pytest.mark.slow
@pytest.mark.parametrize("line", TORCHRUN)
def test_torchrun(line, here):
    torchrun, *options = shlex.split(line)
    assert torchrun == "torchrun"
    at = options.index("train_maml.py")
    arguments = ["-m", "torch.distributed.run", "--standalone", *options[:at], str(ROOT / "train_maml.py")]
    done = subprocess.run(
        [sys.executable, *arguments, *options[at + 1 :], *_short(line)],
        cwd=here,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "held-out test tasks" in done.stdout


@pytest.mark.parametrize("line", STUDIES)
def test_studies(line, here, monkeypatch, capsys):
    name = _study(line)[1]
    if name == "curvature":
        pytest.importorskip("curvlinops", reason="could not import curvlinops")
    short = SHORT_STUDY[name] if torch.cuda.is_available() else [*SHORT_STUDY[name], "device=cpu"]
    monkeypatch.setattr(sys, "argv", [name, *shlex.split(line)[3:], *short])
    code = None
    try:
        runpy.run_module(f"experiments.{name}", run_name="__main__")
    except SystemExit as end:
        code = end.code
    assert code in (0, None), capsys.readouterr().err
