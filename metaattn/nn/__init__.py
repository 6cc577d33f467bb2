"""Modules on the operator: what they hold runs under every ``torch.func`` transform."""

from .attention import MultiheadAttention
from .transformer import Transformer, TransformerConfig

__all__ = ["MultiheadAttention", "Transformer", "TransformerConfig"]
