"""A function that is run again for its derivatives, and what they are: functions of that kind."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._functorch import eager_transforms
from torch.autograd import forward_ad

from ._executor import Executor, FunctionKey
from ._pytree import Tensors, put

Flat = Callable[..., Tensors]  # of tensors, to a tuple of tensors
# pullback(x, w, wrt, of): from cotangents ``w`` of the outputs ``of`` to those of the inputs ``wrt``, at ``x``.
Pullback = Callable[[Tensors, Tensors, Sequence[int], Sequence[int]], Tensors]


@dataclass(frozen=True, eq=False)
class Derivable:
    """A function as it runs at first, and as it runs again: with the random numbers it drew then.

    Args:
        first: At the first run.
        again: At all later ones.
        kinds: The transforms at work at the first run, outermost first.
        pullback: Its rule in reverse mode, if that is not to be derived from the function.
        refusal: If the pullback is the only derivative there is: what all others raise.
        key: What it computes, if it may run compiled.
        executor: That of the first run, which a backward pass in another thread would not see.
    """

    first: Flat
    again: Flat
    kinds: tuple[Any, ...]
    pullback: Pullback | None = None
    refusal: str = ""
    key: FunctionKey | None = None
    executor: Executor | None = None

    def vjp(self, count: int, wrt: Sequence[int], of: Sequence[int]) -> Derivable:
        """From ``count`` inputs and cotangents of the outputs ``of`` to the cotangents of the inputs ``wrt``."""
        if self.pullback is None:
            self._check_refusal()
        rule = self.pullback or functools.partial(_pullback, self.again)

        def again(*args: Tensor) -> Tensors:
            return rule(args[:count], args[count:], wrt, of)

        key = self._key("vjp", count, tuple(wrt), tuple(of))
        return Derivable(again, again, self.kinds, refusal=self.refusal, key=key, executor=self.executor)

    def jvp(self, count: int, wrt: Sequence[int], *, values: bool) -> Derivable:
        """:func:`pushforward` of the function: with ``values`` in the place of its first run, else after it."""
        self._check_refusal()
        again = pushforward(self.again, count, wrt, values=values)
        first = pushforward(self.first, count, wrt, values=True) if values else again
        key = self._key("jvp", count, tuple(wrt), values)
        return Derivable(first, again, self.kinds, key=key, executor=self.executor)

    def vmap(self, in_dims: tuple[int | None, ...], level: int, randomness: str) -> Derivable:
        """Vectorised at a level. A vmap that came after the first run must not draw other numbers for each entry."""
        if level > len(self.kinds) or self.kinds[level - 1] != torch._C._functorch.TransformType.Vmap:
            randomness = "same"
        per_example = self.pullback

        def pullback(x: Tensors, w: Tensors, wrt: Sequence[int], of: Sequence[int]) -> Tensors:
            assert per_example is not None
            dims = [in_dims[i] for i in wrt]
            each = torch.func.vmap(
                lambda x, w: per_example(x, w, wrt, of),
                (in_dims, 0),
                tuple(d or 0 for d in dims),
                randomness=randomness,
            )
            return tuple(g.sum(0) if d is None else g for g, d in zip(each(x, w), dims, strict=True))

        first, again = (torch.func.vmap(f, in_dims, randomness=randomness) for f in (self.first, self.again))
        rule = None if per_example is None else pullback
        key = self._key("vmap", in_dims)
        return Derivable(first, again, self.kinds[: level - 1], rule, self.refusal, key, self.executor)

    def _key(self, *transform: Hashable) -> FunctionKey | None:
        return None if self.key is None else self.key.then(*transform)

    def _check_refusal(self) -> None:
        if self.refusal:
            raise NotImplementedError(self.refusal)


def differentiable(t: Tensor) -> bool:
    """Whether tensors of this dtype have derivatives."""
    return t.is_floating_point() or t.is_complex()


def _pullback(f: Flat, x: Tensors, w: Tensors, wrt: Sequence[int], of: Sequence[int]) -> Tensors:
    """The :data:`Pullback` of a function that has no other."""

    def moving(*moved: Tensor) -> Tensors:
        out = f(*put(x, wrt, moved))
        return tuple(out[i] for i in of)

    return _vjp(moving, [x[i] for i in wrt], w, (*x, *w))


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


def pushforward(f: Flat, count: int, wrt: Sequence[int], *, values: bool) -> Flat:
    """From ``count`` inputs and tangents of the inputs ``wrt`` to the tangents of all differentiable outputs.

    With ``values`` all outputs come first, and then a tangent of each, zero for those that have none.
    """

    def pushforward(*args: Tensor) -> Tensors:
        x = args[:count]
        rest: list[Any] = []

        def moving(*moved: Tensor) -> tuple[Tensors, tuple[Tensor, ...]]:
            out = f(*put(x, wrt, moved))
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
