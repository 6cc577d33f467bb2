"""The primitives as opaque operators: what tracing, compiling and fake tensors see of a backend.

Below the rules there is no derivative left to take, so a leaf needs no autograd: it is one node in a
``make_fx`` graph, however a backend computes it, and nothing inside it can be traced apart, folded away
or differentiated past the rules. The names are private: only :mod:`metaattn.ops._rules` calls them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction
from torch.library import Library, register_fake

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
    pack_qkv_gradients,
    tokens_first,
)


@dataclass(frozen=True)
class Call:
    """The static part of one attention call: the problem, flat, and the backend asked for.

    No tuple: :mod:`torch.func` takes arguments apart at every level, and time grows with what there is to take.
    """

    scale: float
    left: int | None
    right: int | None
    dropout_p: float
    backend: str

    @property
    def problem(self) -> Problem:
        """The problem alone."""
        return Problem(self.scale, self.left, self.right, self.dropout_p)

    @property
    def flat(self) -> tuple[Any, ...]:
        """As the operators take it. No ``__iter__``: Dynamo of torch 2.11 cannot unpack an object by its own."""
        return self.scale, self.left, self.right, self.dropout_p, self.backend


def unflatten(flat: Sequence[Tensor | None]) -> list[Tangent]:
    return [Tangent(*flat[i : i + 4]) for i in range(0, len(flat), 4)]


LIBRARY = Library("metaattn", "FRAGMENT")
_OPERATORS: set[Any] = set()
_CALL = "float scale, int? left, int? right, float dropout_p, str backend"
_X = "Tensor query, Tensor key, Tensor value, Tensor? bias, Tensor? mask, Tensor? seeds"
_ROWS = (
    "Tensor out, Tensor lse, Tensor? out_t, Tensor? lse_t, "
    "Tensor? out_bar, Tensor? lse_bar, Tensor? out_bar_t, Tensor? lse_bar_t"
)
_TANGENT = "Tensor? query_t, Tensor? key_t, Tensor? value_t, Tensor? bias_t"
# Alone where there are several: PyTorch maps no operator that takes a list, be it empty.
_TANGENTS = "Tensor?[] tangents"


def _split(args: Sequence[Any]) -> tuple[Call, Problem, Operands, Sequence[Any]]:
    """The call, its problem, the operands and the arguments after them."""
    call = Call(*args[:5])
    return call, call.problem, Operands(*args[5:11]), args[11:]


def autocasts(device: str) -> bool:
    """Whether autocast is on for a type of device; meta has none."""
    return device != "meta" and torch.is_autocast_enabled(device)  # Dynamo (2.11) cannot ask which devices have one


def _own_precision(leaf: Callable[..., tuple[Tensor, ...]]) -> Callable[..., tuple[Tensor, ...]]:
    """Autocast ends here: inside, accumulators stay wide."""

    @functools.wraps(leaf)
    def wrapped(*args: Any) -> tuple[Tensor, ...]:
        device = args[5].device.type
        if not autocasts(device):
            return leaf(*args)
        with torch.autocast(device, enabled=False):
            return leaf(*args)

    return wrapped


def _leaf(schema: str) -> Callable[[Callable[..., tuple[Tensor, ...]]], Callable[..., tuple[Tensor, ...]]]:
    """Make a function the operator ``metaattn::_NAME``.

    By the library itself: :func:`torch.library.custom_op` adds autograd, which a leaf has no use for, at a tenth of a
    millisecond a call.
    """

    def register(function: Callable[..., tuple[Tensor, ...]]) -> Callable[..., tuple[Tensor, ...]]:
        name = f"_{function.__name__}"
        LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        LIBRARY.impl(name, _own_precision(function), "CompositeExplicitAutograd")
        operator = getattr(torch.ops.metaattn, name).default
        LIBRARY.impl(name, functools.partial(_no_derivative, operator), "Autograd", with_keyset=True)
        _OPERATORS.add(operator)
        return operator

    return register


def _no_derivative(operator: Any, keys: Any, *args: Any) -> tuple[Tensor, ...]:
    """A leaf in a graph that was traced has left its rules behind, and must not pass for a constant.

    Its value may be asked for where gradients are on: then it is a backward pass that raises.
    """
    tensors = [t for a in args for t in (a if isinstance(a, list) else [a]) if isinstance(t, Tensor)]
    if forward_ad._current_level >= 0 and any(map(_has_tangent, tensors)):
        raise _lost(operator)
    with torch._C._AutoDispatchBelowAutograd():
        out: tuple[Tensor, ...] = operator.redispatch(keys & torch._C._after_autograd_keyset, *args)
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        with enable_single_level_autograd_function():  # the kernel of one level
            out = _Lost.apply(operator, len(out), *out, *tensors)  # type: ignore[attr-defined]
    return out


class _Lost(_SingleLevelFunction):
    """The first tensors as they are; their gradients are lost."""

    @staticmethod
    def forward(operator: Any, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(t.view_as(t) for t in tensors[:count])

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.operator = inputs[0]

    @staticmethod
    def backward(ctx: Any, *_: Tensor | None) -> Any:
        raise _lost(ctx.operator)


def _lost(operator: Any) -> NotImplementedError:
    return NotImplementedError(
        f"{operator.name()} in a graph that was traced has no derivative: trace the derivative itself, as "
        "make_fx(torch.func.grad(f)) does, or call metaattn.sdpa"
    )


def _has_tangent(t: Tensor) -> bool:
    return forward_ad.unpack_dual(t).tangent is not None


@_leaf(f"({_CALL}, {_X}) -> (Tensor, Tensor)")
def forward(*args: Any) -> tuple[Tensor, Tensor]:
    """F: out and lse."""
    call, problem, x, _ = _split(args)
    out, lse = select(call.backend, problem, x).forward(problem, x)
    return _laid(out, x.query), lse.contiguous()


@_leaf(f"({_CALL}, {_X}, Tensor out, Tensor lse, {_TANGENT}) -> (Tensor, Tensor)")
def directional(*args: Any) -> tuple[Tensor, Tensor]:
    """T: the tangents of out and lse."""
    call, problem, x, (out, lse, *tangent) = _split(args)
    out_t, lse_t = select(call.backend, problem, x).forward_jvp(problem, x, Values(out, lse), Tangent(*tangent))
    return _laid(out_t, x.query), lse_t.contiguous()


@_leaf(f"({_CALL}, {_X}, Tensor out, Tensor lse, {_TANGENTS}) -> (Tensor, Tensor)")
def directional_further(*args: Any) -> tuple[Tensor, Tensor]:
    """``D_n`` for several tangents, on every backend by the formulas."""
    _, problem, x, (out, lse, parts) = _split(args)
    out_t, lse_t = blockwise.directional(problem, x, Values(out, lse), unflatten(parts))
    return _laid(out_t, x.query), lse_t.contiguous()


@_leaf(f"({_CALL}, {_X}, {_TANGENT}) -> (Tensor, Tensor, Tensor, Tensor)")
def forward_with_jvp(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """F and T: out and lse, and their tangents."""
    call, problem, x, tangent = _split(args)
    values, values_t = select(call.backend, problem, x).forward_with_jvp(problem, x, Tangent(*tangent))
    return *(_laid(values.out, x.query), values.lse.contiguous()), *(
        _laid(values_t.out, x.query),
        values_t.lse.contiguous(),
    )


@_leaf(f"({_CALL}, {_X}, bool bias_grad, {_ROWS}, {_TANGENT}) -> (Tensor, Tensor, Tensor, Tensor)")
def gradient(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """B without a tangent, S with one: query, key, value and bias (empty unless ``bias_grad``)."""
    call, problem, x, (bias_grad, *rows) = _split(args)
    return _four(_gradients(call, problem, x, rows, both=False, bias_grad=bias_grad)[0])


@_leaf(f"({_CALL}, {_X}, bool bias_grad, {_ROWS}, {_TANGENTS}) -> (Tensor, Tensor, Tensor, Tensor)")
def gradient_further(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``G_n`` for several tangents, on every backend by the formulas."""
    _, problem, x, (bias_grad, *rows) = _split(args)
    values, _, w, w_t = _rows(rows)
    return _four(
        blockwise.gradient(problem, x, values, w, unflatten(rows[8]), cotangent_tangent=w_t, bias_grad=bias_grad)
    )


