"""The documentation: its examples run as printed, its links lead somewhere, and every page can be reached."""

import importlib
import importlib.util
import re
from pathlib import Path

import pytest
import yaml

from metaattn.cli import main
from tests.helpers import python_blocks

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
# Pages that need other libraries: tests/integrations runs their examples.
OTHER_LIBRARIES = [*DOCS.glob("integrations/*.md"), DOCS / "coming_from.md"]
PAGES = sorted(set(DOCS.rglob("*.md")) - set(OTHER_LIBRARIES))


def _hooks():
    pytest.importorskip("mkdocs")
    pytest.importorskip("griffe")
    spec = importlib.util.spec_from_file_location("docs_hooks", ROOT / "scripts" / "docs_hooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _name(path):
    return str(path.relative_to(DOCS))


@pytest.mark.parametrize("page", [p for p in PAGES if python_blocks(p)], ids=_name)
def test_python_examples(page):
    """Run the blocks one after the other in one session, as a reader would type them."""
    session = {}
    for block in python_blocks(page):
        exec(block, session)


@pytest.mark.parametrize("page", [*PAGES, *OTHER_LIBRARIES], ids=_name)
def test_links(page):
    """Links lead to files, and those to the API to public objects, for which scripts/docs_hooks.py generates pages."""
    for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        if link.startswith("https://"):
            continue
        path = (page.parent / link).resolve()
        if path.parent == DOCS / "api":
            assert path.stem == "index" or _public(path.stem), link
        else:
            assert path.exists(), link


def _public(path):
    package, _, name = path.rpartition(".")
    module = importlib.import_module(package)
    return name in getattr(module, "__all__", [n for n in vars(module) if not n.startswith("_")])


def _pages(entries):
    for entry in entries:
        for value in entry.values() if isinstance(entry, dict) else [entry]:
            yield from [value] if isinstance(value, str) else _pages(value)


def test_navigation():
    """Every page is listed once; scripts/docs_hooks.py adds those on other libraries and the API."""
    listed = list(_pages(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]))
    assert sorted(listed) == sorted([*map(_name, PAGES), "integrations/index.md"])


def test_every_public_object_has_a_page():
    """The pages of the API are the exports of the packages; what two packages export has one page."""
    hooks = _hooks()
    pages = list(hooks.objects())
    assert len(set(pages)) == len(pages)
    assert all(map(_public, pages))
    packages = ["metaattn", "metaattn.nn", "metaattn.meta", "metaattn.tasks"]
    objects = {}
    for package in packages:
        module = importlib.import_module(package)
        objects |= {f"{package}.{n}": getattr(module, n) for n in module.__all__ if f"metaattn.{n}" not in packages}
    shown = {id(getattr(importlib.import_module(p.rpartition(".")[0]), p.rpartition(".")[2])) for p in pages}
    assert not [path for path, thing in objects.items() if id(thing) not in shown]
    assert pages[0] == "metaattn.sdpa"


def test_site_needs_no_network():
    """Scripts, styles and fonts are files of the site; formulas have what they need."""
    config = (ROOT / "mkdocs.yml").read_text()
    settings = yaml.safe_load(config)
    assert settings["theme"]["font"] is False
    for path in [*settings["extra_css"], *settings["extra_javascript"]]:
        assert (DOCS / path).exists(), path
    style = (DOCS / "javascripts" / "katex" / "katex.min.css").read_text()
    fonts = set(re.findall(r"url\(([^)]*)\)", style))
    assert fonts
    assert all((DOCS / "javascripts" / "katex" / font).exists() for font in fonts)


@pytest.mark.parametrize("command", ["doctor", "bench"])
def test_options_of_the_command_line(command, capsys):
    """The page names the options that the command has."""
    text = (DOCS / "guides" / "command_line.md").read_text()
    (usage,) = re.findall(rf"^python -m metaattn {command} (.*)$", text, re.MULTILINE)
    with pytest.raises(SystemExit):
        main([command, "--help"])
    present = set(re.findall(r"--[a-z]+", capsys.readouterr().out)) - {"--help"}
    assert set(re.findall(r"--[a-z]+", usage)) == present


def test_train_maml_lines_name_what_exists():
    """Every group and option in the command lines of the page is one of ``conf/``."""
    lines = re.findall(
        r"^python train_maml.py (.*?)(?: +#.*)?$", (DOCS / "guides" / "training.md").read_text(), re.MULTILINE
    )
    assert len(lines) >= 10
    for line in lines:
        for group, options in re.findall(r"\b(task|algorithm|experiment|model)=([\w,]+)", line):
            for option in options.split(","):
                assert (ROOT / "conf" / group / f"{option}.yaml").exists(), line
