"""Products of matrices in a recorded graph, joined: fewer and larger kernels, and fewer reads.

A product whose factors both have tangents is recorded as three, with a sum of two: it becomes one operation. Two
operations that do not need each other, as the gradients of a linear layer by its input and its weight, become one as
well where they are small. The rest stay PyTorch's.
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

SMALL = 2**29  # multiplications: of larger ones each fills a GPU, and cuBLAS' kernels are better
_VALUE, _TANGENT = 1, 2  # what is asked for of a product

# Each tensor is given once, and transposes as what they are transposes of: Inductor would compute it anew for each.
LIBRARY.define(
    "_products(Tensor[] tensors, int[] places, bool[] turned, int[] wanted) -> Tensor[]",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _jobs(
    tensors: Sequence[Tensor], places: Sequence[int], turned: Sequence[bool], wanted: Sequence[int]
) -> list[Product]:
    """The products: the places of two factors for each, and of their tangents where that of the product is wanted."""
    factors = iter([tensors[i].mT if t else tensors[i] for i, t in zip(places, turned, strict=True)])
    found = []
    for w in wanted:
        a, b = next(factors), next(factors)
        a_t, b_t = (next(factors), next(factors)) if w & _TANGENT else (None, None)
        found.append(Product(a, b, a_t, b_t, value=bool(w & _VALUE)))
    return found


@torch.library.impl(LIBRARY, "_products", "CompositeExplicitAutograd")
def _(*args: Any) -> list[Tensor]:
    return multiply(_jobs(*args))


@register_fake("metaattn::_products", lib=LIBRARY)
def _(*args: Any) -> list[Tensor]:
    jobs = _jobs(*args)
    return [job.a.new_empty(*job.a.shape[:2], job.b.shape[2]) for job in jobs for _ in range(job.results)]


PRODUCTS = torch.ops.metaattn._products.default


class _Job(NamedTuple):
    """A product in the graph: its factors and perhaps their tangents; the nodes that are its value and its tangent."""

    factors: tuple[fx.Node, ...]
    value: fx.Node | None
    tangent: fx.Node | None
    size: int  # multiplications of the value

    @property
    def wanted(self) -> int:
        """For the operator."""
        return _VALUE * (self.value is not None) + _TANGENT * (self.tangent is not None)


class _Unit:
    """Nodes that are made at once: one, or the products of one operation."""

    def __init__(self, nodes: list[fx.Node], jobs: list[_Job]) -> None:
        self.nodes, self.jobs = nodes, jobs
        self.inputs = {a for n in nodes for a in n.all_input_nodes}.difference(nodes)

    def needs(self, others: set[fx.Node]) -> bool:
        """Whether it takes something of theirs."""
        return not self.inputs.isdisjoint(others)


def joined(graph: fx.Graph) -> fx.Graph:
    """The graph of a recording with products joined where that is legal and pays."""
    units = [_Unit([n], _plain(n)) for n in graph.nodes]
    for node in graph.nodes:
        units = _with_tangent(units, node)
    units = _in_pairs(units)
    new_graph, new = fx.Graph(), dict[fx.Node, fx.Node]()
    for unit in units:
        if unit.jobs and (len(unit.jobs) > 1 or unit.jobs[0].tangent is not None):
            _emit(new_graph, unit.jobs, new)
        else:
            for n in unit.nodes:
                new[n] = new_graph.node_copy(n, new.__getitem__)
    new_graph.eliminate_dead_code()
    return new_graph


def _emit(graph: fx.Graph, jobs: list[_Job], new: dict[fx.Node, fx.Node]) -> None:
    """Add an operation to a graph, and say which of its results are which nodes."""
    factors = [_untransposed(f) for job in jobs for f in job.factors]
    tensors = list(dict.fromkeys(f for f, _ in factors))
    places, turned = [tensors.index(f) for f, _ in factors], [t for _, t in factors]
    call = graph.call_function(PRODUCTS, ([new[t] for t in tensors], places, turned, [job.wanted for job in jobs]))
    results = [n for job in jobs for n in (job.value, job.tangent) if n is not None]
    for i, n in enumerate(results):
        new[n] = graph.call_function(operator.getitem, (call, i))
        new[n].meta = n.meta


def _untransposed(node: fx.Node) -> tuple[fx.Node, bool]:
    """What a factor is the transpose of, and that it is one; or itself."""
    (of, *dims), transpose = (node.args or [None]), torch.ops.aten.transpose.int
    if node.target is transpose and isinstance(of, fx.Node) and sorted(map(repr, dims)) in (["1", "2"], ["-1", "-2"]):
        return of, True
    return node, False


def _factors(node: Any) -> tuple[fx.Node, fx.Node] | None:
    """Those of a product of PyTorch's that our kernel may serve; ``None`` of all else."""
    if not isinstance(node, fx.Node) or node.target is not torch.ops.aten.bmm.default:
        return None
    a, b = node.args
    assert isinstance(a, fx.Node)
    assert isinstance(b, fx.Node)
    return (a, b) if supported(node.meta["result"]) else None


