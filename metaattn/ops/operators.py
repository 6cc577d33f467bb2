"""The attention primitives as operators of :mod:`torch.library`: opaque to tracing, compilation and fake tensors.

The rules of :mod:`metaattn.ops._rules` take all derivatives, so the operators need none. Each is one node in a
``make_fx`` graph, whatever the backend does to compute it: nothing inside it can be traced, fused, or differentiated
without the rules. The names of the operators are private: only the rules call them. Passes of :mod:`metaattn.compile`
match on them, which is why this module has a public name.

An operator takes the fields of :class:`Call`, a flag if it has one, and then tensors, in the order of the structs
:class:`Operands`, :class:`ForwardWithJvpTensors`, :class:`ForwardJvpTensors` and :class:`BackwardTensors`. The schemas
are generated from the fields of these structs, and a custom function of the rules takes the same tensors in the same
order.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch.autograd import forward_ad
from torch.library import Library, register_fake

from ..autodiff import (
    SingleLevelFunction,
    apply_at_one_level,
    in_dual_level,
    is_legacy_batched,
    redispatch_below_autograd,
)
from ..backends import blockwise, select
from ..backends.base import (
    BackwardJvpInputs,
    Gradients,
    Operands,
    Problem,
    Rows,
    Tangent,
    Values,
    accumulator,
    pack_qkv,
    tokens_first,
)


@dataclass(frozen=True)
class Call:
    """The static part of one attention call: the fields of its :class:`Problem`, and the requested backend.

    Not a tuple: :mod:`torch.func` flattens arguments at every level, which would take longer.
    """

    scale: float
    left: int | None
    right: int | None
    dropout_p: float
    backend: str

    @property
    def problem(self) -> Problem:
        """The problem without the backend."""
        return Problem(self.scale, self.left, self.right, self.dropout_p)

    @property
    def flat(self) -> tuple[Any, ...]:
        """The fields, as operators take them. Not ``__iter__``: Dynamo of PyTorch 2.11 cannot unpack by that."""
        return self.scale, self.left, self.right, self.dropout_p, self.backend


# Where the fields of each struct end in a flat sequence of tensors.
_AFTER_X, _AFTER_VALUES, _AFTER_COTANGENT, _AFTER_VALUES_TANGENT, _AFTER_COTANGENT_TANGENT = accumulate(
    len(struct._fields) for struct in (Operands, Values, Rows, Rows, Rows)
)


class ForwardWithJvpTensors(NamedTuple):
    """Tensors of ``forward_with_jvp``, or one entry for each of them."""

    x: Operands
    tangent: Tangent

    @classmethod
    def unflatten(cls, entries: Sequence[Any]) -> ForwardWithJvpTensors:
        """Build the struct from a flat sequence."""
        return cls(Operands(*entries[:_AFTER_X]), Tangent(*entries[_AFTER_X:]))

    def flatten(self) -> tuple[Any, ...]:
        """Return the flat sequence."""
        return *self.x, *self.tangent


class ForwardJvpTensors(NamedTuple):
    """Tensors of ``forward_jvp`` with one tangent or more, or one entry for each of them."""

    x: Operands
    values: Values
    tangents: list[Tangent]

    @classmethod
    def unflatten(cls, entries: Sequence[Any]) -> ForwardJvpTensors:
        """Build the struct from a flat sequence."""
        x, values = Operands(*entries[:_AFTER_X]), Values(*entries[_AFTER_X:_AFTER_VALUES])
        return cls(x, values, unflatten_tangents(entries[_AFTER_VALUES:]))

    def flatten(self) -> tuple[Any, ...]:
        """Return the flat sequence."""
        return *self.x, *self.values, *flatten_tangents(self.tangents)


class BackwardTensors(NamedTuple):
    """Tensors of ``backward``, or of ``backward_jvp`` with one tangent or more, or one entry for each of them.

    Without tangents the flat sequence ends after the cotangent: ``backward`` takes the first tensors of
    ``backward_jvp``.
    """

    x: Operands
    values: Values
    cotangent: Rows
    values_tangent: Rows = Rows()
    cotangent_tangent: Rows = Rows()
    tangents: Sequence[Tangent] = ()

    @classmethod
    def unflatten(cls, entries: Sequence[Any]) -> BackwardTensors:
        """Build the struct from a flat sequence."""
        x, values = Operands(*entries[:_AFTER_X]), Values(*entries[_AFTER_X:_AFTER_VALUES])
        cotangent = Rows(*entries[_AFTER_VALUES:_AFTER_COTANGENT])
        if len(entries) == _AFTER_COTANGENT:
            return cls(x, values, cotangent)
        values_tangent = Rows(*entries[_AFTER_COTANGENT:_AFTER_VALUES_TANGENT])
        cotangent_tangent = Rows(*entries[_AFTER_VALUES_TANGENT:_AFTER_COTANGENT_TANGENT])
        tangents = unflatten_tangents(entries[_AFTER_COTANGENT_TANGENT:])
        return cls(x, values, cotangent, values_tangent, cotangent_tangent, tangents)

    def flatten(self) -> tuple[Any, ...]:
        """Return the flat sequence."""
        first = (*self.x, *self.values, *self.cotangent)
        if not self.tangents:
            return first
        return *first, *self.values_tangent, *self.cotangent_tangent, *flatten_tangents(self.tangents)

    @property
    def of_backward(self) -> BackwardTensors:
        """The tensors of ``backward`` among those of ``backward_jvp``."""
        return BackwardTensors(*self[:3])


def flatten_tangents(tangents: Iterable[Tangent]) -> tuple[Any, ...]:
    """Return the parts of all tangents in one sequence."""
    return tuple(part for t in tangents for part in t)


def unflatten_tangents(entries: Sequence[Any]) -> list[Tangent]:
    """Return the tangents that :func:`flatten_tangents` made a sequence of."""
    n = len(Tangent._fields)
    return [Tangent(*entries[i : i + n]) for i in range(0, len(entries), n)]


LIBRARY = Library("metaattn", "FRAGMENT")
_OPERATORS: set[Any] = set()


def _schema_of(struct: Any, suffix: str = "", required: Sequence[str] = ()) -> str:
    return ", ".join(f"Tensor{'' if name in required else '?'} {name}{suffix}" for name in struct._fields)


_CALL_FIELDS = len(fields(Call))
_CALL = "float scale, int? left, int? right, float dropout_p, str backend"
_X = _schema_of(Operands, required=("query", "key", "value"))
_VALUES = _schema_of(Values, required=Values._fields)
_COTANGENT = _schema_of(Rows, "_bar")
_ROW_TANGENTS = f"{_schema_of(Rows, '_t')}, {_schema_of(Rows, '_bar_t')}"
_TANGENT = _schema_of(Tangent, "_t")
# For operators of higher order only: PyTorch has no vmap rule for an operator that takes a list, even an empty one.
_TANGENTS = "Tensor?[] tangents"


def _argument_names(operator: Any) -> list[str]:
    return [argument.name for argument in operator._schema.arguments]


def split_call(args: Sequence[Any]) -> tuple[Call, Sequence[Any]]:
    """Return the call, and the arguments of an operator after its fields."""
    return Call(*args[:_CALL_FIELDS]), args[_CALL_FIELDS:]


def autocasts(device: str) -> bool:
    """Return whether autocast is on for a type of device; ``meta`` has none."""
    return device != "meta" and torch.is_autocast_enabled(device)  # Dynamo (2.11) cannot ask which devices have one


def _without_autocast(function: Callable[..., tuple[Tensor, ...]], query: int) -> Callable[..., tuple[Tensor, ...]]:
    """Turn autocast off inside an operator, so that accumulators keep their dtype; its query is argument ``query``."""

    @functools.wraps(function)
    def wrapped(*args: Any) -> tuple[Tensor, ...]:
        device = args[query].device.type
        if not autocasts(device):
            return function(*args)
        with torch.autocast(device, enabled=False):
            return function(*args)

    return wrapped


def _operator(schema: str) -> Callable[[Callable[..., tuple[Tensor, ...]]], Callable[..., tuple[Tensor, ...]]]:
    """Make a function ``name`` the operator ``metaattn::_name``.

    It is defined through the library directly: :func:`torch.library.custom_op` adds support for autograd, which takes
    a tenth of a millisecond per call and is not needed.
    """

    def register(function: Callable[..., tuple[Tensor, ...]]) -> Callable[..., tuple[Tensor, ...]]:
        name = f"_{function.__name__}"
        LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        operator = getattr(torch.ops.metaattn, name).default
        query = _argument_names(operator).index("query")
        LIBRARY.impl(name, _without_autocast(function, query), "CompositeExplicitAutograd")
        LIBRARY.impl(name, functools.partial(_reject_derivatives, operator), "Autograd", with_keyset=True)
        _OPERATORS.add(operator)
        return operator

    return register


def _reject_derivatives(operator: Any, keys: Any, *args: Any) -> tuple[Tensor, ...]:
    """Autograd kernel of an operator: raise where a derivative is requested.

    The operators in a traced graph are without the rules, and would otherwise pass for constants. The value of such a
    graph may be computed with gradients enabled: then only a backward pass raises.
    """
    tensors = [t for a in args for t in (a if isinstance(a, list) else [a]) if isinstance(t, Tensor)]
    if in_dual_level() and any(map(_has_tangent, tensors)):
        raise _no_derivative(operator)
    out: tuple[Tensor, ...] = redispatch_below_autograd(operator, keys, *args)
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        out = apply_at_one_level(_RaiseInBackward, operator, len(out), *out, *tensors)  # this kernel is of one level
    return out


class _RaiseInBackward(SingleLevelFunction):
    """Return the first tensors unchanged; raise in the backward pass."""

    @staticmethod
    def forward(operator: Any, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(t.view_as(t) for t in tensors[:count])

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.operator = inputs[0]

    @staticmethod
    def backward(ctx: Any, *_: Tensor | None) -> Any:
        raise _no_derivative(ctx.operator)


def _no_derivative(operator: Any) -> NotImplementedError:
    return NotImplementedError(
        f"{operator.name()} in a graph that was traced has no derivative: trace the derivative itself, as "
        "make_fx(torch.func.grad(f)) does, or call metaattn.sdpa"
    )


def _has_tangent(t: Tensor) -> bool:
    return forward_ad.unpack_dual(t).tangent is not None


@_operator(f"({_CALL}, {_X}) -> (Tensor, Tensor)")
def forward(*args: Any) -> tuple[Tensor, Tensor]:
    """Return out and lse."""
    call, tensors = split_call(args)
    x = Operands(*tensors)
    out, lse = select(call.backend, call.problem, x).forward(call.problem, x)
    return _laid_out(out, x.query), lse.contiguous()


@_operator(f"({_CALL}, {_X}, {_TANGENT}) -> (Tensor, Tensor, Tensor, Tensor)")
def forward_with_jvp(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return out and lse, and their tangents."""
    call, tensors = split_call(args)
    x, tangent = ForwardWithJvpTensors.unflatten(tensors)
    values, values_t = select(call.backend, call.problem, x).forward_with_jvp(call.problem, x, tangent)
    return *(_laid_out(values.out, x.query), values.lse.contiguous()), *(
        _laid_out(values_t.out, x.query),
        values_t.lse.contiguous(),
    )


