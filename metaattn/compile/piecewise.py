"""A recorded graph, cut at the leaves and lowered part by part by Inductor.

A leaf is a kernel of its own, across which nothing fuses. What lies between two of them is the same in every layer but
the first and the last: it is lowered once, so that the time to compile does not grow with the depth.
"""

from __future__ import annotations

import contextlib
import inspect
import math
import operator
import warnings
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._guards import TracingContext, tracing
from torch._subclasses import FakeTensorMode
from torch.compiler import config as compiler_config
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from ..autodiff import Tensors, TensorSpec, ambient_settings, tensor_spec, without_autocast
from ..ops.operators import is_attention_op
from .passes.matmul_fusion import joined
from .passes.qkv_grad_packing import written_in_one
from .precompile import Part, Precompiler
from .recorder import Recording

DEPTH = 8  # operations in a row that are done again rather than their result kept
SMALLER = 0.6  # of a result's size is what is kept for it
_CHEAP = (torch.ops.aten._to_copy.default, torch.ops.aten.full.default)  # besides pointwise ones and views
# A part's run takes its tensors in a list, and may empty it: what nothing else holds is then freed once it was used.
Run = Callable[[list[Tensor]], Sequence[Any]]
Lower = Callable[[fx.GraphModule, Sequence[Tensor]], Run]
_Values = dict[fx.Node, Any]


# Kernels that do not need each other become one, of Inductor's own; on an H100 a small meta-step took a tenth less, and
# its first one a fifth less. Its CPU kernels have no such thing.
_ON_GPU = {"combo_kernels": True}


def inductor(options: Mapping[str, Any]) -> Lower:
    """Inductor, with settings of its own (``torch._inductor.list_options()``)."""

    def lower(module: fx.GraphModule, inputs: Sequence[Tensor]) -> Run:
        from torch._inductor.compile_fx import compile_fx  # here, for it takes a second

        # Inductor's cache on disk serves only what has symbols for shapes at hand; none is used.
        context = TracingContext(FakeTensorMode(shape_env=ShapeEnv()))
        tag = f"{compiler_config.cache_key_tag} {torch.get_default_dtype()}"  # of which PyTorch 2.11 takes no account
        with warnings.catch_warnings(), tracing(context), compiler_config.patch(cache_key_tag=tag):  # type: ignore[attr-defined]
            warnings.simplefilter("ignore")  # it warns of itself
            patches = {**(_ON_GPU if any(t.is_cuda for t in inputs) else {}), **options}
            compiled: Any = compile_fx(
                module, list(inputs), config_patches=patches, decompositions=_Decompositions(), ignore_shape_env=True
            )
        return _emptying(compiled)

    return lower


class _Decompositions(dict[Any, Callable[..., Any]]):
    """Inductor's and ours. Its cache on disk takes them by our source: functions among its own cannot be pickled."""

    def __init__(self, source: str = "") -> None:
        from torch._inductor.decomposition import select_decomp_table

        super().__init__({**select_decomp_table(), torch.ops.aten.scatter.value: _scattered})

    def __reduce__(self) -> tuple[Any, ...]:
        return _Decompositions, (inspect.getsource(_scattered),)


def _scattered(x: Tensor, dim: int, index: Tensor, value: float) -> Tensor:
    """A number at one place of each row, as in the derivative of a cross-entropy, as a choice, which fuses.

    Inductor makes such a choice too, where the rest is a constant, of float32: that rounds a number of float64, and
    before 2.13 the result stays float32 in 16 bits. Left to its kernels for a CPU (2.11), the scatter comes before the
    rest.
    """
    row = [n if i == dim % x.ndim else 1 for i, n in enumerate(x.shape)]
    if not row or [n * m for n, m in zip(index.shape, row, strict=True)] != list(x.shape):
        return NotImplemented
    at = torch.arange(x.shape[dim], device=x.device).view(row)
    return torch.where(index == at, torch.full((), value, dtype=x.dtype, device=x.device), x)


