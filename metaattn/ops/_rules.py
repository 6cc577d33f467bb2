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
Functions return and constants, and add with :class:`_Sum`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from ..backends._protocol import Operands, Rows, Tangent, Values
from . import _leaves as leaves
from ._leaves import Call

ZERO = Rows()


def forward(call: Call, x: Operands) -> Values:
    """F."""
    return Values(*_forward(*call, *x))


def directional(call: Call, x: Operands, values: Values, tangents: Sequence[Tangent]) -> Rows:
    """``D_n`` for ``n >= 1``; zero (absent) if any of the tangents is."""
    if any(t.is_zero for t in tangents):
        return ZERO
    return Rows(*_directional(*call, *x, *values, *_flat(tangents)))


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
    return Tangent(*_gradient(*call, bias_grad, *x, *rows, *_flat(tangents)))


# torch.compile puts these calls into its graph as they are and runs the rules when it traces that graph,
# with the transforms active. Left to itself it would inline a Function's forward and drop its rules.


@torch.compiler.allow_in_graph
def _forward(*args: Any) -> tuple[Tensor, ...]:
    return _Forward.apply(Call(*args[:5]), *args[5:])


@torch.compiler.allow_in_graph
def _directional(*args: Any) -> tuple[Tensor, ...]:
    return _Directional.apply(Call(*args[:5]), *args[5:])


@torch.compiler.allow_in_graph
def _gradient(*args: Any) -> tuple[Tensor, ...]:
    return _Gradient.apply(Call(*args[:5]), *args[5:])


def _flat(tangents: Sequence[Tangent]) -> tuple[Tensor | None, ...]:
    return tuple(part for t in tangents for part in t)


def _unflatten(flat: Sequence[Tensor | None]) -> list[Tangent]:
    return [Tangent(*flat[i : i + 4]) for i in range(0, len(flat), 4)]


def _replace(tangents: list[Tangent], i: int, by: Tangent) -> list[Tangent]:
    return [*tangents[:i], by, *tangents[i + 1 :]]


