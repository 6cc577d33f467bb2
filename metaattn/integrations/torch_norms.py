"""Replacement of PyTorch's norms by their formulas in a block of code, so that every derivative is correct.

PyTorch has silently wrong derivatives of :func:`torch.nn.functional.layer_norm`, ``instance_norm`` and ``batch_norm``
(with statistics of the batch) in 2.11 and 2.13; ``tests/boundaries`` checks this. They are wrong in ``grad`` of
``jvp``, in ``jvp`` of ``jvp``, at third and higher order, and in meta-gradients under :func:`torch.func.vmap`. The
models of other libraries call these norms.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..autodiff import Replacement, callables_of
from ..nn.norm import standardise
from ..ops.operators import autocasts


def replace_norms() -> Replacement:
    """Return a context manager in which PyTorch's norms have correct derivatives, in its thread.

    ``layer_norm``, ``instance_norm`` and ``batch_norm``, by whatever name a model calls them, are computed in
    elementary operations, with statistics in float32 or wider. ``group_norm``, ``rms_norm``, and ``batch_norm`` in
    evaluation have correct derivatives in PyTorch and are not replaced.

    A backward pass may come after the block. A function of :func:`metaattn.meta.checkpoint` that was called in the
    block uses the replacements when it is computed again, too.

    Returns:
        The context manager.

    Raises:
        NotImplementedError: Inside the block: a norm that uses statistics of the batch and updates running ones;
            PyTorch's ``native_layer_norm`` and ``native_batch_norm``, which return statistics; a higher-order operator
            (a checkpoint, ``torch.cond``) within one graph of :func:`torch.compile`.

    Source:
        Ba, Kiros and Hinton 2016 (arXiv 1607.06450), eq. 4. The faults: PyTorch's issues 196699, 196700 and 198017.

    Example:
        >>> import torch
        >>> from torch.func import grad, jvp
        >>> from metaattn.integrations.torch_norms import replace_norms
        >>> norm = torch.nn.LayerNorm(4).double()
        >>> x, t = torch.randn(2, 3, 4, dtype=torch.float64)
        >>> along = lambda x: jvp(lambda x: norm(x).sin().sum(), (x,), (t,))[1]
        >>> with replace_norms():
        ...     right = grad(along)(x)
        >>> bool((grad(along)(x) - right).norm() > 0.01 * right.norm())  # PyTorch's own is wrong
        True
    """
    return Replacement(_REPLACEMENTS, "replace_norms")


def _layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Tensor:
    shape = tuple(normalized_shape)
    if not shape or tuple(input.shape[-len(shape) :]) != shape:
        raise ValueError(
            f"the last dimensions of the input must be normalized_shape, {list(shape)}; got {list(input.shape)}"
        )
    if input.is_cuda and autocasts("cuda"):  # autocast runs layer_norm in float32 on GPUs, but not on CPUs
        input = input.to(torch.promote_types(input.dtype, torch.float32))
    return _affine(standardise(input, len(shape), eps), weight, bias)


def _instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if not use_input_stats:
        return F.instance_norm(input, running_mean, running_var, weight, bias, False, momentum, eps)
    _check("instance_norm", running_mean)
    return _affine(standardise(input, input.dim() - 2, eps), weight, bias, input.dim() - 2)


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if not training:
        return F.batch_norm(input, running_mean, running_var, weight, bias, False, momentum, eps)
    _check("batch_norm", running_mean)
    scaled = standardise(input.transpose(0, 1), input.dim() - 1, eps).transpose(0, 1)
    return _affine(scaled, weight, bias, input.dim() - 2)


def _check(name: str, running_mean: Tensor | None) -> None:
    if running_mean is not None:
        raise NotImplementedError(
            f"replace_norms does not support {name} with running statistics in training, because they would have to "
            "change in place under torch.func; build the module with track_running_stats=False, or call eval() on it"
        )


def _affine(x: Tensor, weight: Tensor | None, bias: Tensor | None, trailing: int = 0) -> Tensor:
    """Return ``x * weight + bias`` in the dtype of ``x``, broadcast over the last ``trailing`` dimensions."""
    shape, dtype = (..., *(None,) * trailing), x.dtype
    x = x if weight is None else x * weight[shape]
    return (x if bias is None else x + bias[shape]).to(dtype)


def _instance_norm_operator(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor | None, var: Tensor | None, *rest: Any
) -> Tensor:
    return _instance_norm(input, mean, var, weight, bias, *rest[:3])


def _batch_norm_operator(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor | None, var: Tensor | None, *rest: Any
) -> Tensor:
    return _batch_norm(input, mean, var, weight, bias, *rest[:3])


def _rejected(name: str, alternative: str) -> Callable[..., Tensor]:
    def reject(*args: Any, **kwargs: Any) -> Tensor:
        raise NotImplementedError(
            f"replace_norms cannot replace {name}, which also returns statistics and has wrong second derivatives; "
            f"call torch.nn.functional.{alternative}"
        )

    return reject


_REPLACEMENTS: dict[Callable[..., Any], Callable[..., Tensor]] = {
    F.layer_norm: _layer_norm,
    F.instance_norm: _instance_norm,
    F.batch_norm: _batch_norm,
    **dict.fromkeys(callables_of("layer_norm"), _layer_norm),
    **dict.fromkeys(callables_of("instance_norm"), _instance_norm_operator),
    **dict.fromkeys(callables_of("batch_norm"), _batch_norm_operator),
    **dict.fromkeys(callables_of("native_layer_norm"), _rejected("native_layer_norm", "layer_norm")),
    **dict.fromkeys(callables_of("native_batch_norm"), _rejected("native_batch_norm", "batch_norm")),
}
