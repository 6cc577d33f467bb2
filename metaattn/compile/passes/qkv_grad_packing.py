"""Gradients of query, key and value, written by the kernel as one packed matrix where the next operation wants it so.

A layer projects tokens to query, key and value at once, and splits the result. The gradient of that result is the three
gradients concatenated, with the heads of a token side by side: a copy of all three. The kernel can write them packed in
the first place, and then a meta-step takes 2 to 4% less time on an H100.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from ...ops.operators import backward, backward_jvp, backward_packed, backward_with_jvp, packed_arguments

aten = torch.ops.aten


def pack_qkv_gradients(graph: fx.Graph) -> fx.Graph:
    """Replace gradients of attention that are only concatenated by packed ones, in place; return the graph."""
    for target in (backward, backward_jvp, backward_with_jvp):
        for node in graph.find_nodes(op="call_function", target=target):
            _pack(graph, node)
    graph.eliminate_dead_code()
    return graph


def _pack(graph: fx.Graph, node: fx.Node) -> None:
    # The results are query, key, value and bias, and then perhaps the tangents of these.
    triples = ((0, 1, 2), (4, 5, 6)) if node.target is backward_with_jvp else ((0, 1, 2),)
    results = {n.args[1]: n for n in node.users}
    gradients = [[results.get(i) for i in triple] for triple in triples]
    packed = {i: _packed(triple) for i, triple in enumerate(gradients) if any(triple)}
    args = packed_arguments(node.target, node.args)
    if args is None or None in packed.values():
        return
    with graph.inserting_before(node):
        new = graph.call_function(backward_packed, args)
        for i, old in packed.items():
            query_grad = gradients[i][0]
            assert old is not None
            assert query_grad is not None
            like, batch = old.meta["result"], query_grad.meta["spec"].shape[:-3]
            item = graph.call_function(operator.getitem, (new, i))
            item.meta["result"] = like.view(*batch, *like.shape[-3:])
            view = graph.call_function(aten.view.default, (item, list(like.shape)))
            view.meta["result"] = like
            old.replace_all_uses_with(view)


def _packed(gradients: Sequence[fx.Node | None]) -> fx.Node | None:
    """Return the node that packs the gradients of query, key and value, if nothing else uses them; else ``None``."""
    sources = [None if g is None else _skip_batch_views(g) for g in gradients]
    cats = {None if g is None else _only_user(g, aten.cat.default) for g in sources}
    cat = cats.pop()
    if cats or cat is None or cat.args[0] != sources:
        return None
    transposed = _only_user(cat, aten.transpose.int)
    copy = None if transposed is None else _only_user(transposed, aten.clone.default)
    if transposed is None or copy is None or not copy.meta["result"].is_contiguous():
        return None
    rank = copy.meta["result"].ndim
    # Heads are concatenated, and then swapped with the tokens.
    dims = [d % rank for d in (*(cat.args[1:] or (0,)), *transposed.args[1:])]
    return copy if dims in ([rank - 3, rank - 3, rank - 2], [rank - 3, rank - 2, rank - 3]) else None


def _skip_batch_views(node: fx.Node) -> fx.Node:
    """Return the last of the views of a node that differ from it in nothing but their batch dimensions, or the node."""
    spec, user = node.meta["spec"], _only_user(node)
    while user is not None and user.target.is_view and "result" in user.meta:  # one result, not a list of them
        result = user.meta["result"]
        same_data = result.dtype == spec.dtype and result.numel() == math.prod(spec.shape) and result.is_contiguous()
        if not same_data or result.shape[-3:] != spec.shape[-3:]:
            break
        node, user = user, _only_user(user)
    return node


def _only_user(node: fx.Node, target: Any = None) -> Any:
    """Return the one operation that uses a node, and only if it is ``target`` where that is given; else ``None``."""
    users = [n for n in node.users if n.op == "call_function" and isinstance(n.target, torch._ops.OpOverload)]
    return users[0] if len(node.users) == len(users) == 1 and target in (None, users[0].target) else None
