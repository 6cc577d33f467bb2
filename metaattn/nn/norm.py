"""Norms with exact derivatives of every order, which stay in the dtype of the input.

They are written in elementary operations, because derivatives of PyTorch's ``layer_norm`` are silently wrong (2.11 and
2.13; ``tests/boundaries`` checks this). With a weight, the derivative of the weight's gradient with respect to the
input is wrong under :func:`torch.func.vmap`, and with it the meta-gradient of every Transformer whose tasks are
vectorised. With or without a weight, ``grad`` of ``jvp``, ``jvp`` of ``jvp`` and all third derivatives are wrong.

Custom derivative rules were measured and not adopted. (A norm is the gradient of a scalar, so a symmetric family of
derivatives would be closed.) The recorded graphs became a sixth shorter, but eager steps took 10% to 40% longer.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def standardise(x: Tensor, dimensions: int, eps: float) -> Tensor:
    """Return ``(x - mean) / sqrt(variance + eps)`` over the last dimensions, with statistics in float32 or wider.

    Args:
        x: Any shape.
        dimensions: Number of last dimensions over which the statistics are taken.
        eps: Added to the variance.

    Returns:
        The shape and dtype of ``x``.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    over = tuple(range(-dimensions, 0))
    centred = wide - wide.mean(over, keepdim=True)
    scaled = centred * torch.rsqrt(centred.square().mean(over, keepdim=True) + eps)
    return scaled.to(x.dtype)


class LayerNorm(nn.LayerNorm):
    """Layer normalisation over the last dimensions, with the parameters and arguments of :class:`torch.nn.LayerNorm`.

    Use it in place of PyTorch's module wherever a derivative goes beyond a Hessian-vector product with respect to one
    input, because PyTorch's is silently wrong there. Weights load in both directions.

    Args:
        normalized_shape: Size of the last dimension, or sizes of the last dimensions, over which to normalise.
        eps: Added to the variance.
        elementwise_affine: Learn a weight and a bias of shape ``normalized_shape``.
        bias: Learn the bias; without effect if ``elementwise_affine`` is False.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Source:
        Ba, Kiros and Hinton 2016 (arXiv 1607.06450).

    Example:
        >>> import torch
        >>> from metaattn.nn import LayerNorm
        >>> norm = LayerNorm(4)
        >>> norm.load_state_dict(torch.nn.LayerNorm(4).state_dict())
        <All keys matched successfully>
        >>> norm(torch.tensor([1.0, 1.0, 3.0, 3.0])).detach()
        tensor([-1.0000, -1.0000,  1.0000,  1.0000])
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return ``(x - mean) / sqrt(variance + eps) * weight + bias``, with statistics in float32 or wider.

        Args:
            x: ``[..., *normalized_shape]``.

        Returns:
            The shape of ``x``, in its dtype (promoted with that of the parameters).
        """
        out = standardise(x, len(self.normalized_shape), self.eps)
        out = out if self.weight is None else out * self.weight
        return out if self.bias is None else out + self.bias


class RMSNorm(nn.RMSNorm):
    """Root-mean-square normalisation over the last dimensions, with the arguments of :class:`torch.nn.RMSNorm`.

    Args:
        normalized_shape: Size of the last dimension, or sizes of the last dimensions, over which to normalise.
        eps: Added to the mean square; ``None`` for the machine epsilon of the dtype in which it is taken.
        elementwise_affine: Learn a weight of shape ``normalized_shape``.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Source:
        Zhang and Sennrich 2019 (arXiv 1910.07467).

    Example:
        >>> import torch
        >>> from metaattn.nn import RMSNorm
        >>> RMSNorm(2)(torch.tensor([1.0, 7.0])).detach()
        tensor([0.2000, 1.4000])
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x / sqrt(mean(x^2) + eps) * weight``, with statistics in float32 or wider.

        Args:
            x: ``[..., *normalized_shape]``.

        Returns:
            The shape of ``x``, in its dtype (promoted with that of the weight).
        """
        over = tuple(range(-len(self.normalized_shape), 0))
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        eps = torch.finfo(wide.dtype).eps if self.eps is None else self.eps
        scaled = wide * torch.rsqrt(wide.square().mean(over, keepdim=True) + eps)
        out = scaled.to(x.dtype)
        return out if self.weight is None else out * self.weight
