"""Trees of tensors and constants as flat sequences of tensors, and the specs of tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_unflatten

from ._torch_internals import tree_flatten

Tensors = tuple[Tensor, ...]


class TensorSpec(NamedTuple):
    """The properties of a tensor that compiled code depends on: all but its numbers."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @property
    def bytes(self) -> int:
        """Size of the numbers in bytes, not counting gaps between them."""
        return math.prod(self.shape) * self.dtype.itemsize


def tensor_spec(t: Tensor) -> TensorSpec:
    """Return the spec of a tensor."""
    return TensorSpec(tuple(t.shape), t.stride(), t.dtype, t.device)


def split_tensors(tree: Any) -> tuple[Tensors, Callable[[Sequence[Tensor]], Any]]:
    """Split a tree into its tensors and the rest.

    Args:
        tree: Any pytree.

    Returns:
        The tensors among the leaves, in order; and a function that builds the same tree with other tensors in their
        places. The function does not keep the tensors of ``tree`` alive.
    """
    leaves, spec = tree_flatten(tree)
    indices = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    rest = replace_at(leaves, indices, [None] * len(indices))
    return (
        tuple(leaves[i] for i in indices),
        lambda tensors: tree_unflatten(replace_at(rest, indices, tensors), spec),
    )


def constants_of(tree: Any) -> tuple[Any, ...]:
    """Return all of a tree except its tensors: its structure, and the other leaves in their places."""
    leaves, spec = tree_flatten(tree)
    return spec, tuple(None if isinstance(leaf, Tensor) else (type(leaf), leaf) for leaf in leaves)


def replace_at(entries: Sequence[Any], indices: Sequence[int], replacements: Sequence[Any]) -> list[Any]:
    """Return a copy of a list with the entries at some indices replaced."""
    out = list(entries)
    for i, replacement in zip(indices, replacements, strict=True):
        out[i] = replacement
    return out
