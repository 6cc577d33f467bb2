"""Choose the cheap inputs of a piece to recompute from values that it already reads, instead of storing them.

A graph is split into pieces that are compiled one by one, and what one piece makes for another is stored in between. A
pointwise result, such as an activation of a layer that its derivative needs, is often cheaper to compute again: less is
written, kept and read.
"""

from __future__ import annotations

import math

import torch
from torch import fx

MAX_DEPTH = 8  # operations in a row that are recomputed
SMALLER = 0.6  # a smaller value is stored in place of a result if it has at most this share of its size
_CHEAP = (torch.ops.aten._to_copy.default, torch.ops.aten.full.default)  # and pointwise operations and views


def recomputed_inputs(piece: list[fx.Node], stored: set[fx.Node]) -> list[fx.Node]:
    """Return the nodes of other pieces that a piece should compute again, in their order.

    These are results of cheap operations on values that the piece reads anyway, or on a smaller value that is stored in
    their place: a token in 16 bits and its mean, for example, instead of its deviation in float32. (Triton 3.6 does not
    compile a kernel that both stores and uses three powers of a norm's deviation.) A result is stored after all if it
    is made of a value that exists, as an input of the graph or in ``stored``, but that the piece does not read: reading
    that value takes as long as reading the result.

    Args:
        piece: Nodes that are compiled together.
        stored: Nodes that later pieces read.
    """
    inputs = {a for n in piece for a in n.all_input_nodes}.difference(piece)

    def chain(node: fx.Node, depth: int, room: float) -> tuple[set[fx.Node], set[fx.Node]] | None:
        """Return the cheap operations that make a node, and the values that they start from.

        ``None`` if there are more than ``depth`` in a row, or if they need a value of more than ``room`` bytes that
        neither is an input nor exists.
        """
        if depth == 0 or not _is_cheap(node):
            return None
        operations: set[fx.Node] = {node}
        sources: set[fx.Node] = set()
        for a in node.all_input_nodes:
            if _exists(a, inputs | stored) or _stored_bytes(a) <= room:
                sources.add(a)
                continue
            before = chain(a, depth - 1, room)
            if before is None:
                return None
            operations |= before[0]
            sources |= before[1]
        return operations, sources

    recomputed: set[fx.Node] = set()
    for node in inputs - stored:
        size = node.meta["result"].nbytes if "result" in node.meta else 0
        found = chain(node, MAX_DEPTH, size // 2)
        if found is None:
            continue
        operations, sources = found
        new_bytes = sum(_stored_bytes(a) for a in sources if not _exists(a, inputs | stored))
        stores_less = 0 < new_bytes <= SMALLER * size
        reads_nothing_new = new_bytes == 0 and (not sources or not sources.isdisjoint(inputs))
        if stores_less or reads_nothing_new:
            recomputed |= operations
    return sorted(recomputed)


def _stored_bytes(node: fx.Node) -> float:
    """Return the bytes that storing a value takes; a view keeps all of the tensor that it is a view of."""
    size: float = node.meta["result"].untyped_storage().nbytes() if "result" in node.meta else math.inf
    return size


def _exists(node: fx.Node, values: set[fx.Node]) -> bool:
    return node.op == "placeholder" or node in values


def _is_cheap(node: fx.Node) -> bool:
    target = node.target
    return isinstance(target, torch._ops.OpOverload) and (
        target.is_view or torch.Tag.pointwise in target.tags or target in _CHEAP
    )
