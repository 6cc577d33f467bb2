"""One function that saves only its inputs, and whose derivatives are such functions again.

The vjp of a checkpointed function is a checkpoint of ``torch.func.vjp`` of it, its jvp one of
``torch.func.jvp``, and under vmap it is one of ``torch.func.vmap``: closed to any order, and in no rule is
there an ordinary operation (see the trap in :mod:`metaattn.ops._rules`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._functorch import eager_transforms
from torch.autograd import forward_ad

from ._function import Form, Rule, in_forward_mode, tangent_at_hand
from ._strangers import check_outputs

Tensors = tuple[Tensor, ...]
Flat = Callable[..., Tensors]  # of tensors, to a tuple of tensors


@dataclass(frozen=True, eq=False)
class Program:
    """A function as it runs at first, and as it runs again: with the random numbers it drew then.

    ``kinds`` are the transforms at work at the first run, outermost first.
    """

    first: Flat
    again: Flat
    kinds: tuple[Any, ...]

    def derived(self, transform: Callable[[Flat], Flat]) -> Program:
        """A transform of what runs again."""
        again = transform(self.again)
        return Program(again, again, self.kinds)

    def mapped(self, in_dims: tuple[int | None, ...], level: int, randomness: str) -> Program:
        """Vectorised at a level. A vmap that came after the first run must not draw other numbers for each entry."""
        vmap = torch._C._functorch.TransformType.Vmap
        if level > len(self.kinds) or self.kinds[level - 1] != vmap:
            randomness = "same"

        def over(f: Flat) -> Flat:
            return torch.func.vmap(f, in_dims, randomness=randomness)

        return Program(over(self.first), over(self.again), self.kinds[: level - 1])


def differentiable(t: Tensor) -> bool:
    """Whether tensors of this dtype have derivatives."""
    return t.is_floating_point() or t.is_complex()


def _pullback(f: Flat, count: int, wrt: Sequence[int], of: Sequence[int]) -> Flat:
    """From ``count`` inputs and cotangents of the outputs ``of`` to the cotangents of the inputs ``wrt``."""

    def pullback(*args: Tensor) -> Tensors:
        x = args[:count]

        def moving(*moved: Tensor) -> Tensors:
            out = f(*_put(x, wrt, moved))
            return tuple(out[i] for i in of)

        return _vjp(moving, [x[i] for i in wrt], args[count:], args)

    return pullback


def _vjp(f: Flat, x: Sequence[Tensor], w: Sequence[Tensor], given: Sequence[Tensor]) -> Tensors:
    """:func:`torch.func.vjp` and its result at ``w``; by plain autograd where no transform is at work.

    That builds a graph of the gradient only if one is needed, for one of the tensors ``given`` to ``f``: at the end of
    a backward pass none is, and there :func:`torch.func.vjp`, which always builds it, took twice the memory. Nor does
    :func:`torch.func.vjp` run within hooks on saved tensors.
    """
    transformed = torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0
    if transformed or any(map(torch._C._functorch.is_legacy_batchedtensor, given)):
        pull: Callable[..., Tensors] = torch.func.vjp(f, *x)[1]
        return pull(tuple(w))
    with torch.enable_grad():
        moved = [t.view_as(t) if t.requires_grad else t.detach().requires_grad_() for t in x]
        pairs = [(o, c) for o, c in zip(f(*moved), w, strict=True) if o.requires_grad]
        if not pairs:
            return tuple(map(torch.zeros_like, x))
        out, cotangents = zip(*pairs, strict=True)
        create_graph = any(t.requires_grad for t in given)
        return torch.autograd.grad(out, moved, cotangents, create_graph=create_graph, materialize_grads=True)


def _pushforward(f: Flat, count: int, wrt: Sequence[int], *, values: bool) -> Flat:
    """From ``count`` inputs and tangents of the inputs ``wrt`` to the tangents of all differentiable outputs.

    With ``values`` all outputs come first, and then a tangent of each, zero for those that have none.
    """

    def pushforward(*args: Tensor) -> Tensors:
        x = args[:count]
        rest: list[Any] = []

        def moving(*moved: Tensor) -> tuple[Tensors, tuple[Tensor, ...]]:
            out = f(*_put(x, wrt, moved))
            rest[:] = [differentiable(o) for o in out]
            return tuple(o for o in out if differentiable(o)), tuple(o for o in out if not differentiable(o))

        out, tangents, constant = _jvp(moving, tuple(x[i] for i in wrt), args[count:])
        if not values:
            return tangents
        a, b, c = iter(out), iter(constant), iter(tangents)
        outputs = [next(a) if d else next(b) for d in rest]
        return *outputs, *(next(c) if d else torch.zeros_like(o) for d, o in zip(rest, outputs, strict=True))

    return pushforward


def _jvp(f: Callable[..., tuple[Tensors, Tensors]], x: Tensors, t: Tensors) -> tuple[Tensors, Tensors, Tensors]:
    """:func:`torch.func.jvp` of a function with constant outputs; also inside of ``dual_level``, where that raises."""
    if forward_ad._current_level < 0 or eager_transforms.JVP_NESTING:
        moved: Any = torch.func.jvp(f, x, t, has_aux=True)
        return moved
    with forward_ad._set_fwd_grad_enabled(True):
        out, constant = f(*(forward_ad.make_dual(a, b) for a, b in zip(x, t, strict=True)))
        pairs = [forward_ad.unpack_dual(o) for o in out]
    tangents = tuple(torch.zeros_like(p.primal) if p.tangent is None else p.tangent for p in pairs)
    return tuple(p.primal for p in pairs), tangents, constant


def _put(x: Sequence[Tensor], where: Sequence[int], by: Sequence[Tensor]) -> list[Tensor]:
    out = list(x)
    for i, t in zip(where, by, strict=True):
        out[i] = t
    return out


class Remat(Rule):
    """A :class:`Program` as one function. Tensors: those of the program, all of them there."""

    @classmethod
    def call(cls, form: Form, *tensors: Tensor) -> Any:
        """In forward mode the tangents are at hand: values and tangents are one program, see ``_rules._Forward``."""
        if not in_forward_mode() or any(t.requires_grad for t in tensors):
            return cls.apply(form, *tensors)
        tangents = [tangent_at_hand(t) if differentiable(t) else None for t in tensors]
        known = [t for t in tangents if t is not None]
        if not known or any(map(torch._C._functorch.is_legacy_batchedtensor, known)):
            return cls.apply(form, *tensors)
        wrt = [i for i, t in enumerate(tangents) if t is not None]
        program: Program = form.static

        def both(f: Flat) -> Flat:
            return _pushforward(f, len(tensors), wrt, values=True)

        primals = [forward_ad.unpack_dual(t).primal for t in tensors]
        parts = cls.of(Program(both(program.first), both(program.again), program.kinds), *primals, *known)
        half = len(parts) // 2
        return tuple(
            forward_ad.make_dual(p, t) if differentiable(p) else p
            for p, t in zip(parts[:half], parts[half:], strict=True)
        )

    @staticmethod
    def forward(form: Form, *tensors: Tensor) -> Tensors:
        # The vmap of ``is_grads_batched`` has no rule for detach, and nothing to detach.
        inputs = [t if torch._C._functorch.is_legacy_batchedtensor(t) else t.detach() for t in tensors]
        before = [t._version for t in inputs]
        with torch.enable_grad():  # no graph comes of it, but for a tensor that is not given
            outputs = form.static.first(*inputs)
        if [t._version for t in inputs] != before:
            raise ValueError(
                "the function changed an argument, or a buffer of its module, in place: run again it would not give "
                "the same; return the new value instead"
            )
        check_outputs(outputs)
        return outputs

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        Rule.keep(ctx, inputs[0], inputs[1:])
        ctx.mark_non_differentiable(*(o for o in output if not differentiable(o)))
        ctx.outputs = [differentiable(o) for o in output]

    @staticmethod
    def backward(ctx: Any, *w: Tensor | None) -> Any:
        x = Rule.kept(ctx)[0]
        needed = Rule.needed(ctx)
        wrt = [i for i, t in enumerate(x) if needed[i] and differentiable(t)]
        of = [i for i, (t, d) in enumerate(zip(w, ctx.outputs, strict=True)) if t is not None and d]
        grads: list[Tensor | None] = [None] * len(x)
        if of and wrt:
            pulled = ctx.form.static.derived(lambda f: _pullback(f, len(x), wrt, of))
            for i, g in zip(wrt, Remat.of(pulled, *x, *(w[i] for i in of)), strict=True):
                grads[i] = g
        return None, *grads

    @staticmethod
    def jvp(ctx: Any, _: None, *tangents: Tensor | None) -> Any:
        x = Rule.kept(ctx)[0]
        wrt = [i for i, t in enumerate(tangents) if t is not None and differentiable(x[i])]
        if not wrt:
            return (None,) * len(ctx.outputs)
        pushed = ctx.form.static.derived(lambda f: _pushforward(f, len(x), wrt, values=False))
        moved = iter(Remat.of(pushed, *x, *(tangents[i] for i in wrt)))
        return tuple(next(moved) if d else None for d in ctx.outputs)

    @classmethod
    def vmap(cls, info: Any, in_dims: tuple[Any, ...], form: Form, *tensors: Tensor) -> tuple[Tensors, tuple[int, ...]]:
        """The mapped program, one level down."""
        level = 1 + len(torch._C._functorch.get_interpreter_stack() or ())
        out = cls.of(form.static.mapped(in_dims[1:], level, info.randomness), *tensors)
        return out, (0,) * len(out)
