"""The documentation: its examples run as printed, its links lead somewhere, and every page can be reached."""

import importlib
import re
from pathlib import Path

import pytest
import yaml

from metaattn.cli import main
from tests.helpers import python_blocks

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
# Pages that need other libraries are run by the tests of those.
OF_OTHERS = [*DOCS.glob("integrations/*.md"), DOCS / "coming_from.md"]
PAGES = sorted(set(DOCS.rglob("*.md")) - set(OF_OTHERS))


def _name(path):
    return str(path.relative_to(DOCS))


@pytest.mark.parametrize("page", [p for p in PAGES if python_blocks(p)], ids=_name)
def test_python_examples(page):
    """One after the other, in one session, as a reader would type them."""
    session = {}
    for block in python_blocks(page):
        exec(block, session)


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_links(page):
    for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        assert link.startswith("https://") or (page.parent / link).exists(), link


def _pages(entries):
    for entry in entries:
        for value in entry.values() if isinstance(entry, dict) else [entry]:
            yield from [value] if isinstance(value, str) else _pages(value)


def test_navigation():
    """Every page, once; scripts/docs_hooks.py adds those on other libraries."""
    listed = list(_pages(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]))
    assert sorted(listed) == sorted([*map(_name, PAGES), "integrations/index.md"])


def test_api_pages_are_of_packages():
    named = [
        name for page in DOCS.glob("api/*.md") for name in re.findall(r"^::: (\S+)$", page.read_text(), re.MULTILINE)
    ]
    assert sorted(named) == ["metaattn", "metaattn.meta", "metaattn.nn", "metaattn.tasks"]
    assert all(importlib.import_module(name).__all__ for name in named)


@pytest.mark.parametrize("command", ["doctor", "bench"])
def test_options_of_the_command_line(command, capsys):
    """The page names the options that there are."""
    text = (DOCS / "guides" / "command_line.md").read_text()
    (usage,) = re.findall(rf"^python -m metaattn {command} (.*)$", text, re.MULTILINE)
    with pytest.raises(SystemExit):
        main([command, "--help"])
    there = set(re.findall(r"--[a-z]+", capsys.readouterr().out)) - {"--help"}
    assert set(re.findall(r"--[a-z]+", usage)) == there