def _present(grads: Sequence[Tensor | None], parts: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """The gradients of the parts that are there: autograd takes none for an argument that is ``None``."""
    return tuple(None if p is None else g for g, p in zip(grads, parts, strict=True))


def _total(terms: Sequence[Sequence[Tensor | None]], like: Sequence[Any]) -> tuple[Tensor, ...]:
    """The sum of tuples of tensors, where an absent one is zero; zeros like ``like`` if all are."""
    columns = ([t for t in column if t is not None] for column in zip(*terms, strict=True))
    return tuple(
        torch.zeros_like(p) if not c else c[0] if len(c) == 1 else _Sum.apply(*c)
        for c, p in zip(columns, like, strict=False)
    )


class _Rule(Function):
    """Base of the functions: after the leading constants, all arguments are tensors or ``None``.

    Absent cotangents and tangents stay ``None``, so that no rule works on a zero.
    """

    @classmethod
    def vmap(cls, info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        """Fold the mapped dimension into the batch; what is not mapped is expanded by stride 0, not copied."""

        def fold(a: Any, dim: int | None) -> Any:
            if not isinstance(a, Tensor):
                return a
            return a.expand(info.batch_size, *a.shape) if dim is None else a.movedim(dim, 0)

        out = cls.apply(*map(fold, args, in_dims))
        return out, 0 if isinstance(out, Tensor) else (0,) * len(out)

    @staticmethod
    def keep(ctx: Any, *tensors: Tensor | None) -> None:
        """Save tensors for both modes."""
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)


class _Sum(_Rule):
    """The sum of tensors, for use in jvp rules (see the trap above)."""

    @staticmethod
    def forward(*terms: Tensor) -> Tensor:
        return functools.reduce(torch.add, terms)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.count = len(inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return (grad,) * ctx.count

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Any:
        present = [t for t in tangents if t is not None]
        return present[0] if len(present) == 1 else _Sum.apply(*present)


class _Forward(_Rule):
    @staticmethod
    def forward(call: Call, *x: Any) -> Any:
        return leaves.forward(*call, *x)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.call = inputs[0]
        _Rule.keep(ctx, *inputs[1:], *output)

    @staticmethod
    def backward(ctx: Any, *w: Tensor | None) -> Any:
        x, values = Operands(*ctx.saved_tensors[:6]), Values(*ctx.saved_tensors[6:])
        grads = gradient(ctx.call, x, values, Rows(*w), bias_grad=ctx.needs_input_grad[4])
        return None, *grads, None, None

    @staticmethod
    def jvp(ctx: Any, _: None, *tangents: Tensor | None) -> Any:
        x, values = Operands(*ctx.saved_tensors[:6]), Values(*ctx.saved_tensors[6:])
        return _total([directional(ctx.call, x, values, [Tangent(*tangents[:4])])], values)


class _Directional(_Rule):
    @staticmethod
    def forward(call: Call, *args: Any) -> Any:
        return leaves.directional(*call, *args[:8], *leaves.flat(_unflatten(args[8:])))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.call = inputs[0]
        _Rule.keep(ctx, *output, *inputs[1:])

    @staticmethod
    def restore(ctx: Any) -> tuple[Rows, Operands, Values, list[Tangent]]:
        """What the function returned, and its arguments."""
        s = ctx.saved_tensors
        return Rows(*s[:2]), Operands(*s[2:8]), Values(*s[8:10]), _unflatten(s[10:])

    @staticmethod
    def backward(ctx: Any, *w_parts: Tensor | None) -> Any:
        result, x, values, tangents = _Directional.restore(ctx)
        w, need = Rows(*w_parts), ctx.needs_input_grad[1:]
        grads = Tangent()
        if any(need[:4]):
            grads = gradient(ctx.call, x, values, w, tangents, values_tangent=result, bias_grad=need[3])
        t_grads: list[Tensor | None] = []
        for i, t in enumerate(tangents):
            others, wanted = [*tangents[:i], *tangents[i + 1 :]], need[8 + 4 * i : 12 + 4 * i]
            g = gradient(ctx.call, x, values, w, others, bias_grad=wanted[3]) if any(wanted) else Tangent()
            t_grads += _present(g, t)
        return None, *grads, None, None, None, None, *t_grads

    @staticmethod
    def jvp(ctx: Any, _: None, *args: Tensor | None) -> Any:
        result, x, values, tangents = _Directional.restore(ctx)
        u, moved = Tangent(*args[:4]), _unflatten(args[8:])
        terms = [directional(ctx.call, x, values, [*tangents, u])]
        terms += [directional(ctx.call, x, values, _replace(tangents, i, m)) for i, m in enumerate(moved)]
        return _total(terms, result)


class _Gradient(_Rule):
    @staticmethod
    def forward(call: Call, bias_grad: bool, *args: Any) -> Any:
        grads = leaves.gradient(*call, *args[:6], bias_grad, *args[6:14], *leaves.flat(_unflatten(args[14:])))
        return grads if bias_grad else grads[:3]

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.call, ctx.bias_grad = inputs[:2]
        _Rule.keep(ctx, *inputs[2:])

    @staticmethod
    def restore(ctx: Any) -> tuple[Operands, Values, Rows, Rows, Rows, list[Tangent]]:
        """x, values, their tangent, w, its tangent, tangents."""
        s = ctx.saved_tensors
        return Operands(*s[:6]), Values(*s[6:8]), Rows(*s[8:10]), Rows(*s[10:12]), Rows(*s[12:14]), _unflatten(s[14:])

    @staticmethod
    def backward(ctx: Any, *a_parts: Tensor | None) -> Any:
        call, a, need = ctx.call, Tangent(*a_parts), ctx.needs_input_grad[2:]
        x, values, _, w, wt, tangents = _Gradient.restore(ctx)
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
        for i, t in enumerate(tangents):
            wanted = need[14 + 4 * i : 18 + 4 * i]
            g = Tangent()
            if any(wanted):
                g = _Gradient.along(ctx, _replace(tangents, i, a), i, wanted[3], along_a)
            t_grads += _present(g, t)
        return None, None, *grads, *(None,) * 6, *_present(w_grad, w), *_present(wt_grad, wt), *t_grads

    @staticmethod
    def jvp(ctx: Any, _: None, __: None, *args: Tensor | None) -> Any:
        call, bias_grad = ctx.call, ctx.bias_grad
        x, values, values_t, w, wt, tangents = _Gradient.restore(ctx)
        u, moved_w, moved_wt, moved = Tangent(*args[:4]), Rows(*args[10:12]), Rows(*args[12:14]), _unflatten(args[14:])
        if not tangents:
            along_u = Rows(*args[6:8])  # the tangents of out and lse, which forward mode carried here
            terms = [gradient(call, x, values, w, [u], w_tangent=moved_w, values_tangent=along_u, bias_grad=bias_grad)]
        else:
            terms = [
                gradient(call, x, values, w, [*tangents, u], w_tangent=wt, bias_grad=bias_grad),
                gradient(
                    call,
                    x,
                    values,
                    moved_w,
                    tangents,
                    w_tangent=moved_wt,
                    values_tangent=values_t,
                    bias_grad=bias_grad,
                ),
                *(_Gradient.along(ctx, _replace(tangents, i, m), i, bias_grad) for i, m in enumerate(moved)),
            ]
        return _total(terms, x if bias_grad else x[:3])

    @staticmethod
    def along(ctx: Any, tangents: list[Tangent], i: int, bias_grad: bool, values_tangent: Rows = ZERO) -> Tangent:
        """The part linear in tangent ``i``, at these tangents: ``w'`` goes with the first, so not if that moves."""
        x, values, _, w, wt, _ = _Gradient.restore(ctx)
        wt = wt if i else ZERO
        return gradient(
            ctx.call, x, values, w, tangents, w_tangent=wt, values_tangent=values_tangent, bias_grad=bias_grad
        )
