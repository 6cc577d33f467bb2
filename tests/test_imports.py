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


def _dependencies(path, modules):
    """The modules of ours that a file imports, at its head or in a function; of a package, what is taken from it."""
    package = path.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in modules)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            name = ".".join([*base, node.module] if node.module else base)
            for full in (f"{name}.{alias.name}" for alias in node.names):
                if full in modules or name in modules:
                    yield full if full in modules else name


def _circles(graph):
    """The strongly connected components of more than one node (Tarjan 1972)."""
    index, low, stack, circles = {}, {}, [], []

    def visit(node):
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in graph[node]:
            if other not in index:
                visit(other)
            if other in stack:
                low[node] = min(low[node], low[other])
        if low[node] == index[node]:
            at = stack.index(node)
            component = stack[at:]
            del stack[at:]
            if len(component) > 1:
                circles.append(sorted(component))

    for node in graph:
        if node not in index:
            visit(node)
    return circles


def test_circles_are_found():
    graph = {"a": {"b"}, "b": {"c"}, "c": {"b", "d"}, "d": set(), "e": {"a", "f"}, "f": {"e"}}
    assert _circles(graph) == [["b", "c"], ["e", "f"]]


def test_no_import_circle():
    """Not even a lazy one: two modules that import each other are one module, and should be three."""
    files = {_module(f): f for f in (ROOT / "metaattn").rglob("*.py")}
    graph = {module: set(_dependencies(path, files)) - {module} for module, path in files.items()}
    assert len(graph) > 80
    assert "metaattn.compile.precompile" in graph["metaattn.compile.piecewise"]
    assert not _circles(graph)


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


def test_tasks_are_imported_on_first_use_without_matplotlib():
    """Only the families that render or decode images need matplotlib and Pillow, when they are called."""
    code = """
import sys, metaattn
assert "tasks" in dir(metaattn) and "metaattn.tasks" not in sys.modules
assert metaattn.tasks.glyphs and metaattn.tasks.omniglot
assert not {"matplotlib", "PIL"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="module 'metaattn' has no attribute 'task'"):
        metaattn.task  # noqa: B018


def test_files_are_read_in_one_sitting():
    long = {str(f.relative_to(ROOT)): n for f in FILES if (n := len(f.read_text().splitlines())) > 600}
    assert not long, f"longer than 600 lines: {long}"
