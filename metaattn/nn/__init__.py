"""Modules whose every derivative is exact: attention, norms and a Transformer, under all :mod:`torch.func` transforms.

Entry points: :class:`Transformer`; :class:`MultiheadAttention`, :class:`LayerNorm` and :class:`RMSNorm`, which take the
place of PyTorch's modules with the same arguments and ``state_dict``. They are ordinary modules
(:class:`torch.nn.Module`) on :func:`metaattn.sdpa`, without in-place changes, so that
:func:`torch.func.functional_call` runs them as functions of their parameters.

May import :mod:`metaattn.ops` and :mod:`metaattn.autodiff`, never :mod:`metaattn.meta`.
"""

from .attention import MultiheadAttention
from .norm import LayerNorm, RMSNorm
from .transformer import Transformer, TransformerConfig

__all__ = ["LayerNorm", "MultiheadAttention", "RMSNorm", "Transformer", "TransformerConfig"]
