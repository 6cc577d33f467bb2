"""Grouped heads, band, mask, bias and dropout for the backends in plain PyTorch: the one home of each.

These backends split the query heads into ``[*B, Hkv, G, N, ·]`` with key and value ``[*B, Hkv, 1, N, ·]``,
so that grouped-query attention is ordinary broadcasting, and work on tiles: ``rows`` and ``cols`` are
slices of the score matrix (the whole of it in the reference).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .base import Gradients, Operands, Problem

NEG_INF = float("-inf")


def split_heads(x: Tensor, kv_heads: int) -> Tensor:
    """``[*B, H, N, ·]`` to ``[*B, Hkv, G, N, ·]``, where a key, a value or a broadcast mask has ``G = 1``."""
    if x.shape[-3] in (1, kv_heads):
        return x.unsqueeze(-3)
    return x.unflatten(-3, (kv_heads, -1))


def group(x: Operands) -> Operands:
    """The operands with their heads split."""
    kv_heads = x.key.shape[-3]
    rest = (None if t is None else split_heads(t, kv_heads) for t in x[3:])
    return Operands(*(split_heads(t, kv_heads) for t in x[:3]), *rest)


def ungroup(gradients: Gradients, x: Operands) -> Gradients:
    """Gradients of grouped operands, in the shapes and dtypes of the operands ``x`` themselves.

    Those of key and value arrive summed over ``G``; that of the bias in the bias's grouped shape.
    """
    query, key, value, bias = gradients
    if bias is not None:
        assert x.bias is not None
        bias = bias.reshape(x.bias.shape).to(x.bias.dtype)
    return Gradients(
        query.flatten(-4, -3).to(x.query.dtype),
        key.squeeze(-3).to(x.key.dtype),
        value.squeeze(-3).to(x.value.dtype),
        bias,
    )


def row_key(a: Tensor, b: Tensor) -> Tensor:
    """``a b^T``: ``[…, G, Nq, d]`` and ``[…, 1, Nk, d]`` to ``[…, G, Nq, Nk]``, the keys not repeated."""
    return (a.flatten(-3, -2) @ b.squeeze(-3).mT).unflatten(-2, a.shape[-3:-1])


def row_sum(p: Tensor, b: Tensor) -> Tensor:
    """``p b``: ``[…, G, Nq, Nk]`` and ``[…, 1, Nk, d]`` to ``[…, G, Nq, d]``."""
    return (p.flatten(-3, -2) @ b.squeeze(-3)).unflatten(-2, p.shape[-3:-1])


def key_sum(p: Tensor, a: Tensor) -> Tensor:
    """``p^T a``, summed over the group: ``[…, G, Nq, Nk]`` and ``[…, G, Nq, d]`` to ``[…, 1, Nk, d]``."""
    return (p.flatten(-3, -2).mT @ a.flatten(-3, -2)).unsqueeze(-3)


def finite(lse: Tensor) -> Tensor:
    """The lse to subtract from scores: 0 for a row without keys, whose probabilities are then 0 and not NaN."""
    return lse.masked_fill(lse == NEG_INF, 0.0)


def tile_of(t: Tensor, rows: slice, cols: slice) -> Tensor:
    """The part of a mask, bias or its tangent that a tile needs; broadcast dimensions stay broadcast."""
    if t.shape[-2] != 1:
        t = t[..., rows, :]
    if t.shape[-1] != 1:
        t = t[..., cols]
    return t


def _offsets(rows: slice, cols: slice, device: torch.device) -> Tensor:
    """Key index minus query index, ``[rows, cols]``."""
    i = torch.arange(rows.start, rows.stop, device=device)
    j = torch.arange(cols.start, cols.stop, device=device)
    return j - i[:, None]


def tile_is_empty(problem: Problem, rows: slice, cols: slice) -> bool:
    """Whether the band hides every element of the tile, so that it need not be visited."""
    above = problem.right is not None and cols.start - (rows.stop - 1) > problem.right
    below = problem.left is not None and rows.start - (cols.stop - 1) > problem.left
    return above or below


def barrier(problem: Problem, mask: Tensor | None, rows: slice, cols: slice, like: Tensor) -> Tensor | None:
    """0 where band and mask show the element, -inf where they hide it; ``None`` if the tile is all shown.

    To be added to the scores: four times as fast as filling them by a boolean on a CPU (torch 2.13).
    """
    shown = None if mask is None else tile_of(mask, rows, cols)
    if problem.right is not None and cols.stop - 1 - rows.start > problem.right:
        band = _offsets(rows, cols, like.device) <= problem.right
        shown = band if shown is None else shown & band
    if problem.left is not None and rows.stop - 1 - cols.start > problem.left:
        band = _offsets(rows, cols, like.device) >= -problem.left
        shown = band if shown is None else shown & band
    if shown is None:
        return None
    zero = like.new_zeros(())
    return torch.where(shown, zero, zero + NEG_INF)


def _mix(x: Tensor) -> Tensor:
    """The 32-bit finaliser of MurmurHash3 (Appleby): each input bit flips each output bit half the time.

    Held in int64: products wrap modulo 2^64, of which the low 32 bits are right.
    """
    x = (x ^ (x >> 16)) * 0x85EBCA6B & 0xFFFFFFFF
    x = (x ^ (x >> 13)) * 0xC2B2AE35 & 0xFFFFFFFF
    return x ^ (x >> 16)


def dropout_weight(
    problem: Problem, seeds: Tensor | None, rows: slice, cols: slice, dtype: torch.dtype
) -> Tensor | None:
    """``Z``: 0 with probability p, else ``1/(1-p)``; a pure function of seed, row and column. ``None`` without dropout.

    One 32-bit hash per row, keyed by the low half of the seed, then one per element, keyed by the high half.
    """
    if seeds is None:
        return None
    low, high = seeds & 0xFFFFFFFF, (seeds >> 32) & 0xFFFFFFFF
    i = torch.arange(rows.start, rows.stop, device=seeds.device)[:, None]
    j = torch.arange(cols.start, cols.stop, device=seeds.device)
    row_key = _mix((i * 0x9E3779B9 & 0xFFFFFFFF) ^ low)
    bits = _mix(_mix((j * 0x9E3779B9 + row_key) & 0xFFFFFFFF) ^ high)
    keep = bits >= round(problem.dropout_p * 2**32)
    return keep.to(dtype) / (1.0 - problem.dropout_p)
