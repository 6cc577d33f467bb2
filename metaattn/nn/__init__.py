"""Modules on the operator: what they hold runs under every ``torch.func`` transform."""

from .attention import MultiheadAttention
from .norm import LayerNorm, RMSNorm
from .transformer import Transformer, TransformerConfig

__all__ = ["LayerNorm", "MultiheadAttention", "RMSNorm", "Transformer", "TransformerConfig"]
