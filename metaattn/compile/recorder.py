"""Recorder of a function as the graph of the operations that it runs on given tensors.

It does what ``make_fx`` does, with three differences. Closed-over tensors become inputs of the graph, not constants.
What a graph could not repeat is an error: random numbers, shapes and branches that depend on numbers, changes of
tensors that the function did not make. And recomputed values stay apart from the originals when equal operations are
merged.

Operations are recorded below autograd and all transforms, on fake tensors, so that recording takes no memory.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.weak import WeakTensorKeyDictionary

from ..autodiff import Tensors, tensor_spec
from .inductor import decompose, fake_tensor_mode, merge_common_subexpressions

aten = torch.ops.aten
_LIFTS = (aten.lift_fresh.default, aten.lift_fresh_copy.default)
_VIEWS = tuple(getattr(aten, name).default for name in ("alias", "detach", "expand", "view", "_unsafe_view"))
# Operations that a graph could not repeat, by their tag, with the end of the sentence that says why.
_UNRECORDABLE = {
    torch.Tag.nondeterministic_seeded: "draws random numbers ({}), which would not be those of an eager run",
    torch.Tag.data_dependent_output: "depends on a tensor's numbers in Python ({})",
    torch.Tag.dynamic_output_shape: "makes a tensor whose shape depends on numbers ({})",
}


class UnrecordableError(Exception):
    """No graph would do what the function does. The message is the end of a sentence about the function."""


class Recording:
    """Graph of a function on given tensors.

    Args:
        function: Takes the tensors and returns a tuple of tensors.
        inputs: The tensors; their numbers do not matter.

    Attributes:
        graph: Takes the inputs and then ``captured``, returns a tuple. The ``meta`` of an operation holds the
            ``shapes`` of its tensor arguments and, if it returns one tensor, that as a fake ``result``. The ``meta`` of
            an input, and of one of several results, holds its ``spec``.
        captured: Tensors that the function uses without being given them, themselves and not copies.
        outputs: Fake tensors, the function's result.
        functional: True if no operation of the graph changes a tensor in place.

    Raises:
        UnrecordableError: The function does something that a graph could not repeat.
    """

    def __init__(self, function: Callable[..., Tensors], inputs: Sequence[Tensor]) -> None:
        with fake_tensor_mode() as fake_mode:
            inputs = [fake_mode.from_tensor(t, static_shapes=True) for t in inputs]
            recorder = _Recorder(inputs)
            with recorder:
                outputs = function(*inputs)
        recorder.graph.output(tuple(recorder.node(t) for t in outputs))
        recorder.graph.eliminate_dead_code()
        self.outputs, self.captured, self.functional = outputs, recorder.captured, recorder.functional
        # Around a change in place, two equal operations may see different numbers.
        self.graph = merge_common_subexpressions(recorder.graph) if self.functional else recorder.graph
        for node in self.graph.find_nodes(op="call_function", target=_isolated):
            node.replace_all_uses_with(node.args[0])
        self.graph.eliminate_dead_code()


def _isolated(x: Tensor, number: int) -> Tensor:
    """Mark an alias until equal operations are merged: operations on differently numbered aliases are not equal."""
    return x


class _Recorder(TorchDispatchMode):
    def __init__(self, inputs: Sequence[Tensor]) -> None:
        super().__init__()
        self.graph = fx.Graph()
        self.captured: list[Tensor] = []
        self.functional = True
        self._nodes = WeakTensorKeyDictionary()
        self._input_storages = {_storage(t) for t in inputs}
        self._last_placeholder: fx.Node | None = None
        self._placeholder_count = self._isolation_count = 0
        for t in inputs:
            self._add_placeholder(t)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self._check(func, args)
        out_of_place = self._out_of_place(func, args) if func._schema.is_mutable else None
        decomposed = self._decompose(out_of_place or func, args, kwargs)
        if decomposed is not NotImplemented and out_of_place is None:
            return decomposed
        if func in _LIFTS:
            self._capture(args[0])  # a literal: Python makes its tensor where no mode sees it
        node_args, node_kwargs = tree_map_only(Tensor, self.node, (tuple(args), kwargs))
        out = func(*args, **kwargs)
        if out_of_place is not None:
            if decomposed is NotImplemented:
                node = self.graph.call_function(out_of_place, node_args, node_kwargs)
                node.meta["result"] = out
            else:
                node = self.node(decomposed)
            self._nodes[args[0]] = self._nodes[out] = node
            return out
        if func in _VIEWS and out.shape == args[0].shape and out.stride() == args[0].stride():
            self._nodes[out] = self.node(args[0])  # a view that changes nothing
            return out
        if func._schema.is_mutable:
            self.functional = False
        node = self.graph.call_function(func, node_args, node_kwargs)
        node.meta["shapes"] = [t.shape for t in args if isinstance(t, Tensor)]
        if isinstance(out, Tensor):
            node.meta["result"] = out
            self._nodes[out] = node
        elif isinstance(out, (tuple, list)):
            for i, t in enumerate(out):
                if isinstance(t, Tensor):
                    self._nodes[t] = item = self.graph.call_function(operator.getitem, (node, i))
                    item.meta["spec"] = tensor_spec(t)
        return out

    def _decompose(self, func: Any, args: Any, kwargs: Any) -> Any:
        if func not in _DECOMPOSITIONS or kwargs:
            return NotImplemented
        with self:
            return _DECOMPOSITIONS[func](*args)

    def node(self, t: Tensor) -> fx.Node:
        """Return the node of a tensor. A tensor that neither an operation made nor the caller gave is captured."""
        if t not in self._nodes:
            self._capture(t)
        node: fx.Node = self._nodes[t]
        return node

    def isolate(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """See :func:`metaattn.autodiff._executor.isolate`."""
        self._isolation_count += 1
        aliases = []
        for t in tensors:
            aliases.append(t.view_as(t))
            self._nodes[aliases[-1]] = self.graph.call_function(_isolated, (self.node(t), self._isolation_count))
        return aliases

    def _capture(self, t: Tensor) -> None:
        self._add_placeholder(t)
        self.captured.append(t)
        self._input_storages.add(_storage(t))

    def _add_placeholder(self, t: Tensor) -> None:
        last = self._last_placeholder
        with self.graph.inserting_after(last) if last else self.graph.inserting_before():
            self._last_placeholder = self._nodes[t] = self.graph.placeholder(f"x{self._placeholder_count}")
        self._last_placeholder.meta["spec"] = tensor_spec(t)
        self._placeholder_count += 1

    def _check(self, func: Any, args: Any) -> None:
        for tag, reason in _UNRECORDABLE.items():
            if tag in func.tags and not _is_indexing_by_position(func, args):
                raise UnrecordableError(reason.format(func))
        if func._schema.is_mutable:
            for argument, a in zip(func._schema.arguments, args, strict=False):
                written = argument.alias_info is not None and argument.alias_info.is_write
                if written and isinstance(a, Tensor) and (a not in self._nodes or _storage(a) in self._input_storages):
                    raise UnrecordableError(f"changes in place a tensor that it did not make ({func})")

    def _out_of_place(self, func: Any, args: Any) -> Any:
        """Return the operation that makes a new tensor of what ``func`` writes into its first argument.

        ``None`` if the new tensor might have another dtype or other strides, or if a tensor that is still alive shares
        the memory that is written.
        """
        packet = getattr(aten, str(func.overloadpacket).removeprefix("aten.").removesuffix("_"), None)
        new = getattr(packet, func._overloadname, None)
        if new is None or new._schema.is_mutable or not args or not isinstance(args[0], Tensor):
            return None
        written, *others = args
        # A decomposition takes no other tensors than indices.
        same_dtype = new in _DECOMPOSITIONS or all(t.dtype == written.dtype for t in others if isinstance(t, Tensor))
        if not same_dtype or not written.is_contiguous():
            return None
        storage = _storage(written)
        return None if any(t is not written and _storage(t) == storage for t in self._nodes) else new


def _storage(t: Tensor) -> int:
    return t.untyped_storage()._cdata


def _is_indexing_by_position(func: Any, args: Any) -> bool:
    """Return whether an operation indexes by positions: then its result has a known shape, unlike that of a mask."""
    if func is not aten.index.Tensor:
        return False
    return all(i is None or i.dtype not in (torch.bool, torch.uint8) for i in args[1])


def _scatter(x: Tensor, dim: int, index: Tensor, value: float) -> Tensor:
    """Put a number at one place of each row, as in the derivative of a cross-entropy, by a choice, which fuses.

    Inductor makes such a choice too, where ``x`` is a constant, but of float32: that rounds a number of float64, and
    before PyTorch 2.13 the result stays float32 where ``x`` has 16 bits. As a kernel of Inductor's for CPUs (2.11), the
    scatter ran before the operation that writes ``x``.
    """
    row = [n if i == dim % x.ndim else 1 for i, n in enumerate(x.shape)]
    if not row or [n * m for n, m in zip(index.shape, row, strict=True)] != list(x.shape):
        return NotImplemented
    places = torch.arange(x.shape[dim], device=x.device).view(row)
    return torch.where(index == places, torch.full((), value, dtype=x.dtype, device=x.device), x)


# Operations that are recorded as others. The losses are those that Inductor would make a scatter of.
_DECOMPOSITIONS: dict[Any, Callable[..., Any]] = {
    aten.scatter.value: _scatter,
    **{
        op: functools.partial(decompose, op)
        for op in (aten.nll_loss_backward.default, aten.nll_loss2d_backward.default)
    },
}
