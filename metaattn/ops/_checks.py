"""Check a call of the operator, and bring its tensors to the form that the rules and backends take.

Every error about arguments is raised here, before any computation.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..backends import check_name, current_backend, unsupported_reason
from ..backends.base import Operands
from ._tensor_kinds import as_tensor, causal_limit, is_causal_bias
from .operators import Call, autocasts

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

Window = tuple[int | None, int | None]
NO_LIMIT = 2**62  # a larger side of a window means the same, and may not fit into an int64


class Prepared(NamedTuple):
    """A checked call: its static part, its operands, and the shape of its output."""

    call: Call
    x: Operands
    out_shape: tuple[int, ...]


def prepare(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    window: Window | None,
    backend: str | None,
) -> Prepared:
    """Check a call and bring its tensors to the form of :class:`Operands`. It raises the errors listed at ``sdpa``."""
    if torch.jit.is_tracing():  # type: ignore[attr-defined]
        # There sizes are tensors, and the recorded graph would lack the derivative rules.
        raise NotImplementedError("torch.jit.trace is not supported; use torch.compile or make_fx")
    name = current_backend() if backend is None else check_name(backend)
    _check_flags(is_causal=is_causal, enable_gqa=enable_gqa)
    given = query
    query, key, value = _check_tensors(query=query, key=key, value=value)
    _check_lengths(query, key, value)
    left, right = check_window(window)
    causal = 0 if is_causal else None
    if attn_mask is not None:
        if is_causal:
            raise ValueError(
                "attn_mask and is_causal exclude each other, as in PyTorch; pass is_causal=False and put the causal "
                "part in the mask, or pass window=(None, 0)"
            )
        if is_causal_bias(attn_mask):
            causal = causal_limit(attn_mask, query.shape[-2], key.shape[-2])
            attn_mask = None
        else:
            attn_mask = _check_mask(attn_mask, (given.dtype, query.dtype), given)
    right = right if causal is None else causal if right is None else min(causal, right)
    _check_dropout(dropout_p)
    scale = _check_scale(scale, query.shape[-1])

    rank = max(query.dim(), key.dim(), value.dim())
    if rank == 2 and enable_gqa:
        raise ValueError("enable_gqa needs inputs with a head dimension, [..., H, N, D]; got 2 dimensions")
    query, key, value = (_pad(t, max(rank, 4)) for t in (query, key, value))
    heads = _heads(query, key, value, enable_gqa)
    query, key, value = _broadcast(query, key, value, heads)
    scores = (*query.shape[:-1], key.shape[-2])
    bias = mask = None
    if attn_mask is not None:
        if attn_mask.dim() > rank or not _broadcasts(attn_mask.shape, scores):
            raise ValueError(
                f"attn_mask must broadcast to the scores, {list(scores[len(scores) - rank :])}; "
                f"got {list(attn_mask.shape)}"
            )
        attn_mask = _pad(attn_mask, len(scores))
        bias, mask = (None, attn_mask) if attn_mask.dtype == torch.bool else (attn_mask, None)
    out_shape = (*query.shape[-rank:-1], value.shape[-1])

    call = Call(scale, left, right, float(dropout_p), name)
    x = Operands(query, key, value, bias, mask)
    if (reason := unsupported_reason(name, call.problem, x)) is not None:
        raise NotImplementedError(reason)
    if dropout_p > 0.0:
        # From PyTorch's generator, so that torch.manual_seed and the `randomness` of vmap apply.
        seeds = torch.randint(2**62, (*query.shape[:-2], 1, 1), dtype=torch.int64, device=query.device)
        x = x._replace(seeds=seeds)
    return Prepared(call, x, out_shape)


def _check_flags(**flags: object) -> None:
    for name, flag in flags.items():
        if not isinstance(flag, bool):
            raise TypeError(f"{name} must be True or False; got {flag!r}")


def _check_dropout(dropout_p: object) -> None:
    if not isinstance(dropout_p, int | float):
        raise TypeError(f"dropout_p must be a number; got {dropout_p!r}")
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p must be at least 0 and below 1; got {dropout_p}")


def _check_scale(scale: object, head_size: int) -> float:
    """Return the factor of the scores."""
    if scale is None:
        return 1.0 / math.sqrt(head_size)
    if not isinstance(scale, int | float) or not abs(scale) <= sys.float_info.max:  # NaN is not, and 10**400 no float
        raise TypeError(
            f"scale must be a finite number, got {str(scale)[:40]!r}; to differentiate a scale, multiply the query by "
            "it"
        )
    return float(scale)


def _check_tensors(**tensors: Tensor) -> Sequence[Tensor]:
    tensors = {name: as_tensor(name, t) for name, t in tensors.items()}
    for name, t in tensors.items():
        if t.dim() < 2:
            raise ValueError(f"{name} must have at least 2 dimensions, [..., N, D]; got shape {list(t.shape)}")
    tensors = dict(zip(tensors, _cast(*tensors.values()), strict=True))
    query = tensors["query"]
    for name, t in tensors.items():
        if t.dtype not in DTYPES:
            raise TypeError(
                f"{name} must be float16, bfloat16, float32 or float64; got {t.dtype}: convert it, e.g. {name}.float()"
            )
        if t.dtype != query.dtype:
            raise TypeError(f"query, key and value must have one dtype; got query {query.dtype}, {name} {t.dtype}")
        if t.device != query.device:
            raise ValueError(
                f"query, key and value must be on one device; got query on {query.device}, {name} on {t.device}"
            )
    return list(tensors.values())


def _check_lengths(query: Tensor, key: Tensor, value: Tensor) -> None:
    if query.shape[-1] != key.shape[-1]:
        raise ValueError(
            f"query and key must have one head size (last dimension); got {query.shape[-1]} and {key.shape[-1]}"
        )
    if key.shape[-2] != value.shape[-2]:
        raise ValueError(f"key and value must have one length; got {key.shape[-2]} and {value.shape[-2]}")
    if query.shape[-1] == 0 or value.shape[-1] == 0:
        raise ValueError(f"head sizes must be at least 1; got query {list(query.shape)}, value {list(value.shape)}")


def _check_mask(mask: Tensor, dtypes: tuple[torch.dtype, torch.dtype], query: Tensor) -> Tensor:
    """Check the mask and return it; ``dtypes`` are those of the query as it was given, and after autocast."""
    mask = as_tensor("attn_mask", mask)
    if mask.dtype not in (torch.bool, torch.float32, *dtypes):
        raise TypeError(f"attn_mask must be bool, float32 or the query's dtype, {dtypes[0]}; got {mask.dtype}")
    if mask.device != query.device:
        raise ValueError(f"attn_mask must be on the query's device, {query.device}; got {mask.device}")
    return mask


def check_window(window: object) -> Window:
    """Return the limits left and right of the diagonal that ``window`` sets; raises as :func:`sdpa`."""
    if window is None:
        window = (None, None)
    if not isinstance(window, Sequence) or len(window) != 2:
        raise TypeError(f"window must be a pair (left, right) of integers or None; got {window!r}")
    for side in window:
        if side is not None and (isinstance(side, bool) or not isinstance(side, int) or side < 0):
            raise ValueError(
                f"each side of window must be an integer of at least 0, or None for no limit; got {window!r}"
            )
    left, right = (side if side is None else min(side, NO_LIMIT) for side in window)
    return left, right


def _cast(*tensors: Tensor) -> Sequence[Tensor]:
    """Under autocast, cast the inputs to its dtype as PyTorch's attention does, except float64."""
    device = tensors[0].device.type
    floats = all(t.is_floating_point() and t.dtype != torch.float64 for t in tensors)
    if floats and autocasts(device):
        return [t.to(torch.get_autocast_dtype(device)) for t in tensors]
    return tensors


