"""Backends: implementations of the four primitives on plain tensors, and the choice between them."""

from . import blockwise
from .auto import PRIMITIVES, choose
from .registry import NAMES, check_name, current_backend, refuses, select, use_backend

__all__ = [
    "NAMES",
    "PRIMITIVES",
    "blockwise",
    "check_name",
    "choose",
    "current_backend",
    "refuses",
    "select",
    "use_backend",
]
