"""Scaled dot-product attention that can be differentiated to any order, in any mode.

Entry points: :func:`sdpa`, the operator; :func:`sdpa_jvp`, :func:`sdpa_vjp` and :func:`sdpa_hvp`, its derivatives in
one call each; :func:`explain`, which says what backend a call would use. :func:`checkpoint` is that of
:mod:`metaattn.autodiff`, for packages that import only this one.

Mechanism: a call is checked and brought to one form (``_checks``). The derivative rules, which are closed to any order,
are custom functions (``_rules``); they call each other and, for numbers, operators of :mod:`torch.library`
(:mod:`~metaattn.ops.operators`), each of which runs one primitive of a backend.

It imports :mod:`metaattn.autodiff` and :mod:`metaattn.backends`; ``compile``, ``nn``, ``meta``, ``integrations`` and
``cli`` may import it.
"""

from ..autodiff import checkpoint
from ..backends import check_name as check_backend
from ._checks import check_window
from ._tensor_kinds import is_causal_bias
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
    "is_causal_bias",
    "sdpa",
    "sdpa_hvp",
    "sdpa_jvp",
    "sdpa_vjp",
]