def _pad(t: Tensor, rank: int) -> Tensor:
    """Add leading dimensions of size 1 up to ``rank``."""
    return t[(None,) * (rank - t.dim())] if t.dim() < rank else t


def _heads(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> tuple[int, int]:
    """Return the number of query heads, and of key and value heads, after broadcasting."""
    q, k, v = (t.shape[-3] for t in (query, key, value))
    if enable_gqa:
        if k == 0 or v == 0 or q % k or q % v:
            raise ValueError(
                f"with enable_gqa the heads of key and value must divide those of query; got query {q}, key {k}, "
                f"value {v}"
            )
        return q, (k if k == v else q)
    sizes = {q, k, v} - {1}
    if len(sizes) > 1:
        hint = "; for grouped-query attention pass enable_gqa=True" if k == v and k and q % k == 0 else ""
        raise ValueError(f"query, key and value must have one number of heads; got {q}, {k} and {v}{hint}")
    heads = sizes.pop() if sizes else 1
    return heads, heads


def _broadcast(query: Tensor, key: Tensor, value: Tensor, heads: tuple[int, int]) -> Sequence[Tensor]:
    """Broadcast to one batch shape; expand heads, or repeat them if those of key and value differ under GQA."""
    shapes = [t.shape[:-3] for t in (query, key, value)]
    batch = shapes[0]
    try:
        if not shapes[0] == shapes[1] == shapes[2]:
            batch = torch.broadcast_shapes(*shapes)
    except RuntimeError:
        raise ValueError(
            "the batch dimensions of query, key and value must broadcast; got "
            f"{', '.join(str(list(s)) for s in shapes)}"
        ) from None
    tensors = zip((query, key, value), (heads[0], heads[1], heads[1]), strict=True)
    return [_expand(t, (*batch, n, *t.shape[-2:])) for t, n in tensors]


def _expand(t: Tensor, shape: Sequence[int]) -> Tensor:
    """Broadcast ``t`` to ``shape``; repeat its heads in groups if there are fewer."""
    if t.shape[-3] not in (1, shape[-3]):
        t = t.repeat_interleave(shape[-3] // t.shape[-3], -3)
    return (
        t if t.shape == shape else t.expand(shape)
    )  # an expand that changes nothing would add a node at each level of torch.func


def shape_tangent(name: str, primal: Tensor | None, tangent: Tensor | None, operand: Tensor | None) -> Tensor | None:
    """Turn a tangent of a primal into one of the operand that :func:`prepare` made of that primal."""
    if tangent is None:
        return None
    if not isinstance(tangent, Tensor):
        raise TypeError(f"the tangent of {name} must be a tensor or None; got {type(tangent).__name__}")
    tangent = as_tensor(f"the tangent of {name}", tangent)
    if primal is None or operand is None:
        raise ValueError(f"{name} has no tangent here: it is boolean or absent")
    if tangent.shape != primal.shape:
        raise ValueError(f"the tangent of {name} must have its shape, {list(primal.shape)}; got {list(tangent.shape)}")
    if tangent.dtype not in (primal.dtype, operand.dtype):  # the two differ under autocast only
        raise TypeError(f"the tangent of {name} must have its dtype, {primal.dtype}; got {tangent.dtype}: convert it")
    return _expand(_pad(tangent, operand.dim()), operand.shape).to(operand.dtype)


def reduce_gradient(grad: Tensor, primal: Tensor) -> Tensor:
    """Turn the gradient of an operand into that of its primal: sum over what was broadcast or repeated."""
    shape = (*(1,) * (grad.dim() - primal.dim()), *primal.shape)
    if shape[-3] not in (1, grad.shape[-3]):
        grad = grad.unflatten(-3, (shape[-3], -1)).sum(-3)
    return grad.sum_to_size(shape).reshape(primal.shape).to(primal.dtype)


def _broadcasts(shape: Sequence[int], to: Sequence[int]) -> bool:
    return all(a in (1, b) for a, b in zip(reversed(shape), reversed(to), strict=False))