@_leaf(f"({_CALL}, {_X}, bool bias_grad, {_ROWS}, {_TANGENT}) -> ({', '.join(['Tensor'] * 8)})")
def gradient_tangent(*args: Any) -> tuple[Tensor, ...]:
    """B and S: the gradients as of :func:`gradient`, then their tangents."""
    call, problem, x, (bias_grad, *rows) = _split(args)
    first, second = _gradients(call, problem, x, rows, both=True, bias_grad=bias_grad)
    return *_four(first), *_four(second)


@_leaf(f"({_CALL}, {_X}, bool both, {_ROWS}, {_TANGENT}) -> Tensor[]")
def gradients_in_one(*args: Any) -> tuple[Tensor, ...]:
    """As :func:`gradient`, or :func:`gradient_tangent` for ``both``: query, key and value packed, no bias."""
    call, problem, x, (both, *rows) = _split(args)
    found = _gradients(call, replace(problem, pack_qkv_gradients=True), x, rows, both=both, bias_grad=False)
    return tuple(pack_qkv_gradients(grads[:3]) for grads in found)


def _gradients(
    call: Call, problem: Problem, x: Operands, rows: Sequence[Any], *, both: bool, bias_grad: bool
) -> tuple[Gradients, ...]:
    """B's without a tangent, S's with one; or those of both."""
    values, values_t, w, w_t = _rows(rows)
    backend = select(call.backend, problem, x)
    inputs = BackwardJvpInputs(values, values_t, w, Tangent(*rows[8:]), w_t, bias_grad)
    if both:
        return backend.backward_with_jvp(problem, x, inputs)
    if inputs.tangent.is_zero:
        return (backend.backward(problem, x, values, w, bias_grad=bias_grad),)
    return (backend.backward_jvp(problem, x, inputs),)


