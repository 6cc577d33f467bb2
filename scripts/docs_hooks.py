"""Hooks of mkdocs: pages of other libraries, a page for each public object, docstrings as mkdocstrings reads them."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import griffe
from mkdocs.structure.files import File

ROLE = re.compile(r":(?:func|class|meth|mod|data|attr):(?=`)")
EXAMPLE = re.compile(r"^( *)Example:$", re.MULTILINE)

# The pages of the API: title of the section, package, objects in their order.
API: list[tuple[str, str, list[str]]] = [
    (
        "The operator",
        "metaattn",
        ["sdpa", "sdpa_jvp", "sdpa_vjp", "sdpa_hvp", "explain", "use_backend", "replace_sdpa"],
    ),
    ("Results of the operator", "metaattn.ops", ["Jvp", "Vjp", "Hvp", "Gradients", "Explanation"]),
    ("Modules", "metaattn.nn", ["Transformer", "TransformerConfig", "MultiheadAttention", "LayerNorm", "RMSNorm"]),
    (
        "Algorithms",
        "metaattn.meta",
        [
            *["maml", "first_order_maml", "anil", "boil", "meta_sgd", "maml_plus_plus", "reptile", "imaml"],
            *["proto_maml", "prototypical", "cavia"],
            *["Learner", "GradientBased", "MAMLPlusPlus", "Reptile", "Prototypical", "Cavia"],
        ],
    ),
    (
        "The inner loop",
        "metaattn.meta",
        ["adapt", "trajectory", "sgd", "momentum", "adam", "rate", "InnerOptimizer"],
    ),
    (
        "Derivatives of the inner loop",
        "metaattn.meta",
        ["Gradient", "Reverse", "Mixed", "FirstOrder", "Truncated", "Implicit"],
    ),
    ("Memory and speed", "metaattn.meta", ["checkpoint", "capture", "Captured"]),
    (
        "Tasks",
        "metaattn.tasks",
        ["glyphs", "omniglot", "Sinusoids", "Episodes", "Episode", "Batch", "stack", "split_classes"],
    ),
    ("PyTorch's norms", "metaattn.integrations.torch_norms", ["replace_norms"]),
    (
        "Hugging Face Transformers",
        "metaattn.integrations.transformers",
        ["register", "checkpoint_layers", "replace_layer_norms"],
    ),
    ("Hugging Face diffusers", "metaattn.integrations.diffusers", ["differentiable", "checkpoint"]),
]
# Tables of measurements: they take the whole width of the page.
RESULTS = {f"benchmarks/{name}.md" for name in ("attention", "cpu", "meta", "ranks")}


def objects() -> Iterator[str]:
    """Yield the path of each object that has a page, such as ``metaattn.meta.maml``."""
    for _, package, names in API:
        yield from (f"{package}.{name}" for name in names)


def api_pages() -> list[str]:
    """Return the pages that :func:`on_files` generates, relative to ``docs``."""
    return ["api/index.md", *(f"api/{path}.md" for path in objects())]


def on_config(config: Any) -> Any:
    """Fill the sections "Other libraries" and "API" of the navigation."""
    docs = Path(config["docs_dir"])
    sections = {title: entry for entry in config["nav"] for title in entry}
    libraries = sections["Other libraries"]["Other libraries"]
    pages = [f"integrations/{path.name}" for path in sorted((docs / "integrations").glob("*.md"))]
    pages += ["coming_from.md"] * (docs / "coming_from.md").exists()
    libraries += [page for page in pages if page not in libraries]
    sections["API"]["API"] = [
        "api/index.md",
        *({title: [{name: f"api/{package}.{name}.md"} for name in names]} for title, package, names in API),
    ]
    return config


def on_files(files: Any, *, config: Any) -> Any:
    """Add a page for each public object, and a table of all of them."""
    extensions = griffe.load_extensions(AsWritten)
    package = griffe.load(
        "metaattn", search_paths=[str(Path(config["config_file_path"]).parent)], extensions=extensions
    )
    index = ["# API", "", "One page for each public object."]
    for title, owner, names in API:
        index += ["", f"## {title}", "", f"In `{owner}`:", "", "| | |", "|---|---|"]
        for name in names:
            path = f"{owner}.{name}"
            docstring = package[path.removeprefix("metaattn.")].docstring
            summary = docstring.value.split("\n\n")[0].replace("\n", " ").replace("|", "\\|") if docstring else ""
            index.append(f"| [`{name}`]({path}.md) | {summary.replace('``', '`')} |")
            files.append(File.generated(config, f"api/{path}.md", content=f"::: {path}\n"))
    files.append(File.generated(config, "api/index.md", content="\n".join(index) + "\n"))
    return files


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Give tables of results the whole width, and a class for their style."""
    if page.file.src_uri not in RESULTS:
        return markdown
    page.meta["hide"] = ["toc"]
    return f'<div class="results" markdown>\n\n{markdown}\n\n</div>\n'


def on_page_content(html: str, **_: Any) -> str:
    """Let a click on a figure open it in its full size."""
    return re.sub(r'<img [^>]*src="([^"]+)"[^>]*>', r'<a href="\1">\g<0></a>', html)


class AsWritten(griffe.Extension):
    """Show docstrings as mkdocstrings expects them, and each public name as the object that it stands for."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Turn roles of Sphinx into plain code and ``Example:`` into ``Examples:``, before a docstring is parsed."""
        if obj.docstring is not None:
            obj.docstring.value = EXAMPLE.sub(r"\1Examples:", ROLE.sub("", obj.docstring.value))

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        """Let a name that a package exports mean the object, also where a module has the same name (``sdpa``)."""
        found = []
        for package in (pkg, *(m for m in pkg.modules.values() if m.is_subpackage)):
            for name in set(package.exports or ()) & set(package.imports):
                target = pkg[package.imports[name].removeprefix(f"{pkg.path}.")]
                with contextlib.suppress(griffe.AliasResolutionError):  # a name of PyTorch, which is not loaded
                    target = target[name] if target.is_module else target
                    found.append((package, name, target.final_target if target.is_alias else target))
        for package, name, target in found:  # after all are found: an object that replaces a module hides its members
            package.members[name] = griffe.Alias(name, target, parent=package)
