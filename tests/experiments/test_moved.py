"""The former paths of modules in experiments.training and experiments.studies, and the commands."""

import importlib
import runpy
import sys

import pytest

from experiments import _moved
from experiments.studies import boundary, curvature, data_weights, long_context, second_order

COMMANDS = {m.__name__.rsplit(".", 1)[-1]: m for m in (boundary, curvature, data_weights, long_context, second_order)}


@pytest.mark.parametrize("old", _moved.MOVED)
def test_a_former_path_warns_and_is_the_module(old):
    sys.modules.pop(old, None)
    new = _moved.MOVED[old]
    with pytest.warns(DeprecationWarning, match=f"^{old} is now {new}; the old path will be removed") as warned:
        module = importlib.import_module(old)
    assert module is importlib.import_module(new)
    assert len(warned) == 1


def test_a_name_is_imported_from_its_former_path():
    sys.modules.pop("experiments.config", None)
    with pytest.warns(DeprecationWarning, match=r"experiments\.config is now") as warned:
        from experiments.config import Config
    assert warned[0].filename == __file__
    assert Config is importlib.import_module("experiments.training.config").Config


def test_unknown_names_are_errors():
    with pytest.raises(ModuleNotFoundError, match=r"experiments\.nothing"):
        importlib.import_module("experiments.nothing")
    command = importlib.import_module("experiments.second_order")
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        command.nothing  # noqa: B018


@pytest.mark.parametrize("name", COMMANDS)
def test_the_names_of_a_command(name):
    """The module of a command still has the names of its study, with a warning."""
    command = importlib.import_module(f"experiments.{name}")
    with pytest.warns(
        DeprecationWarning, match=rf"experiments\.{name}\.Settings is now experiments\.studies\.{name}\."
    ) as warned:
        assert command.Settings is COMMANDS[name].Settings
    assert warned[0].filename == __file__


@pytest.mark.parametrize("path", ["experiments", "experiments.studies"])
@pytest.mark.parametrize("name", COMMANDS)
def test_a_study_is_a_command(path, name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    monkeypatch.delitem(sys.modules, f"{path}.{name}", raising=False)
    with pytest.raises(SystemExit) as end:
        runpy.run_module(f"{path}.{name}", run_name="__main__", alter_sys=True)
    assert end.value.code == 0
    out = capsys.readouterr().out
    assert f"Usage: python -m experiments.{name} [key=value ...]" in out
    assert out.startswith(COMMANDS[name].__doc__)
