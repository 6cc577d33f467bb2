"""Functions that keep their inputs alone: every derivative, in either mode, computes the function again.

The derivatives of such a function are such functions too, so that this closes under every nesting of
:mod:`torch.func`'s transforms and under :mod:`torch.autograd`, and none of them keeps an intermediate result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import compress
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.func import jvp, vjp, vmap
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from ..ops._function import Form, Rule

Tensors = Sequence[Tensor]
Function = Callable[..., tuple[Tensor, ...]]
Mask = Sequence[bool]
# pullback(tensors, cotangents, need): the cotangents of those inputs whose gradient is needed.
Pullback = Callable[[Tensors, Sequence[Tensor | None], Mask], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Recomputed:
    """A function of tensors, with its rule in reverse mode if it is not to be derived from the function.

    ``once`` says that the rule is the only derivative there is.
    """

    function: Function
    pullback: Pullback | None = None
    once: bool = False
    spent: bool = False

    def pull(self, tensors: Tensors, cotangents: Sequence[Tensor | None], need: Mask) -> tuple[Tensor, ...]:
        """The cotangents of the inputs that are needed."""
        if self.spent:
            _refuse()
        if self.pullback is not None:
            return self.pullback(tensors, cotangents, need)
        out, pull, *_ = vjp(lambda *moved: self.function(*merge(tensors, need, moved)), *compress(tensors, need))
        return pull(tuple(torch.zeros_like(o) if c is None else c for o, c in zip(out, cotangents, strict=True)))

    def push(self, tensors: Tensors, tangents: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
        """The tangents of the outputs."""
        if self.once or self.spent:
            _refuse()
        there, given = _pack(tangents)
        start = tuple(compress(tensors, there))
        return jvp(lambda *moved: self.function(*merge(tensors, there, moved)), start, given)[1]

    def mapped(self, dims: tuple[int | None, ...], randomness: str) -> Recomputed:
        """The function over a batch, in the first dimension of the inputs whose entry of ``dims`` is 0."""
        rule = self.pullback

        def pullback(tensors: Tensors, cotangents: Sequence[Tensor | None], need: Mask) -> tuple[Tensor, ...]:
            assert rule is not None
            there, given = _pack(cotangents)
            each = vmap(lambda x, w: rule(x, _unpack(w, there), need), (dims, 0), randomness=randomness)
            grads = each(tuple(tensors), given)
            return tuple(g if d == 0 else g.sum(0) for g, d in zip(grads, compress(dims, need), strict=True))

        function = vmap(self.function, dims, randomness=randomness)
        return replace(self, function=function, pullback=None if rule is None else pullback)


def _refuse() -> NoReturn:
    raise NotImplementedError(
        "an implicit gradient has one derivative, in reverse mode; for higher orders and for forward mode use "
        "gradient='mixed' or 'reverse'"
    )


class _Recompute(Rule):
    """The function of a :class:`Recomputed`, as a node of the graph."""

    @staticmethod
    def forward(form: Form, *tensors: Tensor) -> tuple[Tensor, ...]:
        return form.static.function(*tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        Rule.keep(ctx, inputs[0], inputs[1:])

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> Any:
        tensors = Rule.kept(ctx)[0]
        call, need = ctx.form.static, Rule.needed(ctx)
        there, given = _pack(cotangents)
        if not given:
            return None, *(None for _ in tensors)

        def function(*args: Tensor) -> tuple[Tensor, ...]:
            return call.pull(args[: len(need)], _unpack(args[len(need) :], there), need)

        grads = iter(_Recompute.of(Recomputed(function, spent=call.once), *tensors, *given))
        return None, *(next(grads) if n else None for n in need)

    @staticmethod
    def jvp(ctx: Any, _: None, *tangents: Tensor | None) -> Any:
        tensors = Rule.kept(ctx)[0]
        call, (there, given) = ctx.form.static, _pack(tangents)

        def function(*args: Tensor) -> tuple[Tensor, ...]:
            return call.push(args[: len(there)], _unpack(args[len(there) :], there))

        return _Recompute.of(Recomputed(function), *tensors, *given)

    @classmethod
    def vmap(cls, info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        form, *tensors = args
        dims = tuple(None if d is None else 0 for d in in_dims[1:])
        moved = (t if d is None else t.movedim(d, 0) for t, d in zip(tensors, in_dims[1:], strict=True))
        out = cls.of(form.static.mapped(dims, info.randomness), *moved)
        return out, (0,) * len(out)


def recompute(function: Callable[..., Any], *args: Any, pullback: Pullback | None = None, once: bool = False) -> Any:
    """``function(*args)``, of which the graph keeps the arguments' tensors alone.

    Args:
        function: Of trees, to a tree of floating-point tensors. It must take each tensor that a derivative is
            wanted of as an argument (see :mod:`metaattn.meta._closed`) and do the same when it is called again.
        *args: Trees of tensors and constants.
        pullback: Its rule in reverse mode, of the tensors in their order in the arguments' leaves; from the
            function by default.
        once: Whether that rule is the only derivative: all others raise.
    """
    tensors, restore = tensors_of(args)
    specs: list[TreeSpec] = []

    def flat(*tensors: Tensor) -> tuple[Tensor, ...]:
        leaves, spec = tree_flatten(function(*restore(tensors)))
        specs[:] = [spec]
        return tuple(leaves)

    return tree_unflatten(_Recompute.of(Recomputed(flat, pullback, once), *tensors), specs[0])


def tensors_of(tree: Any) -> tuple[list[Tensor], Callable[[Tensors], Any]]:
    """The tensors among a tree's leaves, and what puts others in their place."""
    leaves, spec = tree_flatten(tree)
    there = [isinstance(x, Tensor) for x in leaves]
    rest = [None if tensor else x for x, tensor in zip(leaves, there, strict=True)]  # holds no tensor
    return list(compress(leaves, there)), lambda tensors: tree_unflatten(merge(rest, there, tensors), spec)


