"""Recorded graphs, split at the attention operators and compiled piece by piece.

An attention operator is a kernel that nothing fuses with. The piece between two of them is the same in each layer but
the first and the last, and equal pieces are compiled once: the time to compile does not grow with the depth.
"""

from __future__ import annotations

import contextlib
import operator
import threading
from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor, fx

from ..autodiff import Tensors, TensorSpec, ambient_settings, tensor_spec, without_autocast
from ..ops.operators import is_attention_op
from .inductor import CompiledPiece, PieceCompiler
from .passes.matmul_fusion import fuse_matmuls
from .passes.qkv_grad_packing import pack_qkv_gradients
from .passes.rematerialize import recomputed_inputs
from .precompile import Piece, Precompiler
from .recorder import Recording

_Values = dict[fx.Node, Tensor]
_Step = Callable[[_Values], None]  # takes its inputs from the values, and adds its outputs
_compiling = threading.RLock()  # one piece at a time, in this process


def as_recorded(module: fx.GraphModule, inputs: Sequence[Tensor] = ()) -> CompiledPiece:
    """Run a piece operation by operation: a :data:`PieceCompiler` that compiles nothing."""
    return lambda tensors: module(*tensors)


class PiecewiseFunction:
    """A recorded graph as a function of the tensors that it takes.

    Args:
        recording: The graph.
        compile_piece: Called once for each piece and kind of inputs, when the piece first runs.
        compiled_pieces: Compiled pieces by their key; those of this function are added.
        precompiler: Compiles pieces in other processes before they first run, if given.
    """

    def __init__(
        self,
        recording: Recording,
        compile_piece: PieceCompiler,
        compiled_pieces: dict[Hashable, CompiledPiece],
        precompiler: Precompiler | None = None,
    ) -> None:
        self._compile_piece, self._compiled_pieces, self._precompiler = compile_piece, compiled_pieces, precompiler
        self._settings = ambient_settings()
        graph = pack_qkv_gradients(fuse_matmuls(recording.graph)) if recording.functional else recording.graph
        nodes = list(graph.nodes)
        self._inputs = [n for n in nodes if n.op == "placeholder"]
        self._outputs: tuple[fx.Node, ...] = nodes[-1].args[0]
        operations = [n for n in nodes if n.op == "call_function"]
        # Changes in place must stay in their order: such a graph is one piece, and runs without passes.
        pieces = _split(operations) if recording.functional else [operations] if operations else []
        needed, steps = set(self._outputs), list[_Step]()
        self._expected: dict[Hashable, Piece] = {}
        for piece in reversed(pieces):
            outputs = [n for n in piece if n in needed]
            is_attention = recording.functional and is_attention_op(piece[0])
            if not is_attention:
                piece = [*recomputed_inputs(piece, needed), *piece]
            inputs = {a for n in piece for a in n.all_input_nodes}.difference(piece)
            last_used = inputs - needed
            make = self._attention_step if is_attention else self._compiled_step
            steps.append(make(piece, outputs, last_used))
            needed |= inputs
        self._steps = steps[::-1]
        if precompiler is not None:
            precompiler.submit(dict(list(self._expected.items())[::-1]))

    def __call__(self, *tensors: Tensor) -> Tensors:
        """Run the graph on its inputs and captured tensors."""
        values: _Values = dict(zip(self._inputs, tensors, strict=True))
        with torch.no_grad(), without_autocast():  # operations were recorded below both
            for step in self._steps:
                step(values)
        return tuple(values[n] for n in self._outputs)

    def _attention_step(self, piece: list[fx.Node], outputs: list[fx.Node], last_used: set[fx.Node]) -> _Step:
        node = piece[0]
        results = [(item, item.args[1]) for item in outputs]

        def step(values: _Values) -> None:
            args = fx.map_arg(node.args, values.__getitem__)
            out = node.target(*args)  # type: ignore[operator]
            values.update((item, out[i]) for item, i in results)
            for used in last_used:
                del values[used]

        return step

    def _compiled_step(self, piece: list[fx.Node], outputs: list[fx.Node], last_used: set[fx.Node]) -> _Step:
        module, inputs, text = _as_module(piece, outputs)
        compiled: dict[Hashable, CompiledPiece] = {}
        specs = tuple(spec for n in inputs if (spec := _spec(n)) is not None)
        key = (self._settings, text, specs)
        if len(specs) == len(inputs) and key not in self._compiled_pieces:
            self._expected[key] = Piece(module, specs)

        def step(values: _Values) -> None:
            tensors = [values.pop(n) if n in last_used else values[n] for n in inputs]
            specs = tuple(map(tensor_spec, tensors))
            if specs not in compiled:
                compiled[specs] = self._compiled(module, tensors, (self._settings, text, specs))
            values.update(zip(outputs, compiled[specs](tensors), strict=True))

        return step

    def _compiled(self, module: fx.GraphModule, tensors: list[Tensor], key: Hashable) -> CompiledPiece:
        with _compiling:
            if key not in self._compiled_pieces:
                with contextlib.nullcontext() if self._precompiler is None else self._precompiler.compiling(key):
                    self._compiled_pieces[key] = self._compile_piece(module, tensors)
            return self._compiled_pieces[key]


def _spec(node: fx.Node) -> TensorSpec | None:
    spec: TensorSpec | None = tensor_spec(node.meta["result"]) if "result" in node.meta else node.meta.get("spec")
    return spec


def _split(operations: list[fx.Node]) -> list[list[fx.Node]]:
    """Split operations into pieces: an attention operator with its results, or all between two of them."""
    pieces: list[list[fx.Node]] = []
    of_attention: dict[fx.Node, list[fx.Node]] = {}
    between: list[fx.Node] = []
    for node in operations:
        if is_attention_op(node):
            pieces += [between, [node]]
            of_attention[node], between = pieces[-1], []
        elif node.target is operator.getitem and node.args[0] in of_attention:
            of_attention[node.args[0]].append(node)  # type: ignore[index]
        else:
            between.append(node)
    return [piece for piece in (*pieces, between) if piece]


def _as_module(piece: list[fx.Node], outputs: list[fx.Node]) -> tuple[fx.GraphModule, list[fx.Node], Hashable]:
    """Return a piece as a module, the nodes that it takes, and a key of its operations, equal for equal pieces."""
    graph, inside = fx.Graph(), set(piece)
    inputs = list(dict.fromkeys(a for n in piece for a in n.all_input_nodes if a not in inside))
    new = {n: graph.placeholder(f"x{i}") for i, n in enumerate(inputs)}
    for n in piece:
        args, kwargs = (fx.map_arg(a, new.__getitem__) for a in (n.args, n.kwargs))
        new[n] = graph.create_node(n.op, n.target, args, kwargs, name=f"t{len(new)}")  # type: ignore[arg-type]
    graph.output(tuple(new[n] for n in outputs))
    text = tuple((str(n.target), repr(n.args), repr(n.kwargs)) for n in graph.nodes)
    return fx.GraphModule(torch.nn.Module(), graph), inputs, text
