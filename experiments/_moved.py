"""Former paths of what moved to ``experiments.training`` and ``experiments.studies``.

They work for one release, with a warning. To remove them, delete this file and its two uses: ``install`` in
``__init__.py``, and ``attributes_of`` in the modules of the commands.
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
    """Importer of modules at their former paths."""

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: object = None) -> ModuleSpec | None:
        return spec_from_loader(name, self) if name in MOVED else None

    def create_module(self, spec: ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        _warn(module.__name__, MOVED[module.__name__])
        sys.modules[module.__name__] = importlib.import_module(MOVED[module.__name__])


def install() -> None:
    """Make the modules importable at their former paths."""
    sys.meta_path.append(_MovedModules())


def attributes_of(new: str, old: str) -> Callable[[str], Any]:
    """Return a ``__getattr__`` for the module ``old``, which finds the names of the module ``new``."""

    def get(name: str) -> Any:
        if name.startswith("__"):  # such as __path__, for which the import system asks
            raise AttributeError(f"module {old!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(new), name)
        _warn(f"{old}.{name}", f"{new}.{name}")
        return value

    return get


def _warn(old: str, new: str) -> None:
    message = f"{old} is now {new}; the old path will be removed in the next release"
    warnings.warn(message, DeprecationWarning, stacklevel=3)