def along(
    function: Function, tensors: Tensors, directions: Sequence[Tensor | None], *, still: int
) -> tuple[Tensor, ...]:
    """The derivative of ``function(*tensors)`` along the directions of the first of its tensors.

    From the place ``still`` on, floating-point tensors get a tangent of zeros. Without one PyTorch (2.13; held by
    ``tests/boundaries``) refuses the gradient of :func:`torch.nn.functional.mse_loss`, whose target has none.
    """
    there = [i < len(directions) or (i >= still and t.is_floating_point()) for i, t in enumerate(tensors)]
    start = tuple(compress(tensors, there))
    known = [*directions, *[None] * (len(start) - len(directions))]
    tangents = tuple(torch.zeros_like(t) if d is None else d for t, d in zip(start, known, strict=True))
    return jvp(lambda *moved: function(*merge(tensors, there, moved)), start, tangents)[1]


def merge(entries: Sequence[Any], there: Mask, others: Sequence[Any]) -> list[Any]:
    """The entries, with the others in the places that ``there`` marks."""
    rest = iter(others)
    return [next(rest) if replaced else e for e, replaced in zip(entries, there, strict=True)]


def _pack(entries: Sequence[Tensor | None]) -> tuple[tuple[bool, ...], tuple[Tensor, ...]]:
    return tuple(e is not None for e in entries), tuple(e for e in entries if e is not None)


def _unpack(given: Tensors, there: Mask) -> list[Tensor | None]:
    return merge([None] * len(there), there, given)


class Replay:
    """The state of the generators of random numbers, to draw the same ones again and again.

    Args:
        tensors: Those whose devices' generators count, beside the CPU's.
    """

    def __init__(self, tensors: Tensors) -> None:
        self.devices = sorted({t.device.index for t in tensors if t.is_cuda})
        self.start = self.end = self._state()

    def _state(self) -> list[Tensor]:
        return [torch.get_rng_state(), *map(torch.cuda.get_rng_state, self.devices)]

    def _set(self, state: list[Tensor]) -> None:
        torch.set_rng_state(state[0])
        for s, device in zip(state[1:], self.devices, strict=True):
            torch.cuda.set_rng_state(s, device)

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Draw from the start; the generators are afterwards as they were before."""
        with torch.random.fork_rng(self.devices):
            self._set(self.start)
            yield
            self.end = self._state()

    def advance(self) -> None:
        """Go on where the draws ended."""
        self._set(self.end)

    def drew(self) -> bool:
        """Whether random numbers were drawn."""
        return any(not torch.equal(a, b) for a, b in zip(self.start, self.end, strict=True))
