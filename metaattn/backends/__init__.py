"""Implementations of the attention primitives on plain tensors, and the choice between them.

Purpose: compute attention and its first and second derivatives. Nothing here uses autograd.

Entry point: :func:`select` returns the :class:`~metaattn.backends.base.Backend` of a name; its six methods are the
primitives. :class:`use_backend` sets the name for a block of code.

Mechanism: ``reference`` follows the formulas, ``blockwise`` works on tiles in plain PyTorch, ``triton`` has fused
kernels, ``vendor`` calls PyTorch's own, and ``auto`` chooses among them for each primitive. Third and higher
derivatives are in :mod:`metaattn.backends.blockwise` for all of them. :mod:`metaattn.backends.base` tells how to write
a backend.

Every package may import this one; it imports no other package of the project.
"""

from . import blockwise
from .auto import choose
from .base import PRIMITIVES
from .registry import NAMES, check_name, current_backend, select, unsupported_reason, use_backend

__all__ = [
    "NAMES",
    "PRIMITIVES",
    "blockwise",
    "check_name",
    "choose",
    "current_backend",
    "select",
    "unsupported_reason",
    "use_backend",
]
