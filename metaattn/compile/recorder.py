"""A function as the graph of the operations that it runs on given tensors.

What ``make_fx`` does, and less: it records below autograd and all transforms, without stacks and symbols, in less time;
and it refuses what a graph could not repeat. On fake tensors: what runs only to be recorded takes no memory.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._functorch.compile_utils import fx_graph_cse
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.weak import WeakTensorKeyDictionary

from ..autodiff import Tensors, tensor_spec

_LIFTS = (torch.ops.aten.lift_fresh.default, torch.ops.aten.lift_fresh_copy.default)
_VIEWS = tuple(getattr(torch.ops.aten, name).default for name in ("alias", "detach", "expand", "view", "_unsafe_view"))
# By tag, what an operation would be recorded without.
_REFUSED = {
    torch.Tag.nondeterministic_seeded: "draws random numbers ({}), which would not be those of an eager run",
    torch.Tag.data_dependent_output: "depends on a tensor's numbers in Python ({})",
    torch.Tag.dynamic_output_shape: "makes a tensor whose shape depends on numbers ({})",
}


class UnrecordableError(Exception):
    """No graph would do what the function does: why, as the end of a sentence."""


class Recording:
    """A function's graph on given tensors.

    Attributes:
        graph: Takes the inputs and then the tensors ``found``, returns a tuple. An operation has in its ``meta`` the
            ``shapes`` of what it is given, and if that is one tensor its ``result``, a fake one; what is given, or one
            of several results, has its ``form``.
        found: Tensors that the function uses and was not given: as they are, not copies.
    """

    def __init__(self, function: Callable[..., Tensors], inputs: Sequence[Tensor]) -> None:
        with FakeTensorMode(allow_non_fake_inputs=True) as without_memory:
            inputs = [without_memory.from_tensor(t, static_shapes=True) for t in inputs]
            recorder = _Recorder(inputs)
            with recorder:
                outputs = function(*inputs)
        recorder.graph.output(tuple(recorder.node(t) for t in outputs))
        recorder.graph.eliminate_dead_code()
        self.outputs, self.found, self.functional = outputs, recorder.found, recorder.functional
        if self.functional:  # else two equal calls may see different numbers
            self.graph = fx_graph_cse(recorder.graph)
        else:
            self.graph = recorder.graph
        for node in self.graph.find_nodes(op="call_function", target=_isolated):
            node.replace_all_uses_with(node.args[0])
        self.graph.eliminate_dead_code()


def _isolated(x: Tensor, number: int) -> Tensor:
    """In a graph until equal operations are merged: those on differently numbered results are not equal."""
    return x


class _Recorder(TorchDispatchMode):
    def __init__(self, inputs: Sequence[Tensor]) -> None:
        super().__init__()
        self.graph = fx.Graph()
        self.found: list[Tensor] = []
        self.functional = True
        self._nodes = WeakTensorKeyDictionary()
        self._given = {_storage(t) for t in inputs}
        self._last: fx.Node | None = None
        self._count = self._number = 0
        for t in inputs:
            self._place(t)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self._check(func, args)
        if func in _LIFTS:
            # A literal of Python's: its tensor is made where no mode sees it.
            self._place(args[0], found=True)
        node_args, node_kwargs = tree_map_only(Tensor, self.node, (tuple(args), kwargs))
        elsewhere = self._functional_of(func, args) if func._schema.is_mutable else None
        out = func(*args, **kwargs)
        if elsewhere is not None:
            node = self.graph.call_function(elsewhere, node_args, node_kwargs)
            node.meta["result"] = out
            self._nodes[args[0]] = self._nodes[out] = node
            return out
        if func in _VIEWS and out.shape == args[0].shape and out.stride() == args[0].stride():
            self._nodes[out] = self.node(args[0])  # the same view again
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
                    item.meta["form"] = tensor_spec(t)
        return out

    def node(self, t: Tensor) -> fx.Node:
        """The node of a tensor; one that no operation made is found now."""
        if t not in self._nodes:
            self._place(t, found=True)
        node: fx.Node = self._nodes[t]
        return node

    def isolate(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """See :func:`metaattn.autodiff.isolate`."""
        self._number += 1
        out = []
        for t in tensors:
            out.append(t.view_as(t))
            self._nodes[out[-1]] = self.graph.call_function(_isolated, (self.node(t), self._number))
        return out

    def _place(self, t: Tensor, found: bool = False) -> None:
        at = self.graph.inserting_after(self._last) if self._last else self.graph.inserting_before()
        with at:
            self._last = self._nodes[t] = self.graph.placeholder(f"x{self._count}")
        self._last.meta["form"] = tensor_spec(t)
        self._count += 1
        if found:
            self.found.append(t)
            self._given.add(_storage(t))

    def _check(self, func: Any, args: Any) -> None:
        for tag, reason in _REFUSED.items():
            if tag in func.tags and not _plain_index(func, args):
                raise UnrecordableError(reason.format(func))
        if func._schema.is_mutable:
            for argument, a in zip(func._schema.arguments, args, strict=False):
                written = argument.alias_info is not None and argument.alias_info.is_write
                if written and isinstance(a, Tensor) and (a not in self._nodes or _storage(a) in self._given):
                    raise UnrecordableError(f"changes in place a tensor that it did not make ({func})")

    def _functional_of(self, func: Any, args: Any) -> Any:
        """What makes as a new tensor what an operation makes of its first argument in place.

        ``None`` if its dtype or strides may be others, or if a tensor that is still there shares the memory.
        """
        packet = getattr(torch.ops.aten, str(func.overloadpacket).removeprefix("aten.").removesuffix("_"), None)
        new = getattr(packet, func._overloadname, None)
        if new is None or new._schema.is_mutable or not args or not isinstance(args[0], Tensor):
            return None
        written, *others = args
        alike = all(t.dtype == written.dtype for t in others if isinstance(t, Tensor))
        if not alike or not written.is_contiguous():
            return None
        storage = _storage(written)
        return None if any(t is not written and _storage(t) == storage for t in self._nodes) else new


def _storage(t: Tensor) -> int:
    return t.untyped_storage()._cdata


def _plain_index(func: Any, args: Any) -> bool:
    """Whether it is an indexing by positions, whose shape is known."""
    if func is not torch.ops.aten.index.Tensor:
        return False
    return all(i is None or i.dtype not in (torch.bool, torch.uint8) for i in args[1])
