"""Settings of the studies: ``key=value`` on the command line, checked against a dataclass."""

from __future__ import annotations

import sys
from dataclasses import asdict
from enum import Enum
from typing import Any, NoReturn, TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

T = TypeVar("T")


def parse(settings: type[T], module: str) -> T:
    """Read settings from the command line.

    Args:
        settings: A dataclass with a default for each key. The docstring of its module is the text of ``--help``.
        module: The name that ``python -m`` runs.

    Raises:
        SystemExit: With code 0 after ``--help``, with code 2 and one line for a mistake.
    """
    defaults = OmegaConf.structured(settings)
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(f"{sys.modules[settings.__module__].__doc__}\nUsage: python -m {module} [key=value ...]\n")
        print(OmegaConf.to_yaml(defaults))
        sys.exit(0)
    try:
        if wrong := [a for a in sys.argv[1:] if "=" not in a]:
            fail(f"expected key=value, got {wrong[0]!r}")
        merged: Any = OmegaConf.merge(defaults, OmegaConf.from_cli())
        return OmegaConf.to_object(merged)  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        fail(f"{str(error).splitlines()[0]}; the keys are {', '.join(map(str, defaults))}")


def plain(settings: Any) -> dict[str, Any]:
    """Return the settings as values for JSON."""
    return {k: v.value if isinstance(v, Enum) else v for k, v in asdict(settings).items()}


def fail(message: str) -> NoReturn:
    """Print one line and exit with code 2."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)