def _emptying(compiled: Any) -> Run:
    """What Inductor returns holds its arguments until it is done; a function in it empties a list of them."""
    inner = compiled
    while inner is not None:
        code = getattr(inner, "__code__", None)
        takes_one = code is not None and code.co_argcount == 1 and not code.co_flags & inspect.CO_VARARGS
        if takes_one and getattr(inner, "_boxed_call", False):
            run: Run = inner
            return run
        inner = getattr(inner, "__wrapped__", None)
    return lambda tensors: compiled(*tensors)


def as_recorded(module: fx.GraphModule, inputs: Sequence[Tensor] = ()) -> Run:
    """A part that runs operation by operation, in place of :func:`inductor`."""
    return lambda tensors: module(*tensors)


class Lowered:
    """A recording as a function of the tensors of its graph.

    Args:
        recording: What to run.
        lower: What makes a function of a module; called once for modules that are the same.
        known: What has been made before, by what it does; added to.
        ahead: What compiles parts before their turn, if anything does.
    """

    def __init__(
        self, recording: Recording, lower: Lower, known: dict[Hashable, Run], ahead: Precompiler | None = None
    ) -> None:
        self._lower, self._known, self._ahead, self._around = lower, known, ahead, ambient_settings()
        nodes = list((written_in_one(joined(recording.graph)) if recording.functional else recording.graph).nodes)
        self._given = [n for n in nodes if n.op == "placeholder"]
        self._returned: tuple[fx.Node, ...] = nodes[-1].args[0]
        groups = _cut([n for n in nodes if n.op == "call_function"], whole=not recording.functional)
        needed, parts = set(self._returned), list[Callable[[_Values], None]]()
        self._expected: dict[Hashable, Part] = {}
        for group in reversed(groups):
            made = [n for n in group if n in needed]
            of_leaf = recording.functional and is_attention_op(group[0])
            if not of_leaf:
                group = [*_again(group, needed), *group]
            outside = {a for n in group for a in n.all_input_nodes}.difference(group)
            last = outside - needed  # what nothing needs afterwards
            parts.append(self._leaf(group[0], made, last) if of_leaf else self._segment(group, made, last))
            needed |= outside
        self._parts = parts[::-1]
        if ahead is not None:
            ahead.ask(dict(list(self._expected.items())[::-1]))

    def __call__(self, *tensors: Tensor) -> Tensors:
        """Run it."""
        values: _Values = dict(zip(self._given, tensors, strict=True))
        with torch.no_grad(), without_autocast():  # which was at work above what was recorded
            for part in self._parts:
                part(values)
        return tuple(values[n] for n in self._returned)

    def _leaf(self, leaf: fx.Node, outputs: list[fx.Node], last: set[fx.Node]) -> Callable[[_Values], None]:
        places = [(item, item.args[1]) for item in outputs]

        def run(values: _Values) -> None:
            args = fx.map_arg(leaf.args, values.__getitem__)
            out = leaf.target(*args)  # type: ignore[operator]
            values.update((item, out[i]) for item, i in places)
            for node in last:
                del values[node]

        return run

    def _segment(self, group: list[fx.Node], outputs: list[fx.Node], last: set[fx.Node]) -> Callable[[_Values], None]:
        module, inputs, text = _module(group, outputs)
        chosen: dict[Hashable, Run] = {}
        forms = tuple(form for n in inputs if (form := _form(n)) is not None)
        if len(forms) == len(inputs) and (self._around, text, forms) not in self._known:
            self._expected[self._around, text, forms] = Part(module, forms)

        def run(values: _Values) -> None:
            tensors = [values.pop(n) if n in last else values[n] for n in inputs]
            form = tuple(map(tensor_spec, tensors))
            if form not in chosen:
                key = (self._around, text, form)
                if key not in self._known:
                    with self._ahead.turn(key) if self._ahead is not None else contextlib.nullcontext():
                        self._known[key] = self._lower(module, tensors)
                chosen[form] = self._known[key]
            values.update(zip(outputs, chosen[form](tensors), strict=True))

        return run


def _form(node: fx.Node) -> TensorSpec | None:
    form: TensorSpec | None = tensor_spec(node.meta["result"]) if "result" in node.meta else node.meta.get("form")
    return form


