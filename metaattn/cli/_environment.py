"""Facts about this machine and the packages that are installed on it."""

from __future__ import annotations

import os
import platform
import re
import tomllib
from importlib import metadata
from pathlib import Path

import torch
from torch.utils import collect_env

import metaattn
from metaattn.tasks.cache import directory

PACKAGE = Path(__file__).parent.parent


def facts() -> dict[str, str]:
    """Return the versions, the GPUs, the cache folder and the extras, by name, in one line each."""
    threads = torch.get_num_threads()
    lines = {
        "metaattn": f"{metaattn.__version__}, {PACKAGE}",
        "Python": f"{platform.python_version()}, {platform.platform()}",
        "PyTorch": f"{torch.__version__}, {threads} thread{'s' * (threads != 1)}",
        "Triton": f"{version('triton') or 'not installed'}; TRITON_INTERPRET={os.environ.get('TRITON_INTERPRET', '')}",
        "CUDA": _cuda(),
    }
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        lines[f"GPU {i}"] = f"{p.name}, compute capability {p.major}.{p.minor}, {p.total_memory / 2**30:.1f} GiB"
    lines["cache"] = _cache()
    return lines | {f"extra {name}": ", ".join(_installed(names)) for name, names in extras().items()}


def version(package: str) -> str | None:
    """Return the installed version of a package, or ``None``."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def extras() -> dict[str, list[str]]:
    """Return the packages of each extra, from ``pyproject.toml`` in a source tree, else from the installed metadata."""
    tree = PACKAGE.parent / "pyproject.toml"
    if tree.exists():
        declared = tomllib.loads(tree.read_text())["project"]["optional-dependencies"]
        return {name: [_name(r) for r in requirements] for name, requirements in declared.items()}
    found: dict[str, list[str]] = {}
    for requirement in metadata.requires("metaattn") or ():
        if extra := re.search(r"extra == ['\"]([\w-]+)['\"]", requirement):
            found.setdefault(extra[1], []).append(_name(requirement))
    return found


def _name(requirement: str) -> str:
    """Return the name of the package that a requirement asks for; ``metaattn[extra]`` keeps its extra."""
    found = re.match(r"[\w.-]+(\[[\w,-]+\])?", requirement)
    assert found is not None, requirement
    return found[0] if found[0].startswith("metaattn") else found[0].split("[")[0]


def _installed(packages: list[str]) -> list[str]:
    return [p if p.startswith("metaattn[") else f"{p} {version(p) or '- not installed'}" for p in packages]


def _cache() -> str:
    return f"{directory()} ({'exists' if directory().is_dir() else 'will be created when needed'})"


def _cuda() -> str:
    if torch.version.cuda is None:
        return "this PyTorch was built without CUDA"
    driver = collect_env.get_nvidia_driver_version(collect_env.run)
    return f"{torch.version.cuda}, driver {driver or 'not found'}"
