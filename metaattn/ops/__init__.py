"""The attention operator and its explicit derivatives."""

from ..autodiff import checkpoint
from ..backends import check_name as check_backend
from ._checks import check_window
from .explain import Explanation, explain
from .sdpa import Gradients, Hvp, Jvp, Vjp, sdpa, sdpa_hvp, sdpa_jvp, sdpa_vjp

__all__ = [
    "Explanation",
    "Gradients",
    "Hvp",
    "Jvp",
    "Vjp",
    "check_backend",
    "check_window",
    "checkpoint",
    "explain",
    "sdpa",
    "sdpa_hvp",
    "sdpa_jvp",
    "sdpa_vjp",
]