def _cut(nodes: list[fx.Node], whole: bool) -> list[list[fx.Node]]:
    """The nodes in groups, each to be run in one go: a leaf and its results, or what is between two."""
    if whole:
        return [nodes] if nodes else []
    groups: list[list[fx.Node]] = []
    of_leaf: dict[fx.Node, list[fx.Node]] = {}
    between: list[fx.Node] = []
    for node in nodes:
        if is_attention_op(node):
            groups += [between, [node]]
            of_leaf[node], between = groups[-1], []
        elif node.target is operator.getitem and node.args[0] in of_leaf:
            of_leaf[node.args[0]].append(node)  # type: ignore[index]
        else:
            between.append(node)
    return [g for g in (*groups, between) if g]


def _again(group: list[fx.Node], alive: set[fx.Node]) -> list[fx.Node]:
    """What a group from outside had better compute again: results of cheap operations on what it takes anyway.

    Or on what is smaller and kept in its place: a token in 16 bits and its mean, say, for its deviation in float32. So
    less is kept and read. (Triton 3.6 does not compile a kernel that both stores and uses three powers of a norm's
    deviation.) But of what is at hand, ``alive`` for a later group or given, and is not taken, a result is kept: it
    would be written again to be read.
    """
    outside = {a for n in group for a in n.all_input_nodes}.difference(group)

    def chain(node: fx.Node, most: int, room: int) -> tuple[set[fx.Node], set[fx.Node]] | None:
        """The cheap operations, at most so many in a row, that make a node of other ones, and these; or ``None``."""
        if most == 0 or not _is_cheap(node):
            return None
        made: set[fx.Node] = {node}
        of: set[fx.Node] = set()
        for a in node.all_input_nodes:
            if _at_hand(a, outside | alive) or _kept_bytes(a) <= room:
                of.add(a)
                continue
            before = chain(a, most - 1, room)
            if before is None:
                return None
            made |= before[0]
            of |= before[1]
        return made, of

    again: set[fx.Node] = set()
    for node in outside - alive:
        size = node.meta["result"].nbytes if "result" in node.meta else 0
        found = chain(node, DEPTH, size // 2)
        if found is None:
            continue
        made, of = found
        kept = sum(_kept_bytes(a) for a in of if not _at_hand(a, outside | alive))
        smaller = 0 < kept <= SMALLER * size
        if smaller or (kept == 0 and (not of or not of.isdisjoint(outside))):
            again |= made
    return sorted(again)


def _kept_bytes(node: fx.Node) -> float:
    """What keeping a value takes: a view keeps all of what it is a view of."""
    size: float = node.meta["result"].untyped_storage().nbytes() if "result" in node.meta else math.inf
    return size


def _at_hand(node: fx.Node, values: set[fx.Node]) -> bool:
    return node.op == "placeholder" or node in values


def _is_cheap(node: fx.Node) -> bool:
    target = node.target
    return isinstance(target, torch._ops.OpOverload) and (
        target.is_view or torch.Tag.pointwise in target.tags or target in _CHEAP
    )


def _module(group: list[fx.Node], outputs: list[fx.Node]) -> tuple[fx.GraphModule, list[fx.Node], Hashable]:
    """A group as a module; the values that it takes; and what it does, in a form equal for equal modules."""
    graph = fx.Graph()
    inputs = list(dict.fromkeys(a for n in group for a in n.all_input_nodes if a not in set(group)))
    new = {n: graph.placeholder(f"x{i}") for i, n in enumerate(inputs)}
    for n in group:
        args, kwargs = (fx.map_arg(a, new.__getitem__) for a in (n.args, n.kwargs))
        new[n] = graph.create_node(n.op, n.target, args, kwargs, name=f"t{len(new)}")  # type: ignore[arg-type]
    graph.output(tuple(new[n] for n in outputs))
    text = tuple((str(n.target), repr(n.args), repr(n.kwargs)) for n in graph.nodes)
    return fx.GraphModule(torch.nn.Module(), graph), inputs, text
