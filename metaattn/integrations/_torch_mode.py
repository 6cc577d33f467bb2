"""Mode behind :class:`metaattn.replace_sdpa`: it finds attention among the calls into PyTorch and replaces it.

PyTorch disables a mode while the mode handles a function, so that attention inside that function would not be seen.
Therefore functions that are written in Python, or that run a model's code, are called with the mode enabled again.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor
from torch._ops import HigherOrderOperator
from torch.nn import functional as F
from torch.overrides import handle_torch_function, has_torch_function

from ..autodiff import BACKWARD_FUNCTIONS, Replacement, after_import, callables_of, skip_torch_function
from ..ops import is_causal_bias, sdpa

TORCH_SDPA = F.scaled_dot_product_attention

# Fused operators that can be called directly: kernels of scaled_dot_product_attention, and whole layers.
_FUSED_NAMES = (
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_fused_attention_overrideable",
    "_flash_attention_forward",
    "_efficient_attention_forward",
    "_cudnn_attention_forward",
    "_native_multi_head_attention",
    "_transformer_encoder_layer_fwd",
)
_REMEDY = "call torch.nn.functional.scaled_dot_product_attention, or make this call outside of the block"


class Installed:
    """Settings of :meth:`metaattn.replace_sdpa.install`, for the whole process."""

    backend: str | None = None


def installed(*args: Any, **kwargs: Any) -> Tensor:
    """Replacement of PyTorch's function by name; modes see its calls as they see those of the original."""
    # A causal bias would run PyTorch's own kernels, whatever the name of the function.
    operands = [t for t in (*args, *kwargs.values()) if not is_causal_bias(t)]
    if has_torch_function(operands):
        return handle_torch_function(installed, operands, *args, **kwargs)
    return sdpa(*args, **kwargs, backend=Installed.backend)


_REPLACED = {TORCH_SDPA, installed, *callables_of("scaled_dot_product_attention")}
_FUSED = set[Any]().union(*map(callables_of, _FUSED_NAMES))
_FLEX = getattr(torch.ops.higher_order, "flex_attention", None)
_SPECIAL = {*_REPLACED, *_FUSED, *BACKWARD_FUNCTIONS, F.multi_head_attention_forward}


def _add_varlen() -> None:
    """Add a custom operator, which forward mode silently treats as a constant (``tests/boundaries``)."""
    _FUSED.update(callables_of("_varlen_attn", torch.ops.torch_attn))
    _SPECIAL.update(_FUSED)


after_import("torch.nn.attention.varlen", _add_varlen)  # which registers the operator, and imports Dynamo


def _check_padding(mask: Tensor, length: int, batch: int) -> None:
    if mask.shape != (batch, length):
        raise ValueError(f"key_padding_mask must have shape {[batch, length]}; got {list(mask.shape)}")


# A copy of PyTorch's function without its dispatch to modes, so that it runs with the mode enabled and Dynamo traces
# into it. Dynamo also cannot trace the formatted error message of PyTorch's check of a mask, so that check is replaced.
_multi_head_attention = skip_torch_function(F.multi_head_attention_forward, _check_key_padding_mask=_check_padding)


class Mode(Replacement):
    """Mode that sees every call into PyTorch from its thread, by whatever name, and replaces attention.

    Args:
        backend: Backend of :func:`metaattn.sdpa`, by name; ``None`` for the default.

    Raises:
        NotImplementedError: In a call of attention that cannot be replaced.
    """

    def __init__(self, backend: str | None) -> None:
        super().__init__({}, "replace_sdpa")
        self.backend = backend

    @property
    def key(self) -> Hashable:
        """See :class:`Replacement`."""
        return super().key, self.backend

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run in place of ``func``: called by PyTorch for each function."""
        kwargs = kwargs or {}
        if func is Tensor.unflatten:
            return torch.unflatten(*args, **kwargs)  # equivalent; under a mode, Dynamo cannot trace the method
        if func not in _SPECIAL and not isinstance(func, HigherOrderOperator):
            return func(*args, **kwargs)
        if func in _REPLACED:
            return sdpa(*args, **kwargs, backend=self.backend)
        if func is F.multi_head_attention_forward:
            with self:
                return _multi_head_attention(*args, **kwargs)
        if func in _FUSED:
            raise NotImplementedError(
                f"replace_sdpa cannot replace {func.__name__}: it is a fused kernel without forward mode and second "
                f"derivatives; {_REMEDY}"
            )
        if func is _FLEX:
            raise NotImplementedError(
                "replace_sdpa cannot replace flex_attention, because Python functions modify its scores; use attn_mask "
                f"or the window of metaattn.sdpa: {_REMEDY}"
            )
        return self._call_reentered(func, types, args, kwargs)
