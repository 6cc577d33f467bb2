"""Former paths of the modules that moved to ``experiments.training`` and ``experiments.studies``.

They work for one release, with a warning; then delete this file and its import.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_loader
from types import ModuleType
from typing import Any

MOVED = {
    "experiments.checkpoint": "experiments.training.checkpoint",
    "experiments.choices": "experiments.training.choices",
    "experiments.config": "experiments.training.config",
    "experiments.distributed": "experiments.training.distributed",
    "experiments.evaluate": "experiments.training.evaluate",
    "experiments.learner": "experiments.training.learner",
    "experiments.main": "experiments.training.main",
    "experiments.report": "experiments.training.report",
    "experiments.setup": "experiments.training.setup",
    "experiments.text": "experiments.studies.text",
    "experiments.train": "experiments.training.loop",
}


class _MovedModules(MetaPathFinder, Loader):
    """Import a module from its new path where the old one is requested."""

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: object = None) -> ModuleSpec | None:
        return spec_from_loader(name, self) if name in MOVED else None

    def create_module(self, spec: ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        old = module.__name__
        _warn(old, MOVED[old], 3)
        sys.modules[old] = importlib.import_module(MOVED[old])


def install() -> None:
    """Make the former paths importable."""
    sys.meta_path.append(_MovedModules())


def attributes(old: str, new: str) -> Callable[[str], Any]:
    """Return a module's ``__getattr__`` that finds the names of the module ``new`` at ``old``."""

    def get(name: str) -> Any:
        if name.startswith("__"):  # such as __path__, which the import system asks for
            raise AttributeError(f"module {old!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(new), name)
        _warn(f"{old}.{name}", f"{new}.{name}", 3)
        return value

    return get


def _warn(old: str, new: str, stacklevel: int) -> None:
    message = f"{old} is now {new}; the old path will be removed in the next release"
    warnings.warn(message, DeprecationWarning, stacklevel=stacklevel)
