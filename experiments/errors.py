"""Errors that the user can correct; the commands print them in one line, without a traceback."""

from __future__ import annotations

import sys
from importlib.util import find_spec

# The modules of the extra "train" of pyproject.toml, and the packages that install them.
TRAIN_EXTRA = {
    "hydra": "hydra-core",
    "matplotlib": "matplotlib",
    "PIL": "pillow",
    "tensorboard": "tensorboard",
}


class UserError(Exception):
    """A mistake of the user: the message says what was expected, what was received and what to do.

    The command ends with the exit code ``code``.
    """

    code = 2


class RunStoppedError(UserError):
    """A run that cannot continue although its settings are valid."""

    code = 1


class CheckpointError(UserError):
    """A checkpoint whose content does not fit its run; the message begins with "its" and does not name the file."""


def require_train_extra() -> None:
    """Exit with code 2 and one line if a package of the extra ``train`` is not installed."""
    if missing := [package for module, package in TRAIN_EXTRA.items() if find_spec(module) is None]:
        print(
            f"error: expected {', '.join(TRAIN_EXTRA.values())} to be installed; missing: {', '.join(missing)}. "
            'In a clone of the repository: pip install -r requirements.txt -e ".[train]"',
            file=sys.stderr,
        )
        sys.exit(2)