@_operator(f"({_CALL}, {_X}, {_VALUES}, {_TANGENT}) -> (Tensor, Tensor)")
def forward_jvp(*args: Any) -> tuple[Tensor, Tensor]:
    """Return the tangents of out and lse."""
    call, tensors = split_call(args)
    x, values, (tangent,) = ForwardJvpTensors.unflatten(tensors)
    out_t, lse_t = select(call.backend, call.problem, x).forward_jvp(call.problem, x, values, tangent)
    return _laid_out(out_t, x.query), lse_t.contiguous()


@_operator(f"({_CALL}, {_X}, {_VALUES}, {_TANGENTS}) -> (Tensor, Tensor)")
def forward_jvp_higher(*args: Any) -> tuple[Tensor, Tensor]:
    """Return the derivative of out and lse along several tangents; ``blockwise`` computes it for every backend."""
    call, (*tensors, tangents) = split_call(args)
    x, values, all_tangents = ForwardJvpTensors.unflatten((*tensors, *tangents))
    out_t, lse_t = blockwise.directional(call.problem, x, values, all_tangents)
    return _laid_out(out_t, x.query), lse_t.contiguous()


@_operator(f"({_CALL}, bool bias_grad, {_X}, {_VALUES}, {_COTANGENT}) -> (Tensor, Tensor, Tensor, Tensor)")
def backward(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of query, key, value and bias (empty unless ``bias_grad``)."""
    call, (bias_grad, *tensors) = split_call(args)
    return _contiguous(_backward(call, call.problem, BackwardTensors.unflatten(tensors), bias_grad))


@_operator(
    f"({_CALL}, bool bias_grad, {_X}, {_VALUES}, {_COTANGENT}, {_ROW_TANGENTS}, {_TANGENT})"
    " -> (Tensor, Tensor, Tensor, Tensor)"
)
def backward_jvp(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the tangents of the gradients, in the form of :func:`backward`."""
    call, (bias_grad, *tensors) = split_call(args)
    return _contiguous(_backward_jvp(call, call.problem, BackwardTensors.unflatten(tensors), bias_grad))


@_operator(
    f"({_CALL}, bool bias_grad, {_X}, {_VALUES}, {_COTANGENT}, {_ROW_TANGENTS}, {_TANGENTS})"
    " -> (Tensor, Tensor, Tensor, Tensor)"
)
def backward_jvp_higher(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the derivative of the gradients along several tangents; ``blockwise`` computes it for every backend."""
    call, (bias_grad, *tensors, tangents) = split_call(args)
    t = BackwardTensors.unflatten((*tensors, *tangents))
    return _contiguous(
        blockwise.gradient(
            call.problem,
            t.x,
            t.values,
            t.cotangent,
            t.tangents,
            cotangent_tangent=t.cotangent_tangent,
            bias_grad=bias_grad,
        )
    )


@_operator(
    f"({_CALL}, bool bias_grad, {_X}, {_VALUES}, {_COTANGENT}, {_ROW_TANGENTS}, {_TANGENT})"
    f" -> ({', '.join(['Tensor'] * 8)})"
)
def backward_with_jvp(*args: Any) -> tuple[Tensor, ...]:
    """Return the gradients, in the form of :func:`backward`, and then their tangents."""
    call, (bias_grad, *tensors) = split_call(args)
    first, second = _backward_with_jvp(call, call.problem, BackwardTensors.unflatten(tensors), bias_grad)
    return *_contiguous(first), *_contiguous(second)


@_operator(f"({_CALL}, bool both, {_X}, {_VALUES}, {_COTANGENT}, {_ROW_TANGENTS}, {_TANGENT}) -> Tensor[]")
def backward_packed(*args: Any) -> tuple[Tensor, ...]:
    """Return gradients of query, key and value packed into one tensor, without a gradient of the bias.

    With ``both``, these are the gradients and their tangents, as of :func:`backward_with_jvp`; otherwise the gradients
    if the tangent is absent, as of :func:`backward`, or their tangents, as of :func:`backward_jvp`.
    """
    call, (both, *tensors) = split_call(args)
    problem, t = replace(call.problem, pack_qkv_gradients=True), BackwardTensors.unflatten(tensors)
    if both:
        gradients: Sequence[Gradients] = _backward_with_jvp(call, problem, t, False)
    else:
        run = _backward if t.tangents[0].is_zero else _backward_jvp
        gradients = (run(call, problem, t, False),)
    return tuple(pack_qkv(g[:3]) for g in gradients)


def packed_arguments(operator: Any, args: Sequence[Any]) -> tuple[Any, ...] | None:
    """Return the arguments of :func:`backward_packed` for a call of another operator, or ``None`` if there are none.

    Args:
        operator: ``backward``, ``backward_jvp`` or ``backward_with_jvp``.
        args: Its arguments: values, or nodes of a graph.
    """
    arguments = dict(zip(_argument_names(operator), args, strict=True))
    if arguments.pop("bias_grad"):
        return None
    arguments["both"] = operator is backward_with_jvp
    return tuple(arguments.get(name) for name in _argument_names(backward_packed))


def _backward(call: Call, problem: Problem, t: BackwardTensors, bias_grad: bool) -> Gradients:
    backend = select(call.backend, problem, t.x)
    return backend.backward(problem, t.x, t.values, t.cotangent, bias_grad=bias_grad)


def _backward_jvp(call: Call, problem: Problem, t: BackwardTensors, bias_grad: bool) -> Gradients:
    return select(call.backend, problem, t.x).backward_jvp(problem, t.x, _backward_jvp_inputs(t, bias_grad))


def _backward_with_jvp(
    call: Call, problem: Problem, t: BackwardTensors, bias_grad: bool
) -> tuple[Gradients, Gradients]:
    return select(call.backend, problem, t.x).backward_with_jvp(problem, t.x, _backward_jvp_inputs(t, bias_grad))


def _backward_jvp_inputs(t: BackwardTensors, bias_grad: bool) -> BackwardJvpInputs:
    (tangent,) = t.tangents
    return BackwardJvpInputs(t.values, t.values_tangent, t.cotangent, tangent, t.cotangent_tangent, bias_grad)


def forward_jvp_any_order(call: Call, t: ForwardJvpTensors) -> tuple[Tensor, ...]:
    """Run ``forward_jvp``, or ``forward_jvp_higher`` if there are several tangents."""
    if len(t.tangents) == 1:
        return forward_jvp(*call.flat, *t.flatten())
    tangents = flatten_tangents(t.tangents)
    _check_not_legacy_batched(tangents)
    return forward_jvp_higher(*call.flat, *t.x, *t.values, tangents)


def backward_jvp_any_order(call: Call, bias_grad: bool, t: BackwardTensors) -> tuple[Tensor, ...]:
    """Run ``backward_jvp``, or ``backward_jvp_higher`` if there are several tangents."""
    if len(t.tangents) == 1:
        return backward_jvp(*call.flat, bias_grad, *t.flatten())
    tangents = flatten_tangents(t.tangents)
    _check_not_legacy_batched(tangents)
    rows = (*t.cotangent, *t.values_tangent, *t.cotangent_tangent)
    return backward_jvp_higher(*call.flat, bias_grad, *t.x, *t.values, *rows, tangents)


def _check_not_legacy_batched(tangents: Sequence[Tensor | None]) -> None:
    """Check that no tangent is mapped by the vmap of ``is_grads_batched``: it maps no operator that takes a list."""
    if any(t is not None and is_legacy_batched(t) for t in tangents):
        raise NotImplementedError(
            "is_grads_batched and vectorize=True are supported up to second order; take further derivatives by "
            "torch.func (jacrev, jacfwd, hessian, vmap)"
        )


def _laid_out(out: Tensor, query: Tensor) -> Tensor:
    """Return a tensor without gaps, in the memory order of the query: see :func:`tokens_first`."""
    return out.transpose(-2, -3).contiguous().transpose(-2, -3) if tokens_first(query) else out.contiguous()


def _contiguous(grads: Gradients) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    query, key, value, bias = grads
    bias = query.new_empty(0) if bias is None else bias
    return query.contiguous(), key.contiguous(), value.contiguous(), bias.contiguous()


def is_attention_op(node: fx.Node) -> bool:
    """Return whether a node of a graph is one of these operators."""
    return node.target in _OPERATORS


def _like(t: Tensor, *, shape: Sequence[Any] | None = None, dtype: torch.dtype | None = None) -> Tensor:
    return t.new_empty(t.shape if shape is None else tuple(shape), dtype=dtype)


def _new_rows(x: Operands) -> tuple[Tensor, Tensor]:
    q, v = x.query, x.value
    out = _laid_out(_like(q, shape=(*q.shape[:-1], v.shape[-1])), q)
    return out, _like(q, shape=q.shape[:-1], dtype=accumulator(q.dtype))


def _new_gradients(x: Operands, bias_grad: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    bias = _like(x.bias) if bias_grad and x.bias is not None else _like(x.query, shape=(0,))
    return _like(x.query), _like(x.key), _like(x.value), bias


# Implementations on fake tensors. Each result is a separate tensor: a tracer tells results apart by identity, and would
# take two results that are one tensor for the last of them.


@register_fake("metaattn::_forward", lib=LIBRARY)
@register_fake("metaattn::_forward_jvp", lib=LIBRARY)
@register_fake("metaattn::_forward_jvp_higher", lib=LIBRARY)
def _(*args: Any) -> tuple[Tensor, Tensor]:
    return _new_rows(Operands(*args[_CALL_FIELDS:][:_AFTER_X]))


@register_fake("metaattn::_forward_with_jvp", lib=LIBRARY)
def _(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, _ = ForwardWithJvpTensors.unflatten(args[_CALL_FIELDS:])
    return *_new_rows(x), *_new_rows(x)


@register_fake("metaattn::_backward", lib=LIBRARY)
@register_fake("metaattn::_backward_jvp", lib=LIBRARY)
@register_fake("metaattn::_backward_jvp_higher", lib=LIBRARY)
def _(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    bias_grad, *tensors = args[_CALL_FIELDS:]
    x = Operands(*tensors[:_AFTER_X])
    return _new_gradients(x, bias_grad)


@register_fake("metaattn::_backward_with_jvp", lib=LIBRARY)
def _(*args: Any) -> tuple[Tensor, ...]:
    bias_grad, *tensors = args[_CALL_FIELDS:]
    x = Operands(*tensors[:_AFTER_X])
    return *_new_gradients(x, bias_grad), *_new_gradients(x, bias_grad)


@register_fake("metaattn::_backward_packed", lib=LIBRARY)
def _(*args: Any) -> list[Tensor]:
    both, *tensors = args[_CALL_FIELDS:]
    x = Operands(*tensors[:_AFTER_X])
    q, heads = x.query, sum(t.shape[-3] for t in (x.query, x.key, x.value))
    return [_like(q, shape=(*q.shape[:-3], q.shape[-2], heads, q.shape[-1])) for _ in range(1 + both)]
