"""Conversion of arguments to tensors of numbers: known kinds are taken, all others are rejected by name.

A subclass of :class:`torch.Tensor` may hold no numbers of its own: a bias of :mod:`torch.nn.attention.bias` has
uninitialised memory, a masked tensor has a second one. The operator reads memory, so it takes only kinds that it knows:

* tensors, parameters, and subclasses that change no behaviour (they override neither ``__torch_function__`` nor
  ``__torch_dispatch__``), which are taken as the tensors that they are;
* the fake and functional tensors with which PyTorch traces;
* as ``attn_mask``, a causal bias of :mod:`torch.nn.attention.bias`: a limit of the band, and no tensor at all.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor
from torch.nn import Parameter

# Compared by name: importing the modules would take long, and one of them imports Dynamo.
_OF_TRACERS = (
    "torch._subclasses.fake_tensor.FakeTensor",
    "torch._subclasses.functional_tensor.FunctionalTensor",
)


def as_tensor(name: str, t: object) -> Tensor:
    """Return ``t`` as the tensor of numbers that it is.

    Args:
        name: What to call it in an error.
        t: Any object.

    Raises:
        TypeError: It is not a tensor, not a dense one, or a subclass that is not known to hold its numbers.
    """
    if not isinstance(t, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(t).__name__}")
    if t.is_nested or t.layout != torch.strided:
        layout = "a nested one" if t.is_nested else t.layout
        raise TypeError(f"{name} must be a dense tensor; got {layout}: convert it, e.g. {name}.to_dense()")
    if t.is_quantized:
        raise TypeError(f"{name} must not be quantized; got {t.dtype}: convert it, e.g. {name}.dequantize()")
    kind = type(t)
    if kind is Tensor or kind is Parameter or _full_name(kind) in _OF_TRACERS:
        return t
    if _changes_nothing(kind):
        return t.as_subclass(Tensor)
    raise TypeError(
        f"{name} must be a plain tensor; got the subclass {_full_name(kind)}, which may hold other numbers than its "
        f"memory does: convert it, e.g. {name}.as_subclass(torch.Tensor) if its memory holds them"
    )


def _full_name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _changes_nothing(kind: type[Tensor]) -> bool:
    """Return whether a subclass behaves as a tensor does in every function."""
    function = getattr(kind.__torch_function__, "__func__", kind.__torch_function__)
    plain = (Tensor.__torch_function__.__func__, Parameter.__torch_function__)  # type: ignore[attr-defined]
    return function in plain and kind.__torch_dispatch__ is Tensor.__torch_dispatch__


def is_causal_bias(mask: object) -> bool:
    """Return whether a mask is one of :mod:`torch.nn.attention.bias`."""
    if mask is None or type(mask) is Tensor:
        return False
    module = sys.modules.get("torch.nn.attention.bias")  # whoever made a bias has imported it
    return module is not None and isinstance(mask, module.CausalBias)


def causal_limit(bias: Tensor, rows: int, keys: int) -> int:
    """Return how many keys after its own position a row sees under a causal bias; negative if it sees not even that.

    Args:
        bias: A causal bias.
        rows: Length of the query.
        keys: Length of the key.

    Raises:
        ValueError: The bias was made for other lengths.
    """
    made_for = bias.seq_len_q, bias.seq_len_kv  # type: ignore[attr-defined]
    if made_for != (rows, keys):
        raise ValueError(
            f"attn_mask is a causal bias for {made_for[0]} rows and {made_for[1]} keys; query and key have {rows} and "
            f"{keys}: make one for these lengths"
        )
    lower_right = bias.variant == sys.modules["torch.nn.attention.bias"].CausalVariant.LOWER_RIGHT  # type: ignore[attr-defined]
    return keys - rows if lower_right else 0
