"""Norms whose every derivative is right under vmap, and stays in the dtype.

PyTorch's own ``layer_norm`` with a weight is not used. Under :func:`torch.func.vmap` the derivative of its
weight's gradient with respect to its input is wrong, silently (2.13; held by ``tests/boundaries``): that is
the meta-gradient of every Transformer whose tasks are vectorised. Without a weight it is right, and the
weight is an ordinary product.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class LayerNorm(nn.LayerNorm):
    """Layer normalisation over the last dimension; parameters and arguments of :class:`torch.nn.LayerNorm`.

    Source:
        Ba, Kiros and Hinton 2016 (arXiv 1607.06450).
    """

    def forward(self, x: Tensor) -> Tensor:
        """``(x - mean) / sqrt(variance + eps) * weight + bias``, statistics in float32 or wider."""
        return (
            torch.nn.functional.layer_norm(x, self.normalized_shape, eps=self.eps).to(x.dtype) * self.weight + self.bias
        )


class RMSNorm(nn.RMSNorm):
    """Root-mean-square normalisation over the last dimension; as :class:`torch.nn.RMSNorm`.

    Source:
        Zhang and Sennrich 2019 (arXiv 1910.07467).
    """

    def forward(self, x: Tensor) -> Tensor:
        """``x / sqrt(mean(x^2) + eps) * weight``, statistics in float32 or wider."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        eps = torch.finfo(x.dtype).eps if self.eps is None else self.eps
        scaled = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        return scaled.to(x.dtype) * self.weight
