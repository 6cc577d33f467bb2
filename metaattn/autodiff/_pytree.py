"""Trees of tensors and constants, as the tensors in them; and what code depends on of a tensor."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

Tensors = tuple[Tensor, ...]


class TensorSpec(NamedTuple):
    """What code depends on of a tensor."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @property
    def bytes(self) -> int:
        """Of its numbers."""
        return math.prod(self.shape) * self.dtype.itemsize


def tensor_spec(t: Tensor) -> TensorSpec:
    """The form of a tensor."""
    return TensorSpec(tuple(t.shape), t.stride(), t.dtype, t.device)


def split_tensors(tree: Any) -> tuple[Tensors, Callable[[Sequence[Tensor]], Any]]:
    """The tensors among a tree's leaves, and what makes the tree of others in their places: it holds none of these."""
    leaves, spec = tree_flatten(tree)
    where = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    rest = put(leaves, where, [None] * len(where))
    return tuple(leaves[i] for i in where), lambda tensors: tree_unflatten(put(rest, where, tensors), spec)


def constants_of(tree: Any) -> tuple[Any, ...]:
    """All of a tree but its tensors: its structure, and the other leaves in their places."""
    leaves, spec = tree_flatten(tree)
    return spec, tuple(None if isinstance(leaf, Tensor) else (type(leaf), leaf) for leaf in leaves)


def put(entries: Sequence[Any], where: Sequence[int], by: Sequence[Any]) -> list[Any]:
    """The entries, with others in some places."""
    out = list(entries)
    for i, other in zip(where, by, strict=True):
        out[i] = other
    return out
