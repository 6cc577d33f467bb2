"""Settings of the small experiments: ``key=value`` on the command line, checked against a dataclass."""

from __future__ import annotations

import sys
from dataclasses import asdict
from enum import Enum
from typing import Any, NoReturn, TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

T = TypeVar("T")


def parse(settings: type[T], module: str) -> T:
    """The settings from the command line; ``--help`` and mistakes end the program."""
    defaults = OmegaConf.structured(settings)
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(f"{sys.modules[settings.__module__].__doc__}\nUsage: python -m {module} [key=value ...]\n")
        print(OmegaConf.to_yaml(defaults))
        sys.exit(0)
    try:
        if bad := [a for a in sys.argv[1:] if "=" not in a]:
            fail(f"expected key=value, got {bad[0]!r}")
        merged: Any = OmegaConf.merge(defaults, OmegaConf.from_cli())
        return OmegaConf.to_object(merged)  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        fail(f"{str(error).splitlines()[0]}; the keys are {', '.join(map(str, defaults))}")


def plain(settings: Any) -> dict[str, Any]:
    """The settings as JSON has them."""
    return {k: v.value if isinstance(v, Enum) else v for k, v in asdict(settings).items()}


def fail(message: str) -> NoReturn:
    """End with exit code 2 and one line."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)
