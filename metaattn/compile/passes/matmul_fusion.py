"""Fusion of matrix products in a recorded graph: fewer and larger kernels, which read less.

A product whose factors both have tangents is recorded as three products and a sum of two of them: it becomes one
operation. Two products that do not depend on each other, such as the gradients of a linear layer with respect to its
input and its weight, become one operation as well where they are small. All other products stay PyTorch's.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch.library import register_fake

from ...backends.matmul_jvp import Product, multiply, supported
from ...ops.operators import LIBRARY, is_attention_op

aten = torch.ops.aten
SMALL = 2**29  # multiplications; a larger product fills a GPU by itself, and cuBLAS is faster
_VALUE, _TANGENT = 1, 2  # flags: what is requested of a product

# Each tensor is given once, and a transposed factor as the tensor that it is a transpose of: Inductor would compute the
# tensor again for each argument.
LIBRARY.define(
    "_fused_matmuls(Tensor[] tensors, int[] indices, bool[] transposed, int[] requested) -> Tensor[]",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _products(
    tensors: Sequence[Tensor], indices: Sequence[int], transposed: Sequence[bool], requested: Sequence[int]
) -> list[Product]:
    """Return the products that the operator's arguments describe.

    ``indices`` lists, for each product, its two factors and then, if its tangent is requested, the tangents of both.
    """
    factors = iter([tensors[i].mT if t else tensors[i] for i, t in zip(indices, transposed, strict=True)])
    products = []
    for flags in requested:
        a, b = next(factors), next(factors)
        a_t, b_t = (next(factors), next(factors)) if flags & _TANGENT else (None, None)
        products.append(Product(a, b, a_t, b_t, value=bool(flags & _VALUE)))
    return products


@torch.library.impl(LIBRARY, "_fused_matmuls", "CompositeExplicitAutograd")
def _(*args: Any) -> list[Tensor]:
    return multiply(_products(*args))


@register_fake("metaattn::_fused_matmuls", lib=LIBRARY)
def _(*args: Any) -> list[Tensor]:
    return [p.a.new_empty(*p.a.shape[:2], p.b.shape[2]) for p in _products(*args) for _ in range(p.results)]


FUSED_MATMULS = torch.ops.metaattn._fused_matmuls.default


class _Matmul(NamedTuple):
    """A product in the graph: its factors and perhaps their tangents, and the nodes of its value and its tangent."""

    factors: tuple[fx.Node, ...]
    value: fx.Node | None
    tangent: fx.Node | None
    size: int  # multiplications of the value

    @property
    def requested(self) -> int:
        """Flags of the operator."""
        return _VALUE * (self.value is not None) + _TANGENT * (self.tangent is not None)


class _Group:
    """Nodes that are computed together: a single node, or those of the products of one operation."""

    def __init__(self, nodes: list[fx.Node], matmuls: list[_Matmul]) -> None:
        self.nodes, self.matmuls = nodes, matmuls
        self.inputs = {a for n in nodes for a in n.all_input_nodes}.difference(nodes)

    def needs(self, nodes: set[fx.Node]) -> bool:
        """Return whether one of the nodes is an input of the group."""
        return not self.inputs.isdisjoint(nodes)


def fuse_matmuls(graph: fx.Graph) -> fx.Graph:
    """Return a graph in which products are fused where that is possible and faster."""
    groups = [_Group([n], _single_product(n)) for n in graph.nodes]
    for node in graph.nodes:
        groups = _fuse_tangent(groups, node)
    groups = _fuse_pairs(groups)
    new_graph, new = fx.Graph(), dict[fx.Node, fx.Node]()
    for group in groups:
        if group.matmuls and (len(group.matmuls) > 1 or group.matmuls[0].tangent is not None):
            _add_operation(new_graph, group.matmuls, new)
        else:
            for n in group.nodes:
                new[n] = new_graph.node_copy(n, new.__getitem__)
    new_graph.eliminate_dead_code()
    return new_graph


def _add_operation(graph: fx.Graph, matmuls: list[_Matmul], new: dict[fx.Node, fx.Node]) -> None:
    """Add the operation that computes some products, and note in ``new`` which of its results are which nodes."""
    factors = [_without_transpose(f) for m in matmuls for f in m.factors]
    tensors = list(dict.fromkeys(f for f, _ in factors))
    indices, transposed = [tensors.index(f) for f, _ in factors], [t for _, t in factors]
    requested = [m.requested for m in matmuls]
    call = graph.call_function(FUSED_MATMULS, ([new[t] for t in tensors], indices, transposed, requested))
    results = [n for m in matmuls for n in (m.value, m.tangent) if n is not None]
    for i, n in enumerate(results):
        new[n] = graph.call_function(operator.getitem, (call, i))
        new[n].meta = n.meta


def _without_transpose(node: fx.Node) -> tuple[fx.Node, bool]:
    """Return the matrix that a factor is the transpose of, and true; for other factors the factor itself, and false."""
    (source, *dims), transpose = (node.args or [None]), aten.transpose.int
    is_transpose = node.target is transpose and sorted(map(repr, dims)) in (["1", "2"], ["-1", "-2"])
    if is_transpose and isinstance(source, fx.Node):
        return source, True
    return node, False


def _factors(node: Any) -> tuple[fx.Node, fx.Node] | None:
    """Return the factors of a product that our kernel may compute; ``None`` for any other node."""
    if not isinstance(node, fx.Node) or node.target is not aten.bmm.default:
        return None
    a, b = node.args
    assert isinstance(a, fx.Node)
    assert isinstance(b, fx.Node)
    return (a, b) if supported(node.meta["result"]) else None


def _size(product: fx.Node) -> int:
    first, second = product.meta["shapes"]
    size: int = first.numel() * second[-1]
    return size


def _single_product(node: fx.Node) -> list[_Matmul]:
    factors = _factors(node)
    return [] if factors is None else [_Matmul(factors, node, None, _size(node))]


def _fuse_tangent(groups: list[_Group], node: fx.Node) -> list[_Group]:
    """If a node is the tangent of a product, fuse its two terms, and the product if there is one.

    The tangent of ``a b`` is ``a_t b + a b_t``, in either order.
    """
    if node.target is not aten.add.Tensor or node.kwargs:
        return groups
    first, second = node.args
    first_factors, second_factors = _factors(first), _factors(second)
    if not (isinstance(first, fx.Node) and isinstance(second, fx.Node) and first_factors and second_factors):
        return groups
    if first is second or len(first.users) > 1 or len(second.users) > 1 or _kind(first) != _kind(second):
        return groups
    if not (_is_single(groups, first) and _is_single(groups, second)):
        return groups  # one of them is the value of another tangent
    (a_t, b), (a, b_t) = first_factors, second_factors
    value = _product_of(a, b)
    if value is None and (value := _product_of(a_t, b_t)) is not None:
        a, b, a_t, b_t = a_t, b_t, a, b
    for term in (first, second):
        merged = _merge(groups, term, node)
        assert merged is not None, "nothing else uses a term"
        groups = merged
    with_value = None
    if value is not None and value not in (first, second) and _is_single(groups, value):
        with_value = _merge(groups, value, node, independent=True)
    groups = with_value or groups
    group = next(g for g in groups if node in g.nodes)
    group.matmuls = [_Matmul((a, b, a_t, b_t), value if with_value else None, node, _size(first))]
    return groups


def _kind(product: fx.Node) -> Any:
    """Return what two products must have in common to be the terms of a tangent."""
    return product.meta["shapes"], product.meta["result"].dtype


def _is_single(groups: list[_Group], node: fx.Node) -> bool:
    """Return whether a node is not fused with others yet."""
    return next(g for g in groups if node in g.nodes).nodes == [node]


def _product_of(a: fx.Node, b: fx.Node) -> fx.Node | None:
    """Return the product of two nodes if the graph has it."""
    return next((n for n in a.users if _factors(n) == (a, b)), None)


def _fuse_pairs(groups: list[_Group]) -> list[_Group]:
    """Fuse, two by two, small independent products between the same two attention operators."""
    for first in [g for g in groups if g.matmuls]:
        if first not in groups:
            continue
        for second in _candidates(groups, first):
            if _dtype(first) != _dtype(second):
                continue
            merged = _merge(groups, first.nodes[0], second.nodes[0], independent=True)
            if merged is not None:
                groups = merged
                break
    return groups


def _candidates(groups: list[_Group], first: _Group) -> list[_Group]:
    """Return the groups that one might be paired with: those after it, up to the next attention operator."""
    found = []
    for group in groups[groups.index(first) + 1 :] if _may_be_paired(first) else []:
        if is_attention_op(group.nodes[0]):
            break
        if _may_be_paired(group):
            found.append(group)
    return found


def _dtype(group: _Group) -> torch.dtype:
    dtype: torch.dtype = group.nodes[0].meta["result"].dtype
    return dtype


def _may_be_paired(group: _Group) -> bool:
    """Return whether a group is one product that is small, or that our kernel computes anyway for its tangent."""
    return len(group.matmuls) == 1 and (group.matmuls[0].size <= SMALL or group.matmuls[0].tangent is not None)


def _merge(groups: list[_Group], a: fx.Node, b: fx.Node, *, independent: bool = False) -> list[_Group] | None:
    """Merge the groups of two nodes; return ``None`` if then no order computes all inputs before their use.

    Args:
        groups: In an order in which they can be computed.
        a: A node.
        b: Another one.
        independent: Return ``None`` as well if the later group needs the earlier one.
    """
    i, j = sorted(next(i for i, g in enumerate(groups) if n in g.nodes) for n in (a, b))
    first, last = groups[i], groups[j]
    if independent and last.needs(set(first.nodes)):
        return None
    before: list[_Group] = []
    after: list[_Group] = []
    dependent = set(first.nodes)
    for group in groups[i + 1 : j]:
        if group.needs(dependent):
            dependent.update(group.nodes)
            after.append(group)
        else:
            before.append(group)
    if last.needs(dependent.difference(first.nodes)):
        return None
    both = _Group([*first.nodes, *last.nodes], [*first.matmuls, *last.matmuls])
    return [*groups[:i], *before, both, *after, *groups[j + 1 :]]
