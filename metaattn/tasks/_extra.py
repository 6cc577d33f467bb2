"""Optional dependencies of the task families, imported only when they are needed."""

from __future__ import annotations

import importlib

_PACKAGES = {"PIL": "pillow"}  # where the name of the package is not that of its module


def required(function: str, *modules: str) -> None:
    """Import modules, or say how to install their packages.

    Args:
        function: Public function that needs them, for the message.
        modules: Names of the modules.

    Raises:
        ImportError: One of them is not installed.
    """
    for name in modules:
        try:
            importlib.import_module(name)
        except ImportError as error:
            packages = " and ".join(_PACKAGES.get(m, m) for m in modules)
            raise ImportError(
                f"metaattn.tasks.{function} needs {packages}, which the extra 'train' installs: "
                'pip install "metaattn[train]" or, in a clone of the repository, pip install -e ".[train]"'
            ) from error
