"""The differentiation rules of attention, written once for all backends.

Two families of functions are closed under differentiation (``x`` are the operands, ``w`` a cotangent of ``(out, lse)``,
``t1 … tn`` tangents of ``x``, ``a`` a cotangent and ``u`` a tangent of ``x``; F, B, T and S are the primitives in the
notation of ``docs/mathematics.md``)::

    D_n(x; t1 … tn)     the n-th directional derivative of (out, lse)          D_0 = F, D_1 = T
    G_n(x; w; t1 … tn)  the gradient in x of <w, D_n(x; t1 … tn)>              G_0 = B, G_1 = S

Both are multilinear in ``w`` and the tangents and symmetric in the tangents, so that

======  ==========================================  ==================================================
        reverse                                     forward
======  ==========================================  ==================================================
D_n     x: G_n(w; t)                                D_{n+1}(t, u) + sum_i D_n(t with ti -> ti')
        ti: G_{n-1}(w; t without ti)
G_n     x: G_{n+1}(w; t, a)   w: D_{n+1}(t, a)      G_{n+1}(w; t, u) + G_n(w'; t)
        ti: G_n(w; t with ti -> a)                  + sum_i G_n(w; t with ti -> ti')
======  ==========================================  ==================================================

In the code, ``forward`` is D_0, ``forward_jvp`` is D_n for ``n >= 1``, ``backward`` is G_0 and ``backward_jvp`` is G_n
for ``n >= 1``.

``out`` and ``lse`` are residuals of the gradients. Nothing is differentiated through them, because G accounts for their
dependence on ``x``; but their *tangents*, which forward mode supplies, are residuals of S. The tangent ``w'`` that a
cotangent has along ``t1`` goes into the same call (``G_n(w, w'; t) = G_n(w; t1 … tn) + G_{n-1}(w'; t2 … tn)``), at a
third of the cost of a separate call.

Trap (PyTorch 2.11 to 2.13, held by ``tests/boundaries``): inside a ``jvp`` rule, forward mode is off, at the levels
below as well. An ordinary tensor operation there silently loses the tangents of every outer ``torch.func.jvp``. Another
custom function turns forward mode on again for those levels. So our jvp rules return only constants and what custom
functions return, and add with :func:`metaattn.autodiff.add_terms`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.autograd import forward_ad

from ..autodiff import (
    CustomFunction,
    PrecomputedResult,
    PresenceMask,
    add_terms,
    allow_in_graph,
    current_tangents,
    reverse_over_forward,
    unwrap_dead_wrappers,
)
from ..backends.base import Operands, Rows, Tangent, Values
from . import operators
from .operators import (
    BackwardTensors,
    Call,
    ForwardJvpTensors,
    ForwardWithJvpTensors,
    flatten_tangents,
    split_call,
)

ZERO = Rows()


def forward(call: Call, x: Operands) -> Values:
    """Return out and lse."""
    return Values(*_forward(*call.flat, *x))


def forward_with_jvp(call: Call, x: Operands, tangent: Tangent) -> tuple[Values, Rows]:
    """Return out and lse, and their tangents along one tangent, which are absent if it is zero."""
    if tangent.is_zero:
        return forward(call, x), ZERO
    parts = _forward_with_jvp(*call.flat, *x, *tangent)
    return Values(*parts[:2]), Rows(*parts[2:])


def forward_jvp(call: Call, x: Operands, values: Values, tangents: Sequence[Tangent]) -> Rows:
    """Return ``D_n`` for one tangent or more; absent (zero) if any of the tangents is zero."""
    if any(t.is_zero for t in tangents):
        return ZERO
    return Rows(*_forward_jvp(*call.flat, *x, *values, *flatten_tangents(tangents)))


def backward(
    call: Call,
    x: Operands,
    values: Values,
    cotangent: Rows,
    tangents: Sequence[Tangent] = (),
    *,
    cotangent_tangent: Rows = ZERO,
    values_tangent: Rows = ZERO,
    bias_grad: bool,
) -> Tangent:
    """Return ``G_n``; parts of it that are zero are absent.

    Args:
        call: The static part of the call.
        x: The operands.
        values: What :func:`forward` returns for them.
        cotangent: Cotangent ``w`` of out and lse.
        tangents: Tangents ``t1 … tn`` of the operands.
        cotangent_tangent: The tangent ``w'`` of the cotangent along the first of the tangents.
        values_tangent: If there is one tangent: what :func:`forward_jvp` returns for it, or absent to compute it here.
        bias_grad: Compute the gradient of the bias.
    """
    if cotangent.is_zero or any(t.is_zero for t in tangents):
        if not tangents:
            return Tangent()
        return backward(call, x, values, cotangent_tangent, tangents[1:], bias_grad=bias_grad)
    if not tangents:
        return Tangent(*_backward(*call.flat, bias_grad, *x, *values, *cotangent))
    if len(tangents) > 1:
        values_tangent = ZERO
    elif None in values_tangent:
        values_tangent = forward_jvp(call, x, values, tangents)
    rows = (*cotangent, *values_tangent, *cotangent_tangent)
    return Tangent(*_backward_jvp(*call.flat, bias_grad, *x, *values, *rows, *flatten_tangents(tangents)))


# torch.compile puts the calls of these functions into its graph unchanged, and runs the rules when it traces that
# graph, with the transforms active. By default it would inline the forward of a custom function and drop the rules.


@allow_in_graph
def _forward(*args: Any) -> tuple[Tensor, ...]:
    call, tensors = split_call(args)
    return _Forward.invoke(call, *tensors)


@allow_in_graph
def _forward_with_jvp(*args: Any) -> tuple[Tensor, ...]:
    call, tensors = split_call(args)
    return _ForwardWithJvp.invoke(call, *tensors)


@allow_in_graph
def _forward_jvp(*args: Any) -> tuple[Tensor, ...]:
    call, tensors = split_call(args)
    return _ForwardJvp.invoke(call, *tensors)


@allow_in_graph
def _backward(*args: Any) -> tuple[Tensor, ...]:
    call, (bias_grad, *tensors) = split_call(args)
    return _Backward.invoke((call, bias_grad), *tensors)


@allow_in_graph
def _backward_jvp(*args: Any) -> tuple[Tensor, ...]:
    call, (bias_grad, *tensors) = split_call(args)
    return _BackwardJvp.invoke((call, bias_grad), *tensors)


class _Forward(CustomFunction):
    """``D_0``: out and lse. Tensors: :class:`Operands`."""

    @classmethod
    def call(cls, mask: PresenceMask, *tensors: Any) -> Any:
        """Call the function; in forward mode, compute values and tangents by one function, and one kernel.

        There the tangents are known before the function runs, while its jvp rule could only run T after F. The results
        get their tangents by ``make_dual``, as in :func:`torch.func.jvp` itself.
        """
        if reverse_over_forward():
            return PrecomputedResult.results(cls, mask, tensors)
        tangents = current_tangents(tensors)
        if not any(t is not None for t in tangents):
            return cls.apply(mask, *tensors)
        primals = [forward_ad.unpack_dual(t).primal for t in tensors]
        tangent = _tangent_of(Operands(*mask.expand(tangents)))
        parts = _ForwardWithJvp.invoke(mask.static, *mask.expand(primals), *tangent)
        return tuple(forward_ad.make_dual(p, t) for p, t in zip(parts[:2], parts[2:], strict=True))

    @staticmethod
    def forward(mask: PresenceMask, *tensors: Any) -> Any:
        return operators.forward(*mask.static.flat, *mask.expand(tensors))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        CustomFunction.save(ctx, inputs[0], inputs[1:], output)

    @staticmethod
    def backward(ctx: Any, *cotangent: Tensor | None) -> Any:
        (x, values), needs = CustomFunction.saved(ctx), Operands._make(CustomFunction.needs_grad(ctx))
        grads = backward(ctx.mask.static, Operands(*x), Values(*values), Rows(*cotangent), bias_grad=bool(needs.bias))
        return None, *ctx.mask.compress(Operands(*grads))  # type: ignore[arg-type]

    @staticmethod
    def jvp(ctx: Any, _: None, *tangents: Tensor | None) -> Any:
        x, values = CustomFunction.saved(ctx)
        u = _tangent_of(Operands(*ctx.mask.expand(tangents)))
        return add_terms([forward_jvp(ctx.mask.static, Operands(*x), Values(*values), [u])], values)


class _ForwardWithJvp(CustomFunction):
    """``D_0`` and ``D_1``: out and lse, and their tangents. Tensors: :class:`ForwardWithJvpTensors`."""

    @staticmethod
    def forward(mask: PresenceMask, *tensors: Any) -> Any:
        return operators.forward_with_jvp(*mask.static.flat, *mask.expand(tensors))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        CustomFunction.save(ctx, inputs[0], inputs[1:], output)

    @staticmethod
    def restore(ctx: Any) -> tuple[Operands, Tangent, Values, Rows]:
        """Return x, its tangent, the values and their tangent."""
        inputs, outputs = CustomFunction.saved(ctx)
        return *ForwardWithJvpTensors.unflatten(inputs), Values(*outputs[:2]), Rows(*outputs[2:])

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> Any:
        x, t, values, values_t = _ForwardWithJvp.restore(ctx)
        call, w, w_of_t = ctx.mask.static, Rows(*cotangents[:2]), Rows(*cotangents[2:])
        needs = ForwardWithJvpTensors.unflatten(CustomFunction.needs_grad(ctx))
        grads, t_grads = Tangent(), Tangent()
        if any(needs.x):
            # <w, D_0> + <w_of_t, D_1(t)>: it is as if w were the tangent of w_of_t along t.
            grads = backward(
                call,
                x,
                values,
                w_of_t,
                [t],
                cotangent_tangent=w,
                values_tangent=values_t,
                bias_grad=bool(needs.x.bias),
            )
        if any(needs.tangent):
            t_grads = backward(call, x, values, w_of_t, bias_grad=bool(needs.tangent.bias))
        all_grads = ForwardWithJvpTensors(Operands(*grads), t_grads)  # type: ignore[arg-type]
        return None, *ctx.mask.compress(all_grads.flatten())

    @staticmethod
    def jvp(ctx: Any, _: None, *tangents: Tensor | None) -> Any:
        x, t, values, values_t = _ForwardWithJvp.restore(ctx)
        call, u = ctx.mask.static, ForwardWithJvpTensors.unflatten(ctx.mask.expand(tangents))
        along_u = forward_jvp(call, x, values, [_tangent_of(u.x)])
        terms = [forward_jvp(call, x, values, [t, _tangent_of(u.x)]), forward_jvp(call, x, values, [u.tangent])]
        return *add_terms([along_u], values), *add_terms(terms, values_t)


class _ForwardJvp(CustomFunction):
    """``D_n`` for one tangent or more. Tensors: :class:`ForwardJvpTensors`."""

    @staticmethod
    def forward(mask: PresenceMask, *tensors: Any) -> Any:
        return operators.forward_jvp_any_order(mask.static, ForwardJvpTensors.unflatten(mask.expand(tensors)))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        CustomFunction.save(ctx, inputs[0], inputs[1:], output)

    @staticmethod
    def backward(ctx: Any, *cotangent: Tensor | None) -> Any:
        saved, result = CustomFunction.saved(ctx)
        x, values, tangents = ForwardJvpTensors.unflatten(saved)
        call, w = ctx.mask.static, Rows(*cotangent)
        needs = ForwardJvpTensors.unflatten(CustomFunction.needs_grad(ctx))
        grads = Tangent()
        if any(needs.x):
            grads = backward(call, x, values, w, tangents, values_tangent=Rows(*result), bias_grad=bool(needs.x.bias))
        t_grads = [Tangent()] * len(tangents)
        for i, requested in enumerate(needs.tangents):
            if any(requested):
                others = [*tangents[:i], *tangents[i + 1 :]]
                t_grads[i] = backward(call, x, values, w, others, bias_grad=bool(requested.bias))
        all_grads = ForwardJvpTensors(Operands(*grads), Values(None, None), t_grads)  # type: ignore[arg-type]
        return None, *ctx.mask.compress(all_grads.flatten())

    @staticmethod
    def jvp(ctx: Any, _: None, *u_parts: Tensor | None) -> Any:
        saved, result = CustomFunction.saved(ctx)
        x, values, tangents = ForwardJvpTensors.unflatten(saved)
        call, u = ctx.mask.static, ForwardJvpTensors.unflatten(ctx.mask.expand(u_parts))
        terms = [forward_jvp(call, x, values, [*tangents, _tangent_of(u.x)])]
        terms += [forward_jvp(call, x, values, _replace(tangents, i, t)) for i, t in enumerate(u.tangents)]
        return add_terms(terms, result)


class _Backward(CustomFunction):
    """``G_0``: the gradients. Constants: the call and ``bias_grad``. Tensors: :class:`BackwardTensors`, no tangents."""

    @classmethod
    def call(cls, mask: PresenceMask, *tensors: Any) -> Any:
        """Call the function; in forward mode, compute B and S by one function, as :class:`_Forward` does F and T."""
        tensors = unwrap_dead_wrappers(tensors)  # the backward of torch.func.vjp runs after its level has ended
        if reverse_over_forward():
            return PrecomputedResult.results(cls, mask, tensors)
        tangents = BackwardTensors.unflatten(mask.expand(current_tangents(tensors)))
        t, values_t = _tangent_of(tangents.x), Rows(*tangents.values)
        if t.is_zero:
            return cls.apply(mask, *tensors)
        primals = mask.expand([forward_ad.unpack_dual(part).primal for part in tensors])
        args = BackwardTensors.unflatten(primals)
        if None in values_t:
            values_t = forward_jvp(mask.static[0], args.x, args.values, [t])
        args = BackwardTensors(args.x, args.values, args.cotangent, values_t, tangents.cotangent, [t])
        parts = _BackwardWithJvp.invoke(mask.static, *args.flatten())
        n = len(parts) // 2
        return tuple(forward_ad.make_dual(p, t) for p, t in zip(parts[:n], parts[n:], strict=True))

    @staticmethod
    def forward(mask: PresenceMask, *tensors: Any) -> Any:
        call, bias_grad = mask.static
        grads = operators.backward(*call.flat, bias_grad, *mask.expand(tensors))
        return grads if bias_grad else grads[:3]

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        CustomFunction.save(ctx, inputs[0], inputs[1:])

    @staticmethod
    def backward(ctx: Any, *cotangent: Tensor | None) -> Any:
        args = BackwardTensors.unflatten(CustomFunction.saved(ctx)[0])
        needs = BackwardTensors.unflatten(CustomFunction.needs_grad(ctx))
        grads = _vjp_of_backward(ctx.mask.static[0], args, Tangent(*cotangent), needs)
        return None, *ctx.mask.compress(grads.flatten())

    @staticmethod
    def jvp(ctx: Any, _: None, *tangents: Tensor | None) -> Any:
        args = BackwardTensors.unflatten(CustomFunction.saved(ctx)[0])
        call, bias_grad = ctx.mask.static
        return _jvp_of_backward(call, bias_grad, args, BackwardTensors.unflatten(ctx.mask.expand(tangents)))


class _BackwardJvp(CustomFunction):
    """``G_n`` for one tangent or more. Constants and tensors as of :class:`_Backward`, with the tangents."""

    @staticmethod
    def forward(mask: PresenceMask, *tensors: Any) -> Any:
        call, bias_grad = mask.static
        args = BackwardTensors.unflatten(mask.expand(tensors))
        grads = operators.backward_jvp_any_order(call, bias_grad, args)
        return grads if bias_grad else grads[:3]

    setup_context = _Backward.setup_context
    backward = _Backward.backward
    jvp = _Backward.jvp


class _BackwardWithJvp(CustomFunction):
    """``G_0`` and ``G_1``. Constants and tensors as of :class:`_BackwardJvp`, with one tangent."""

    @staticmethod
    def forward(mask: PresenceMask, *tensors: Any) -> Any:
        call, bias_grad = mask.static
        parts = operators.backward_with_jvp(*call.flat, bias_grad, *mask.expand(tensors))
        return parts if bias_grad else (*parts[:3], *parts[4:7])

    setup_context = _Backward.setup_context

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> Any:
        call, n = ctx.mask.static[0], len(cotangents) // 2
        args = BackwardTensors.unflatten(CustomFunction.saved(ctx)[0])
        needs = BackwardTensors.unflatten(CustomFunction.needs_grad(ctx))
        first = _vjp_of_backward(call, args.of_backward, Tangent(*cotangents[:n]), needs.of_backward)
        first = first._replace(tangents=[Tangent()])  # in the layout of the other, with zeros for its further tensors
        second = _vjp_of_backward(call, args, Tangent(*cotangents[n:]), needs)
        both = zip(first.flatten(), second.flatten(), strict=True)
        return None, *ctx.mask.compress([b if a is None else a if b is None else a + b for a, b in both])

    @staticmethod
    def jvp(ctx: Any, _: None, *tangents: Tensor | None) -> Any:
        args = BackwardTensors.unflatten(CustomFunction.saved(ctx)[0])
        u = BackwardTensors.unflatten(ctx.mask.expand(tangents))
        call, bias_grad = ctx.mask.static
        first = _jvp_of_backward(call, bias_grad, args.of_backward, u.of_backward)
        return *first, *_jvp_of_backward(call, bias_grad, args, u)


def _vjp_of_backward(call: Call, args: BackwardTensors, a: Tangent, needs: BackwardTensors) -> BackwardTensors:
    """Return the cotangents of all arguments of ``G_n`` from one, ``a``, of its result.

    Args:
        call: The static part of the call.
        args: The arguments.
        a: The cotangent of the result.
        needs: For each of the arguments, whether its cotangent is requested.
    """
    x, values, w, _, w_t, tangents = args
    grads, w_grad, w_t_grad, t_grads = Tangent(), ZERO, ZERO, [Tangent()] * len(tangents)
    if not a.is_zero:
        # D_1(a) is the cotangent of w in B and of w' in S, and a residual of S(a): computed once.
        along_a = forward_jvp(call, x, values, [a]) if len(tangents) < 2 else ZERO
        if any(needs.x):
            grads = backward(
                call,
                x,
                values,
                w,
                [*tangents, a],
                cotangent_tangent=w_t,
                values_tangent=along_a,
                bias_grad=bool(needs.x.bias),
            )
        if any(needs.cotangent):
            w_grad = forward_jvp(call, x, values, [*tangents, a]) if tangents else along_a
        if any(needs.cotangent_tangent):
            w_t_grad = forward_jvp(call, x, values, [*tangents[1:], a]) if tangents[1:] else along_a
        for i, requested in enumerate(needs.tangents):
            if any(requested):
                t_grads[i] = _along(call, args, i, a, bool(requested.bias), along_a)
    absent: Any = Values(None, None)  # type: ignore[arg-type]
    return BackwardTensors(Operands(*grads), absent, w_grad, ZERO, w_t_grad, t_grads)  # type: ignore[arg-type]


def _jvp_of_backward(call: Call, bias_grad: bool, args: BackwardTensors, u: BackwardTensors) -> tuple[Tensor, ...]:
    """Return the tangents of the result of ``G_n`` from those of all its arguments, ``u``."""
    x, values, w, values_t, w_t, tangents = args
    along = _tangent_of(u.x)
    if not tangents:
        terms = [
            backward(
                call,
                x,
                values,
                w,
                [along],
                cotangent_tangent=u.cotangent,
                values_tangent=Rows(*u.values),  # the tangents of out and lse, which forward mode brought here
                bias_grad=bias_grad,
            )
        ]
    else:
        terms = [
            backward(call, x, values, w, [*tangents, along], cotangent_tangent=w_t, bias_grad=bias_grad),
            backward(
                call,
                x,
                values,
                u.cotangent,
                tangents,
                cotangent_tangent=u.cotangent_tangent,
                values_tangent=values_t,
                bias_grad=bias_grad,
            ),
            *(_along(call, args, i, t, bias_grad) for i, t in enumerate(u.tangents)),
        ]
    return add_terms(terms, x if bias_grad else x[:3])


def _along(
    call: Call, args: BackwardTensors, i: int, tangent: Tangent, bias_grad: bool, values_tangent: Rows = ZERO
) -> Tangent:
    """Return the part of ``G_n`` that is linear in tangent ``i``, with another tangent in its place.

    The tangent ``w'`` of the cotangent is along the first tangent, so it belongs to that part for ``i = 0`` only.
    """
    x, values, w, _, w_t, tangents = args
    return backward(
        call,
        x,
        values,
        w,
        _replace(tangents, i, tangent),
        cotangent_tangent=w_t if i else ZERO,
        values_tangent=values_tangent,
        bias_grad=bias_grad,
    )


def _replace(tangents: Sequence[Tangent], i: int, tangent: Tangent) -> list[Tangent]:
    return [*tangents[:i], tangent, *tangents[i + 1 :]]


def _tangent_of(x: Operands) -> Tangent:
    """Return the entries of the differentiable operands."""
    return Tangent(x.query, x.key, x.value, x.bias)
