"""docs/architecture.md and its drawing are true: packages, modules, directions, and the way of a call."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest
import torch
from torch.func import functional_call

import metaattn
from tests.test_imports import MAY_IMPORT

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "architecture.md").read_text()
PACKAGES = [name for name in MAY_IMPORT if name not in ("metaattn.__main__", "train_maml")]


def _drawing():
    spec = importlib.util.spec_from_file_location("draw_architecture", ROOT / "scripts" / "draw_architecture.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


DRAWING = _drawing()


def _folder(package):
    return ROOT / Path(*package.split("."))


def _tree():
    """The paths that the tree of the page names, in order; a folder ends in ``/``."""
    (block,) = re.findall(r"^```text\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
    parents, paths = [], []
    for line in block.splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        names = re.match(r"\s*(\S+(?:  ?\w+\.py)*)", line)[1].split()
        for name in names:
            paths.append("".join(parents[:depth]) + name)
        if names[0].endswith("/"):
            parents[depth:] = [names[0]]
    return paths


def test_layers_are_the_packages_in_the_order_of_imports():
    assert [name for name, _, _ in DRAWING.LAYERS] == PACKAGES


def test_tree_has_the_packages_in_the_order_of_imports():
    packages = [p.rstrip("/").replace("/", ".") for p in _tree() if re.fullmatch(r"metaattn/\w+/|experiments/", p)]
    assert packages == PACKAGES


@pytest.mark.parametrize("path", _tree())
def test_tree_names_what_exists(path):
    assert (ROOT / path).exists()


@pytest.mark.parametrize("package", [f"metaattn.{p}" for p in ("backends", "autodiff", "ops", "compile", "meta")])
def test_tree_names_every_module(package):
    """Every module has a line, except the files of ``meta/algorithms``."""
    named, skipped = set(_tree()), ("metaattn/meta/algorithms/", "metaattn/meta/_checks.py")
    files = [str(f.relative_to(ROOT)) for f in _folder(package).rglob("*.py") if f.name != "__init__.py"]
    assert not [f for f in files if f not in named and not f.startswith(skipped)]


@pytest.mark.parametrize(("title", "stops"), [(title, stops) for title, _, stops in DRAWING.WAYS])
def test_ways_go_down_and_pass_each_package_once(title, stops):
    order = [PACKAGES.index(package) for package, _ in stops]
    assert order == sorted(set(order), reverse=True)


@pytest.mark.parametrize(("package", "modules"), [stop for _, _, stops in DRAWING.WAYS for stop in stops])
def test_ways_name_modules_that_exist(package, modules):
    folder = _folder("experiments.training" if package == "experiments" else package)
    assert all((folder / name).is_dir() or (folder / f"{name}.py").exists() for name in modules.split(", "))


def _calls(function):
    """Pairs of packages, caller and called, while ``function`` runs."""
    pairs = set()

    def package(frame):
        name = frame.f_globals.get("__name__", "") if frame else ""
        return next((p for p in PACKAGES if (name + ".").startswith(p + ".")), None)

    def trace(frame, event, _):
        if event == "call" and (called := package(frame)):
            caller = frame.f_back
            while caller is not None and package(caller) is None:  # through PyTorch
                caller = caller.f_back
            pairs.add((package(caller) if caller else None, called))

    sys.setprofile(trace)
    try:
        function()
    finally:
        sys.setprofile(None)
    return pairs


def test_a_call_of_sdpa_goes_the_way_that_is_drawn():
    """It enters at ``ops`` and runs in the packages drawn, no others."""
    query = torch.randn(1, 2, 8, 4)
    pairs = _calls(lambda: metaattn.sdpa(query, query, query))
    stops = [package for package, _ in DRAWING.WAYS[0][2]]
    assert {called for _, called in pairs} == set(stops)
    assert {called for caller, called in pairs if caller is None} == {stops[0]}


def test_a_meta_step_goes_the_way_that_is_drawn():
    """As in a training run, from ``meta`` down. Only the rules, which ``ops`` gives ``autodiff``, are called upward."""
    model = metaattn.Transformer(
        input="continuous", in_features=2, dim=4, depth=1, heads=1, output="pooled", out_features=1
    )
    learner = metaattn.meta.maml(lambda p, x, y: (functional_call(model, p, (x,)) - y).square().mean(), steps=1)
    meta = learner.init(dict(model.named_parameters()))
    tasks = torch.randn(2, 3, 4, 2), torch.randn(2, 3, 1)
    pairs = _calls(lambda: learner.value_and_grad(meta, tasks, tasks))
    stops = [package for package, _ in DRAWING.WAYS[2][2]]
    asked = {"metaattn.compile"}  # for the active compiler, which is none
    assert {called for _, called in pairs} - asked == set(stops) - {"experiments", "metaattn.tasks"}
    assert {called for caller, called in pairs if caller is None} == {"metaattn.meta"}
    order = {package: i for i, package in enumerate(PACKAGES)}
    upward = {(a, b) for a, b in pairs if a is not None and order[a] < order[b]}
    assert upward == {("metaattn.autodiff", "metaattn.ops")}
