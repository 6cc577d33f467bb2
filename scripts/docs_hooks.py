"""What mkdocs does not do by itself: pages that come and go, and docstrings as they are written here."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import griffe

ROLE = re.compile(r":(?:func|class|meth|mod|data|attr):(?=`)")
EXAMPLE = re.compile(r"^( *)Example:$", re.MULTILINE)


def on_config(config: Any) -> Any:
    """Add the pages on other libraries, as many as there are, to the navigation."""
    docs = Path(config["docs_dir"])
    (section,) = (entry["Other libraries"] for entry in config["nav"] if "Other libraries" in entry)
    pages = [f"integrations/{path.name}" for path in sorted((docs / "integrations").glob("*.md"))]
    pages += ["coming_from.md"] * (docs / "coming_from.md").exists()
    section += [page for page in pages if page not in section]
    return config


def on_page_content(html: str, *, page: Any, **_: Any) -> None:
    """Warn, which strict mode takes for an error, of what a package exports and its page lacks."""
    for path in re.findall(r"^::: (\S+)$", page.markdown, re.MULTILINE):
        package = griffe.load(path, search_paths=["."])
        for name in sorted(set(package.exports or ()) & set(package.imports)):
            is_package = package.imports[name] == f"{path}.{name}"
            if not is_package and f'id="{path}.{name}"' not in html:
                logging.getLogger("mkdocs.hooks").warning("%s is public, and not on %s", name, page.file.src_uri)


class AsWritten(griffe.Extension):
    """An example is code; what Sphinx knows as a role is code; a function with its module's name is the function."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Change a docstring before it is parsed."""
        if obj.docstring is not None:
            obj.docstring.value = EXAMPLE.sub(r"\1Examples:", ROLE.sub("", obj.docstring.value))

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        """What each package exports is what its names stand for when it is imported."""
        found = []
        for package in (pkg, *(m for m in pkg.modules.values() if m.is_subpackage)):
            for name in set(package.exports or ()) & set(package.imports):
                target = pkg[package.imports[name].removeprefix(f"{pkg.path}.")]
                target = target[name] if target.is_module else target
                found.append((package, name, target.final_target if target.is_alias else target))
        for package, name, target in found:  # all are found: what takes a module's place hides what is in it
            package.members[name] = griffe.Alias(name, target, parent=package)