def _size(product: fx.Node) -> int:
    first, second = product.meta["shapes"]
    size: int = first.numel() * second[-1]
    return size


def _plain(node: fx.Node) -> list[_Job]:
    """A product of PyTorch's as a job, if it is one."""
    factors = _factors(node)
    return [] if factors is None else [_Job(factors, node, None, _size(node))]


def _with_tangent(units: list[_Unit], node: fx.Node) -> list[_Unit]:
    """If a node is the sum of two products, these as one operation, with the product that it is the tangent of, if any.

    Of ``a_t b + a b_t``, in either order, that is ``a b``.
    """
    if node.target is not torch.ops.aten.add.Tensor or node.kwargs:
        return units
    first, second = node.args
    one, other = _factors(first), _factors(second)
    if not (isinstance(first, fx.Node) and isinstance(second, fx.Node) and one and other and first is not second):
        return units
    if len(first.users) > 1 or len(second.users) > 1 or _form(first) != _form(second):
        return units
    if not (_alone(units, first) and _alone(units, second)):
        return units  # one is the value of another tangent
    (a_t, b), (a, b_t) = one, other
    value = _product_of(a, b)
    if value is None and (value := _product_of(a_t, b_t)) is not None:
        a, b, a_t, b_t = a_t, b_t, a, b
    for term in (first, second):
        joined = _join(units, term, node)
        assert joined is not None, "nothing else needs a term"
        units = joined
    free = value is not None and value not in (first, second) and _alone(units, value)
    with_value = _join(units, value, node, apart=True) if free and value is not None else None
    units = with_value or units
    unit = next(u for u in units if node in u.nodes)
    unit.jobs = [_Job((a, b, a_t, b_t), value if with_value else None, node, _size(first))]
    return units


def _form(product: fx.Node) -> Any:
    """What two products must have in common to be added in one."""
    return product.meta["shapes"], product.meta["result"].dtype


def _alone(units: list[_Unit], node: fx.Node) -> bool:
    """Whether a node is not joined with others yet."""
    return next(u for u in units if node in u.nodes).nodes == [node]


def _product_of(a: fx.Node, b: fx.Node) -> fx.Node | None:
    """The product of two nodes, if there is one."""
    return next((n for n in a.users if _factors(n) == (a, b)), None)


def _in_pairs(units: list[_Unit]) -> list[_Unit]:
    """Small products that do not need each other and are between the same two leaves, two and two."""
    for first in [u for u in units if u.jobs]:
        if first not in units:
            continue
        for second in _following(units, first):
            if _dtype(first) != _dtype(second):
                continue
            pair = _join(units, first.nodes[0], second.nodes[0], apart=True)
            if pair is not None:
                units = pair
                break
    return units


def _following(units: list[_Unit], first: _Unit) -> list[_Unit]:
    """What a unit of small products might be joined with: the ones up to the next leaf."""
    found = []
    for unit in units[units.index(first) + 1 :] if _may_be_paired(first) else []:
        if is_attention_op(unit.nodes[0]):
            break
        if _may_be_paired(unit):
            found.append(unit)
    return found


def _dtype(unit: _Unit) -> torch.dtype:
    dtype: torch.dtype = unit.nodes[0].meta["result"].dtype
    return dtype


def _may_be_paired(unit: _Unit) -> bool:
    """Whether it is one product, and joining it costs nothing; with a tangent it is our kernel's in any case."""
    return len(unit.jobs) == 1 and (unit.jobs[0].size <= SMALL or unit.jobs[0].tangent is not None)


def _join(units: list[_Unit], a: fx.Node, b: fx.Node, *, apart: bool = False) -> list[_Unit] | None:
    """The units, in an order in which they can be made, with those of two nodes as one; ``None`` if there is none.

    Args:
        units: In an order in which they can be made.
        a: A node.
        b: Another one.
        apart: The later one must not need the earlier one.
    """
    i, j = sorted(next(i for i, u in enumerate(units) if n in u.nodes) for n in (a, b))
    first, last = units[i], units[j]
    if apart and last.needs(set(first.nodes)):
        return None
    before: list[_Unit] = []
    after: list[_Unit] = []
    made = set(first.nodes)
    for unit in units[i + 1 : j]:
        if unit.needs(made):  # of the first one
            made.update(unit.nodes)
            after.append(unit)
        else:
            before.append(unit)
    if last.needs(made.difference(first.nodes)):
        return None
    both = _Unit([*first.nodes, *last.nodes], [*first.jobs, *last.jobs])
    return [*units[:i], *before, both, *after, *units[j + 1 :]]
