"""Attention that can be differentiated to any order, and meta-learning with it."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from . import meta
from .backends import use_backend
from .integrations import replace_sdpa
from .nn import MultiheadAttention, Transformer, TransformerConfig
from .ops import explain, sdpa, sdpa_hvp, sdpa_jvp, sdpa_vjp

if TYPE_CHECKING:
    from . import tasks

__version__ = "0.1.0"
__all__ = [
    "MultiheadAttention",
    "Transformer",
    "TransformerConfig",
    "explain",
    "meta",
    "replace_sdpa",
    "sdpa",
    "sdpa_hvp",
    "sdpa_jvp",
    "sdpa_vjp",
    "tasks",
    "use_backend",
]


def __getattr__(name: str) -> Any:
    if name == "tasks":  # imported on first use: models and derivatives need no tasks
        return importlib.import_module(".tasks", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
