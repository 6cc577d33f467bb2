"""Which calls into PyTorch are attention, and what becomes of each under :class:`metaattn.replace_sdpa`.

A mode is off inside of a function that it has been shown, so that attention in there would not be seen: where that
function is Python, or a model's code runs in it, it is called with the mode on.
"""

from __future__ import annotations

import contextlib
from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor
from torch._ops import HigherOrderOperator
from torch.nn import functional as F
from torch.overrides import handle_torch_function, has_torch_function

from ..autodiff import BACKWARD_FUNCTIONS, Replacement, callables_of, skip_torch_function
from ..ops import sdpa

with contextlib.suppress(ImportError):  # not in every version
    import torch.nn.attention.varlen  # declares its operator

TORCH_SDPA = F.scaled_dot_product_attention

# Fused attention by its own name: a kernel of scaled_dot_product_attention's, or a whole layer in one.
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
_INSTEAD = "call torch.nn.functional.scaled_dot_product_attention, or make this call outside of the block"


class Installed:
    """What :meth:`metaattn.replace_sdpa.install` asked for."""

    backend: str | None = None


def installed(*args: Any, **kwargs: Any) -> Tensor:
    """In the place of PyTorch's function where that is replaced by name; modes see its calls like those."""
    operands = (*args, *kwargs.values())
    if has_torch_function(operands):
        return handle_torch_function(installed, operands, *args, **kwargs)
    return sdpa(*args, **kwargs, backend=Installed.backend)


_REPLACED = {TORCH_SDPA, installed, *callables_of("scaled_dot_product_attention")}
# The last is a custom operator: forward mode takes it for constant (tests/boundaries).
_FUSED = set[Any]().union(*map(callables_of, _FUSED_NAMES), callables_of("_varlen_attn", torch.ops.torch_attn))
_FLEX = getattr(torch.ops.higher_order, "flex_attention", None)
_SPECIAL = {*_REPLACED, *_FUSED, *BACKWARD_FUNCTIONS, F.multi_head_attention_forward}


def _check_padding(mask: Tensor, length: int, batch: int) -> None:
    if mask.shape != (batch, length):
        raise ValueError(f"key_padding_mask must be {[batch, length]}; got {list(mask.shape)}")


# PyTorch's own without its test for modes, so that it runs with ours on and Dynamo traces it (the original is one node
# to it). What else Dynamo cannot trace is the formatted message of the check of a mask.
_multi_head_attention = skip_torch_function(F.multi_head_attention_forward, _check_key_padding_mask=_check_padding)


class Mode(Replacement):
    """Sees every call into PyTorch from its thread, by whatever name, and replaces attention.

    Args:
        backend: As in :func:`metaattn.sdpa`.

    Raises:
        NotImplementedError: From a call of attention that cannot be replaced.
    """

    def __init__(self, backend: str | None) -> None:
        super().__init__({}, "replace_sdpa")
        self.backend = backend

    @property
    def key(self) -> Hashable:
        """See :class:`Replacement`."""
        return super().key, self.backend

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Called in the place of ``func``."""
        kwargs = kwargs or {}
        if func is Tensor.unflatten:
            return torch.unflatten(*args, **kwargs)  # the same; under a mode Dynamo cannot trace the method
        if func not in _SPECIAL and not isinstance(func, HigherOrderOperator):
            return func(*args, **kwargs)
        if func in _REPLACED:
            return sdpa(*args, **kwargs, backend=self.backend)
        if func is F.multi_head_attention_forward:
            with self:
                return _multi_head_attention(*args, **kwargs)
        if func in _FUSED:
            raise NotImplementedError(
                f"replace_sdpa cannot replace {func.__name__}: it is one fused kernel, without forward mode and second "
                f"derivatives; {_INSTEAD}"
            )
        if func is _FLEX:
            raise NotImplementedError(
                "replace_sdpa cannot replace flex_attention: functions change its scores. Pass attn_mask, or window to "
                f"metaattn.sdpa: {_INSTEAD}"
            )
        return self._call_reentered(func, types, args, kwargs)
