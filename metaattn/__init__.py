"""Attention that can be differentiated to any order, and meta-learning on it."""

from . import meta
from .backends import use_backend
from .integrations import replace_sdpa
from .nn import MultiheadAttention, Transformer, TransformerConfig
from .ops import explain, sdpa, sdpa_hvp, sdpa_jvp, sdpa_vjp

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
    "use_backend",
]
