"""Fixtures of the tests of the commands."""

import shutil

import pytest

from experiments.training import report
from tests.experiments.training.runs import SMOKE, only, run_main


@pytest.fixture
def command(monkeypatch, tmp_path):
    """Run ``train_maml.py`` in an empty directory. Plots, which take half of the time, are only drawn on request."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments, draw=False):
        with pytest.MonkeyPatch.context() as patch:
            if not draw:
                for name in ("learning", "adaptation", "episode"):
                    patch.setattr(report, name, lambda path, *_, **__: path.touch())
            return run_main(tmp_path, *arguments)

    return call


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A complete smoke run of 20 steps: its directory and its stdout."""
    cwd = tmp_path_factory.mktemp("finished")
    code, out, err = run_main(cwd, *SMOKE)
    assert code == 0, err
    return only(cwd / "outputs" / "glyphs"), out


@pytest.fixture
def copy(finished, tmp_path):
    """A copy of the finished run, to resume."""
    return shutil.copytree(finished[0], tmp_path / "copy")
