"""Imports go one way, private modules stay in their package, and each package lists its public names."""

import ast
import importlib
import inspect
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import metaattn

ROOT = Path(__file__).parent.parent
# The packages that each package may import, and no others. metaattn/__init__ re-exports and may import all.
MAY_IMPORT = {
    "metaattn.backends": set(),
    "metaattn.autodiff": {"metaattn.backends"},
    "metaattn.ops": {"metaattn.backends", "metaattn.autodiff"},
    "metaattn.compile": {"metaattn.backends", "metaattn.autodiff", "metaattn.ops"},
    "metaattn.nn": {"metaattn.ops", "metaattn.autodiff"},
    "metaattn.meta": {"metaattn.ops", "metaattn.autodiff", "metaattn.compile"},
    "metaattn.tasks": set(),
    "metaattn.integrations": {"metaattn.ops", "metaattn.autodiff", "metaattn.nn", "metaattn.meta", "metaattn.tasks"},
    "metaattn.cli": {"metaattn"},
    "metaattn.__main__": {"metaattn.cli"},
    "experiments": {"metaattn"},
    "train_maml": {"experiments"},
}
FILES = [
    *sorted((ROOT / "metaattn").rglob("*.py")),
    *sorted((ROOT / "experiments").rglob("*.py")),
    ROOT / "train_maml.py",
]
FILES = [f for f in FILES if f.exists() and f != ROOT / "metaattn" / "__init__.py"]


def _module(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _package_of(module):
    """Return the package of MAY_IMPORT that a module is in."""
    parts = module.split(".")
    return ".".join(parts[:2]) if parts[0] == "metaattn" else parts[0]


def _imports(path):
    """Generate the absolute names that a file imports."""
    package = path.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            name = ".".join([*base, node.module] if node.module else base)
            yield name
            yield from (f"{name}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_direction(path):
    package = _package_of(_module(path))
    for name in _imports(path):
        top = name.split(".")[0]
        if top not in ("metaattn", "experiments", "train_maml", "tests", "scripts"):
            continue
        other = _package_of(name)
        allowed = other == package or other in MAY_IMPORT[package] or (top in MAY_IMPORT[package])
        if other == "metaattn" and package.startswith("metaattn") and package != "metaattn.cli":
            allowed = False  # only the commands are above metaattn/__init__
        assert allowed, (
            f"{_module(path)} imports {name}: {package} may import {sorted(MAY_IMPORT[package]) or 'nothing of ours'}"
        )


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_where_other_libraries_are_imported(path):
    """Only experiments and train_maml.py import Hydra, only its backend Triton, and no backend imports autograd."""
    module, names = _module(path), set(_imports(path))
    tops = {n.split(".")[0] for n in names}
    if module.startswith("metaattn"):
        assert not tops & {"hydra", "omegaconf"}
    if not module.startswith("metaattn.backends.triton"):
        assert "triton" not in tops
    if module.startswith("metaattn.backends"):
        assert not any(n.startswith(("torch.autograd", "torch.func")) for n in names)


def _package(module, path):
    return module if path.name == "__init__.py" else module.rpartition(".")[0]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_private_modules_stay_in_their_package(path):
    """Only its own package, and those inside it, import a module ``_name``."""
    package = _package(_module(path), path)
    for name in _imports(path):
        parts = name.split(".")
        for i, part in enumerate(parts):
            owner = ".".join(parts[:i])
            is_file = (ROOT / Path(*parts[:i]) / f"{part}.py").exists()
            if i and part.startswith("_") and is_file:
                assert (package + ".").startswith(owner + "."), f"{_module(path)} imports the private module {name}"


def _packages():
    yield "metaattn"
    yield from (m.name for m in pkgutil.walk_packages(metaattn.__path__, "metaattn.") if m.ispkg)


@pytest.mark.parametrize("name", list(_packages()))
def test_public_names(name):
    """``__all__`` is sorted and complete, and every name in it has a docstring."""
    module = importlib.import_module(name)
    names = module.__all__
    assert list(names) == sorted(names)
    for n in names:
        thing = getattr(module, n)
        if inspect.isclass(thing) or inspect.isroutine(thing):
            assert thing.__doc__, f"{name}.{n} has no docstring"
    here = {
        n
        for n, v in vars(module).items()
        if not n.startswith("_") and getattr(v, "__module__", "").startswith("metaattn") and callable(v)
    }
    assert here <= set(names), f"public but not in {name}.__all__: {sorted(here - set(names))}"


def test_tasks_are_imported_when_they_are_asked_for():
    """They need matplotlib, which takes longer to import than all the rest of ours."""
    code = """
import sys, metaattn
assert "tasks" in dir(metaattn) and "matplotlib" not in sys.modules
assert metaattn.tasks.stack and "matplotlib" in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="module 'metaattn' has no attribute 'task'"):
        metaattn.task  # noqa: B018


def test_files_are_read_in_one_sitting():
    long = {str(f.relative_to(ROOT)): n for f in FILES if (n := len(f.read_text().splitlines())) > 600}
    assert not long, f"longer than 600 lines: {long}"
