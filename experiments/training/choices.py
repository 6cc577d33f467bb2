"""What there is to choose from on the command line, for its help and its mistakes: from ``conf/`` and the schema."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any, get_type_hints

from omegaconf import OmegaConf

from .config import Config

CONF = str(Path(__file__).parents[2] / "conf")


def groups() -> dict[str, list[str]]:
    """The options of each group."""
    return {d.name: sorted(p.stem for p in d.glob("*.yaml")) for d in sorted(Path(CONF).iterdir()) if d.is_dir()}


def names(schema: Any = Config, prefix: str = "") -> Iterator[tuple[str, list[str]]]:
    """Each key of the schema that takes one of several names, and the names."""
    for key, kind in get_type_hints(schema).items():
        if is_dataclass(kind):
            yield from names(kind, f"{prefix}{key}.")
        elif isinstance(kind, type) and issubclass(kind, Enum):
            yield f"{prefix}{key}", [choice.value for choice in kind]


def register() -> None:
    """Make both known to the template of ``--help``; Hydra's own list of groups has the schema in it."""

    def lines(lists: Iterable[tuple[str, list[str]]]) -> str:
        return "\n".join(f"{key}: {', '.join(options)}" for key, options in lists)

    OmegaConf.register_new_resolver("choices", lambda: lines(groups().items()), replace=True)
    OmegaConf.register_new_resolver("names", lambda: lines(names()), replace=True)