def any_directional(*args: Any, tangents: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    """``D_n`` by the operator for so many tangents."""
    if len(tangents) == 4:
        return directional(*args, *tangents)
    _check_mapped(tangents)
    return directional_further(*args, tangents)


def any_gradient(*args: Any, tangents: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    """``G_n`` by the operator for so many tangents."""
    if len(tangents) <= 4:
        return gradient(*args, *(tangents or Tangent()))
    _check_mapped(tangents)
    return gradient_further(*args, tangents)


def _check_mapped(tangents: Sequence[Tensor | None]) -> None:
    """The vmap of ``is_grads_batched`` maps no operator that takes a list."""
    if any(t is not None and torch._C._functorch.is_legacy_batchedtensor(t) for t in tangents):
        raise NotImplementedError(
            "is_grads_batched and vectorize=True are served up to second order; take further derivatives by torch.func "
            "(jacrev, jacfwd, hessian, vmap)"
        )


def _laid(out: Tensor, query: Tensor) -> Tensor:
    """Without gaps, in the order of the query's memory: see :func:`tokens_first`."""
    return out.transpose(-2, -3).contiguous().transpose(-2, -3) if tokens_first(query) else out.contiguous()


def _rows(parts: Sequence[Any]) -> tuple[Values, Values, Rows, Rows]:
    """Values and cotangent, each with its tangent."""
    return Values(*parts[:2]), Values(*parts[2:4]), Rows(*parts[4:6]), Rows(*parts[6:8])


def _four(grads: Gradients) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    query, key, value, bias = grads
    bias = query.new_empty(0) if bias is None else bias
    return query.contiguous(), key.contiguous(), value.contiguous(), bias.contiguous()


def is_attention_op(node: fx.Node) -> bool:
    """Whether a node of a graph is one of these operators."""
    return node.target in _OPERATORS


def _like(t: Tensor, *, shape: Sequence[Any] | None = None, dtype: torch.dtype | None = None) -> Tensor:
    return t.new_empty(t.shape if shape is None else tuple(shape), dtype=dtype)


def _new_out(q: Tensor, v: Tensor) -> Tensor:
    return _laid(_like(q, shape=(*q.shape[:-1], v.shape[-1])), q)


@register_fake("metaattn::_forward", lib=LIBRARY)
def _(*args: Any) -> tuple[Tensor, Tensor]:
    q, v = args[5], args[7]
    return _new_out(q, v), _like(q, shape=q.shape[:-1], dtype=accumulator(q.dtype))


@register_fake("metaattn::_forward_with_jvp", lib=LIBRARY)
def _(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    q, v = args[5], args[7]
    lse = _like(q, shape=q.shape[:-1], dtype=accumulator(q.dtype))
    return _new_out(q, v), lse, _new_out(q, v), torch.empty_like(lse)


@register_fake("metaattn::_directional", lib=LIBRARY)
@register_fake("metaattn::_directional_further", lib=LIBRARY)
def _(*args: Any) -> tuple[Tensor, Tensor]:
    return _new_out(args[5], args[7]), _like(args[12])


@register_fake("metaattn::_gradient", lib=LIBRARY)
@register_fake("metaattn::_gradient_further", lib=LIBRARY)
def _(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    q, k, v, bias, bias_grad = *args[5:9], args[11]
    return _like(q), _like(k), _like(v), _like(bias) if bias_grad else _like(q, shape=(0,))


@register_fake("metaattn::_gradient_tangent", lib=LIBRARY)
def _(*args: Any) -> tuple[Tensor, ...]:
    q, k, v, bias, bias_grad = *args[5:9], args[11]
    # Each a tensor of its own: a tracer tells results apart by identity, and would take one given twice for the last.
    return tuple(
        t for _ in range(2) for t in (_like(q), _like(k), _like(v), _like(bias) if bias_grad else _like(q, shape=(0,)))
    )


@register_fake("metaattn::_gradients_in_one", lib=LIBRARY)
def _(*args: Any) -> list[Tensor]:
    q, both = args[5], args[11]
    heads = sum(t.shape[-3] for t in args[5:8])
    return [_like(q, shape=(*q.shape[:-3], q.shape[-2], heads, q.shape[-1])) for _ in range(1 + both)]
