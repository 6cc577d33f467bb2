"""The differentiation rules, written once above every backend.

Two families of functions close the calculus at every order (``x`` the operands, ``w`` a cotangent of
``(out, lse)``, ``t1 … tn`` tangents of ``x``, ``a`` a cotangent and ``u`` a tangent of ``x``)::

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

``out`` and ``lse`` enter as residuals: nothing is differentiated through them, for G accounts for their
dependence on ``x``; their *tangents*, which forward mode supplies, are the residuals of S. The tangent
``w'`` that a cotangent has along ``t1`` rides in the same call (``G_n(w, w'; t) = G_n(w; t1 … tn) +
G_{n-1}(w'; t2 … tn)``), at a third of the price of a call of its own.

Trap (PyTorch 2.11 to 2.13, held by ``tests/boundaries``): in a ``jvp`` rule forward mode is off, at the
levels below as well, so that an ordinary tensor operation there silently loses the tangents of every
outer ``torch.func.jvp``. Another Function turns it on again for those levels: our jvp rules return what
Functions return and constants, and add with :class:`Sum`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._functorch.utils import unwrap_dead_wrappers
from torch.autograd import forward_ad

from ..autodiff import (
    CustomFunction,
    PrecomputedResult,
    PresenceMask,
    current_tangents,
    reverse_over_forward,
    total,
)
from ..backends.base import Operands, Rows, Tangent, Values
from . import operators
from .operators import Call, unflatten

ZERO = Rows()


def flat(tangents: Sequence[Tangent]) -> tuple[Tensor | None, ...]:
    return tuple(part for t in tangents for part in t)


def replace(tangents: list[Tangent], i: int, by: Tangent) -> list[Tangent]:
    return [*tangents[:i], by, *tangents[i + 1 :]]


def forward(call: Call, x: Operands) -> Values:
    """F."""
    return Values(*_forward(*call.flat, *x))


def forward_with_jvp(call: Call, x: Operands, tangent: Tangent) -> tuple[Values, Rows]:
    """F and ``D_1`` at once; the latter zero (absent) if the tangent is."""
    if tangent.is_zero:
        return forward(call, x), ZERO
    parts = _forward_tangent(*call.flat, *x, *tangent)
    return Values(*parts[:2]), Rows(*parts[2:])


def directional(call: Call, x: Operands, values: Values, tangents: Sequence[Tangent]) -> Rows:
    """``D_n`` for ``n >= 1``; zero (absent) if any of the tangents is."""
    if any(t.is_zero for t in tangents):
        return ZERO
    return Rows(*_directional(*call.flat, *x, *values, *flat(tangents)))


def gradient(
    call: Call,
    x: Operands,
    values: Values,
    w: Rows,
    tangents: Sequence[Tangent] = (),
    *,
    w_tangent: Rows = ZERO,
    values_tangent: Rows = ZERO,
    bias_grad: bool,
) -> Tangent:
    """``G_n(w, w'; t)``, where ``w'`` is the tangent of ``w`` along the first of the tangents.

    ``values_tangent`` is ``D_1`` along the only tangent, if at hand. Absent parts of the result are zero.
    """
    if w.is_zero or any(t.is_zero for t in tangents):
        return gradient(call, x, values, w_tangent, tangents[1:], bias_grad=bias_grad) if tangents else Tangent()
    if len(tangents) != 1:
        values_tangent = ZERO
    elif None in values_tangent:
        values_tangent = directional(call, x, values, tangents)
    rows = (*values, *values_tangent, *w, *w_tangent)
    return Tangent(*_gradient(*call.flat, bias_grad, *x, *rows, *flat(tangents)))


# torch.compile puts these calls into its graph as they are and runs the rules when it traces that graph,
# with the transforms active. Left to itself it would inline a Function's forward and drop its rules.


@torch.compiler.allow_in_graph
def _forward(*args: Any) -> tuple[Tensor, ...]:
    return _Forward.of(Call(*args[:5]), *args[5:])


@torch.compiler.allow_in_graph
def _forward_tangent(*args: Any) -> tuple[Tensor, ...]:
    return _ForwardTangent.of(Call(*args[:5]), *args[5:])


@torch.compiler.allow_in_graph
def _directional(*args: Any) -> tuple[Tensor, ...]:
    return _Directional.of(Call(*args[:5]), *args[5:])


@torch.compiler.allow_in_graph
def _gradient(*args: Any) -> tuple[Tensor, ...]:
    return _Gradient.of((Call(*args[:5]), args[5]), *args[6:])


class _Forward(CustomFunction):
    """out and lse. Tensors: x (6)."""

    @classmethod
    def call(cls, form: PresenceMask, *there: Any) -> Any:
        """In forward mode the tangents are at hand, so that F and T are one function, and one kernel.

        A rule could only run T after F. What it returns has its tangents attached by ``make_dual``, as
        :func:`torch.func.jvp` itself does it.
        """
        if reverse_over_forward():
            return PrecomputedResult.results(cls, form, there)
        tangents = current_tangents(there)
        if not any(t is not None for t in tangents):
            return cls.apply(form, *there)
        primals = [forward_ad.unpack_dual(t).primal for t in there]
        parts = _ForwardTangent.of(form.static, *form.fill(primals), *form.fill(tangents)[:4])
        return tuple(forward_ad.make_dual(p, t) for p, t in zip(parts[:2], parts[2:], strict=True))

    @staticmethod
    def forward(form: PresenceMask, *there: Any) -> Any:
        return operators.forward(*form.static.flat, *form.fill(there))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        CustomFunction.keep(ctx, inputs[0], inputs[1:], output)

    @staticmethod
    def backward(ctx: Any, *w: Tensor | None) -> Any:
        (x, values), need = CustomFunction.kept(ctx), CustomFunction.needed(ctx)
        grads = gradient(ctx.form.static, Operands(*x), Values(*values), Rows(*w), bias_grad=need[3])
        return None, *ctx.form.pick((*grads, None, None))

    @staticmethod
    def jvp(ctx: Any, _: None, *moved: Tensor | None) -> Any:
        x, values = CustomFunction.kept(ctx)
        u = Tangent(*ctx.form.fill(moved)[:4])
        return total([directional(ctx.form.static, Operands(*x), Values(*values), [u])], values)


class _ForwardTangent(CustomFunction):
    """out and lse, and their tangents along one direction. Tensors: x (6), t (4)."""

    @staticmethod
    def forward(form: PresenceMask, *there: Any) -> Any:
        return operators.forward_with_jvp(*form.static.flat, *form.fill(there))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        CustomFunction.keep(ctx, inputs[0], inputs[1:], output)

    @staticmethod
    def restore(ctx: Any) -> tuple[Operands, Tangent, Values, Rows]:
        """x, its tangent, values, their tangent."""
        inputs, outputs = CustomFunction.kept(ctx)
        return Operands(*inputs[:6]), Tangent(*inputs[6:]), Values(*outputs[:2]), Rows(*outputs[2:])

    @staticmethod
    def backward(ctx: Any, *parts: Tensor | None) -> Any:
        x, t, values, values_t = _ForwardTangent.restore(ctx)
        call, w, wt, need = ctx.form.static, Rows(*parts[:2]), Rows(*parts[2:]), CustomFunction.needed(ctx)
        grads, t_grads = Tangent(), Tangent()
        if any(need[:4]):
            # <w, D_0> + <wt, D_1(t)>: that w is the tangent of wt along t.
            grads = gradient(call, x, values, wt, [t], w_tangent=w, values_tangent=values_t, bias_grad=need[3])
        if any(need[6:]):
            t_grads = gradient(call, x, values, wt, bias_grad=need[9])
        return None, *ctx.form.pick((*grads, None, None, *t_grads))

    @staticmethod
    def jvp(ctx: Any, _: None, *args: Tensor | None) -> Any:
        x, t, values, values_t = _ForwardTangent.restore(ctx)
        call, moved = ctx.form.static, ctx.form.fill(args)
        u, t_moved = Tangent(*moved[:4]), Tangent(*moved[6:])
        along_u = directional(call, x, values, [u])
        terms = [directional(call, x, values, [t, u]), directional(call, x, values, [t_moved])]
        return *total([along_u], values), *total(terms, values_t)


class _Directional(CustomFunction):
    """``D_n``. Tensors: x (6), out, lse, n tangents (4 each)."""

    @staticmethod
    def forward(form: PresenceMask, *there: Any) -> Any:
        args = form.fill(there)
        return operators.any_directional(*form.static.flat, *args[:8], tangents=args[8:])

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        CustomFunction.keep(ctx, inputs[0], inputs[1:], output)

    @staticmethod
    def restore(ctx: Any) -> tuple[Rows, Operands, Values, list[Tangent]]:
        """What the function returned, and its arguments."""
        s, output = CustomFunction.kept(ctx)
        return Rows(*output), Operands(*s[:6]), Values(*s[6:8]), unflatten(s[8:])

    @staticmethod
    def backward(ctx: Any, *w_parts: Tensor | None) -> Any:
        result, x, values, tangents = _Directional.restore(ctx)
        call, w, need = ctx.form.static, Rows(*w_parts), CustomFunction.needed(ctx)
        grads = Tangent()
        if any(need[:4]):
            grads = gradient(call, x, values, w, tangents, values_tangent=result, bias_grad=need[3])
        t_grads: list[Tensor | None] = []
        for i in range(len(tangents)):
            others, wanted = [*tangents[:i], *tangents[i + 1 :]], need[8 + 4 * i : 12 + 4 * i]
            t_grads += gradient(call, x, values, w, others, bias_grad=wanted[3]) if any(wanted) else Tangent()
        return None, *ctx.form.pick((*grads, None, None, None, None, *t_grads))

    @staticmethod
    def jvp(ctx: Any, _: None, *args: Tensor | None) -> Any:
        result, x, values, tangents = _Directional.restore(ctx)
        call, moved = ctx.form.static, ctx.form.fill(args)
        u, t_moved = Tangent(*moved[:4]), unflatten(moved[8:])
        terms = [directional(call, x, values, [*tangents, u])]
        terms += [directional(call, x, values, replace(tangents, i, m)) for i, m in enumerate(t_moved)]
        return total(terms, result)


class _Gradient(CustomFunction):
    """``G_n``. Tensors: x (6), out, lse, their tangents, w (2), w' (2), n tangents (4 each)."""

    @classmethod
    def call(cls, form: PresenceMask, *there: Any) -> Any:
        """In forward mode B and S are one function, as F and T are: see :class:`_Forward`."""
        if len(form.there) > 14:
            return cls.apply(form, *there)
        there = unwrap_dead_wrappers(there)  # the backward of torch.func.vjp runs after its level has ended
        if reverse_over_forward():
            return PrecomputedResult.results(cls, form, there)
        tangents = form.fill(current_tangents(there))
        t, values_t, w_t = Tangent(*tangents[:4]), Rows(*tangents[6:8]), Rows(*tangents[10:12])
        if t.is_zero:
            return cls.apply(form, *there)
        s = form.fill([forward_ad.unpack_dual(part).primal for part in there])
        if None in values_t:
            values_t = directional(form.static[0], Operands(*s[:6]), Values(*s[6:8]), [t])
        parts = _GradientTangent.of(form.static, *s[:8], *values_t, *s[10:12], *w_t, *t)
        n = len(parts) // 2
        return tuple(forward_ad.make_dual(p, t) for p, t in zip(parts[:n], parts[n:], strict=True))

    @staticmethod
    def forward(form: PresenceMask, *there: Any) -> Any:
        (call, bias_grad), args = form.static, form.fill(there)
        grads = operators.any_gradient(*call.flat, *args[:6], bias_grad, *args[6:14], tangents=args[14:])
        return grads if bias_grad else grads[:3]

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        CustomFunction.keep(ctx, inputs[0], inputs[1:])

    @staticmethod
    def backward(ctx: Any, *a_parts: Tensor | None) -> Any:
        state = _State.of(CustomFunction.kept(ctx)[0])
        return None, *ctx.form.pick(state.pulled(ctx.form.static[0], Tangent(*a_parts), CustomFunction.needed(ctx)))

    @staticmethod
    def jvp(ctx: Any, _: None, *args: Tensor | None) -> Any:
        call, bias_grad = ctx.form.static
        return _State.of(CustomFunction.kept(ctx)[0]).pushed(call, bias_grad, ctx.form.fill(args))


class _GradientTangent(CustomFunction):
    """B and S at once. Tensors: x (6), out, lse, their tangents, w (2), w' (2), t (4)."""

    @staticmethod
    def forward(form: PresenceMask, *there: Any) -> Any:
        (call, bias_grad), args = form.static, form.fill(there)
        parts = operators.gradient_tangent(*call.flat, *args[:6], bias_grad, *args[6:])
        return parts if bias_grad else (*parts[:3], *parts[4:7])

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        CustomFunction.keep(ctx, inputs[0], inputs[1:])

    @staticmethod
    def backward(ctx: Any, *parts: Tensor | None) -> Any:
        call, need, n = ctx.form.static[0], CustomFunction.needed(ctx), len(parts) // 2
        second = _State.of(CustomFunction.kept(ctx)[0])
        of_first = second.first().pulled(call, Tangent(*parts[:n]), (*need[:12], False, False))  # B has no w'
        of_second = second.pulled(call, Tangent(*parts[n:]), need)
        both = zip((*of_first, *(None,) * 4), of_second, strict=True)
        return None, *ctx.form.pick([b if a is None else a if b is None else a + b for a, b in both])

    @staticmethod
    def jvp(ctx: Any, _: None, *args: Tensor | None) -> Any:
        (call, bias_grad), moved = ctx.form.static, ctx.form.fill(args)
        second = _State.of(CustomFunction.kept(ctx)[0])
        return *second.first().pushed(call, bias_grad, moved[:14]), *second.pushed(call, bias_grad, moved)


class _State(NamedTuple):
    """The arguments of ``G_n``, and its derivatives by them."""

    x: Operands
    values: Values
    values_t: Rows
    w: Rows
    wt: Rows
    tangents: list[Tangent]

    @classmethod
    def of(cls, s: Sequence[Any]) -> _State:
        """From the tensors of a :class:`_Gradient`."""
        return cls(
            Operands(*s[:6]), Values(*s[6:8]), Rows(*s[8:10]), Rows(*s[10:12]), Rows(*s[12:14]), unflatten(s[14:])
        )

    def first(self) -> _State:
        """The arguments of B among those of S."""
        return self._replace(values_t=ZERO, wt=ZERO, tangents=[])

    def pulled(self, call: Call, a: Tangent, need: Sequence[bool]) -> tuple[Tensor | None, ...]:
        """The cotangents of all arguments from one, ``a``, of the result."""
        x, values, _, w, wt, tangents = self
        if a.is_zero:
            return (None,) * len(need)
        # D_1(a) is the cotangent of w in B and of w' in S, and what S(a) needs: computed once.
        along_a = directional(call, x, values, [a]) if len(tangents) < 2 else ZERO
        grads, w_grad, wt_grad = Tangent(), ZERO, ZERO
        if any(need[:4]):
            grads = gradient(
                call, x, values, w, [*tangents, a], w_tangent=wt, values_tangent=along_a, bias_grad=need[3]
            )
        if any(need[10:12]):
            w_grad = directional(call, x, values, [*tangents, a]) if tangents else along_a
        if any(need[12:14]):
            wt_grad = directional(call, x, values, [*tangents[1:], a]) if tangents[1:] else along_a
        t_grads: list[Tensor | None] = []
        for i in range(len(tangents)):
            wanted = need[14 + 4 * i : 18 + 4 * i]
            t_grads += self.along(call, i, a, wanted[3], along_a) if any(wanted) else Tangent()
        return *grads, *(None,) * 6, *w_grad, *wt_grad, *t_grads

    def pushed(self, call: Call, bias_grad: bool, moved: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
        """The tangents of the result from those of all arguments."""
        x, values, values_t, w, wt, tangents = self
        u, w_moved, wt_moved = Tangent(*moved[:4]), Rows(*moved[10:12]), Rows(*moved[12:14])
        if not tangents:
            along_u = Rows(*moved[6:8])  # the tangents of out and lse, which forward mode carried here
            terms = [gradient(call, x, values, w, [u], w_tangent=w_moved, values_tangent=along_u, bias_grad=bias_grad)]
        else:
            terms = [
                gradient(call, x, values, w, [*tangents, u], w_tangent=wt, bias_grad=bias_grad),
                gradient(
                    call,
                    x,
                    values,
                    w_moved,
                    tangents,
                    w_tangent=wt_moved,
                    values_tangent=values_t,
                    bias_grad=bias_grad,
                ),
                *(self.along(call, i, m, bias_grad) for i, m in enumerate(unflatten(moved[14:]))),
            ]
        return total(terms, x if bias_grad else x[:3])

    def along(self, call: Call, i: int, by: Tangent, bias_grad: bool, values_tangent: Rows = ZERO) -> Tangent:
        """The part linear in tangent ``i``, with ``by`` in its place; ``w'`` goes with the first alone."""
        x, values, _, w, wt, tangents = self
        return gradient(
            call,
            x,
            values,
            w,
            replace(tangents, i, by),
            w_tangent=wt if i else ZERO,
            values_tangent=values_tangent,
            bias_grad=bias_grad,
        )
