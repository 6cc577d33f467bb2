"""The choices of the command line, from ``conf/`` and the schema: for ``--help`` and for error messages."""

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
    """Return the options of each configuration group: the files of the folders in ``conf/``.

    Folders whose names begin with an underscore are chosen by other groups, not by the user.
    """
    folders = [path for path in sorted(Path(CONF).iterdir()) if path.is_dir() and path.name[0] != "_"]
    return {folder.name: sorted(path.stem for path in folder.glob("*.yaml")) for folder in folders}


def names(schema: Any = Config, prefix: str = "") -> Iterator[tuple[str, list[str]]]:
    """Yield each key of the schema whose value is one of several names, and the names."""
    for key, kind in get_type_hints(schema).items():
        if is_dataclass(kind):
            yield from names(kind, f"{prefix}{key}.")
        elif isinstance(kind, type) and issubclass(kind, Enum):
            yield f"{prefix}{key}", [choice.value for choice in kind]


def words() -> set[str]:
    """Return all keys of the schema, all groups and all of their options: the spellings to suggest for a typo."""

    def keys(node: Any) -> Iterator[str]:
        if isinstance(node, dict):
            for key, child in node.items():
                yield str(key)
                yield from keys(child)

    schema = OmegaConf.to_container(OmegaConf.structured(Config), throw_on_missing=False)
    options = groups()
    return {*keys(schema), *options, *(option for group in options.values() for option in group)}


def register() -> None:
    """Define the resolvers ``choices`` and ``names`` of the ``--help`` template.

    Hydra's own list of groups would also show the entries of the schema.
    """

    def lines(lists: Iterable[tuple[str, list[str]]]) -> str:
        return "\n".join(f"{key}: {', '.join(options)}" for key, options in lists)

    OmegaConf.register_new_resolver("choices", lambda: lines(groups().items()), replace=True)
    OmegaConf.register_new_resolver("names", lambda: lines(names()), replace=True)
