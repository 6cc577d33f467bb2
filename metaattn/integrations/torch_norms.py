"""PyTorch's norms with the derivatives of their formulas.

Of :func:`torch.nn.functional.layer_norm`, ``instance_norm`` and ``batch_norm`` (of a batch's statistics) PyTorch (2.11,
2.13; held by ``tests/boundaries``) has silently wrong derivatives in ``grad`` of ``jvp``, in ``jvp`` of ``jvp`` and at
third and higher order, and wrong meta-gradients under :func:`torch.func.vmap`. Models of other libraries have them.
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
    """In this block and this thread, norms that every derivative is right of.

    ``layer_norm``, ``instance_norm`` and ``batch_norm``, however a model calls them, are written out, with statistics
    in float32 or wider. ``group_norm``, ``rms_norm`` and ``batch_norm`` in evaluation are right as they are, and stay.

    A derivative is that of what ran forward, so that a backward pass may come after the block; what
    :func:`metaattn.meta.checkpoint` computes again is written out again.

    Returns:
        A context manager.

    Raises:
        NotImplementedError: In the block: a norm that takes a batch's statistics and trains running ones;
            PyTorch's ``native_layer_norm`` and ``native_batch_norm``, which return statistics; a higher-order
            operator (a checkpoint, ``torch.cond``) within one graph of :func:`torch.compile`.

    Source:
        Ba, Kiros and Hinton 2016 (arXiv 1607.06450), eq. 4. What is wrong: PyTorch's issues 196699, 196700, 198017.

    Example:
        >>> import torch
        >>> from torch.func import grad, jvp
        >>> from metaattn.integrations.torch_norms import replace_norms
        >>> norm = torch.nn.LayerNorm(4).double()
        >>> x, t = torch.randn(2, 3, 4, dtype=torch.float64)
        >>> along = lambda x: jvp(lambda x: norm(x).sin().sum(), (x,), (t,))[1]
        >>> with replace_norms():
        ...     right = grad(along)(x)
        >>> bool((grad(along)(x) - right).norm() > 0.01 * right.norm())  # PyTorch's own is not
        True
    """
    return Replacement(_WRITTEN_OUT, "replace_norms")


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
            f"the input's last dimensions must be normalized_shape, {list(shape)}; got {list(input.shape)}"
        )
    if input.is_cuda and autocasts("cuda"):  # to float32, as PyTorch does it: on GPUs alone
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
            f"{name} with running statistics in training is not served by replace_norms, for they would have to change "
            "in place under torch.func; build the module with track_running_stats=False, or call eval() on it"
        )


def _affine(x: Tensor, weight: Tensor | None, bias: Tensor | None, behind: int = 0) -> Tensor:
    """``x * weight + bias``, in front of the last ``behind`` dimensions, in the dtype of ``x``."""
    shape, dtype = (..., *(None,) * behind), x.dtype
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


def _refused(name: str, by: str) -> Callable[..., Tensor]:
    def refuse(*args: Any, **kwargs: Any) -> Tensor:
        raise NotImplementedError(
            f"replace_norms cannot replace {name}, which returns statistics as well and has wrong second derivatives; "
            f"call torch.nn.functional.{by}"
        )

    return refuse


_WRITTEN_OUT: dict[Callable[..., Any], Callable[..., Tensor]] = {
    F.layer_norm: _layer_norm,
    F.instance_norm: _instance_norm,
    F.batch_norm: _batch_norm,
    **dict.fromkeys(callables_of("layer_norm"), _layer_norm),
    **dict.fromkeys(callables_of("instance_norm"), _instance_norm_operator),
    **dict.fromkeys(callables_of("batch_norm"), _batch_norm_operator),
    **dict.fromkeys(callables_of("native_layer_norm"), _refused("native_layer_norm", "layer_norm")),
    **dict.fromkeys(callables_of("native_batch_norm"), _refused("native_batch_norm", "batch_norm")),
}
