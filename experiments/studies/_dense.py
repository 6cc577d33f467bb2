"""Dense attention in plain PyTorch operations.

This formula is a second implementation on purpose: the studies compare metaattn, its ``reference`` backend included,
with PyTorch's automatic differentiation of it, so that none of metaattn's derivative rules takes part.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def dense_attention(query: Tensor, key: Tensor, value: Tensor, **_: Any) -> Tensor:
    """Compute softmax(Q Kᵀ / √D) V.

    Args:
        query: ``[..., N, D]``.
        key: ``[..., M, D]``.
        value: ``[..., M, E]``.

    Returns:
        The output, ``[..., N, E]``.
    """
    return torch.softmax(query @ key.mT * query.shape[-1] ** -0.5, -1) @ value
