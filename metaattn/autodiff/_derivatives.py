"""Functions that are recomputed for their derivatives, which are functions of the same kind."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ._executor import Executor, FunctionKey
from ._functorch import (
    TransformType,
    in_dual_level,
    in_transform,
    is_legacy_batched,
    jvp_is_active,
    set_forward_mode_enabled,
)
from ._pytree import Tensors, replace_at

TensorFunction = Callable[..., Tensors]  # of tensors, returns a tuple of tensors
# pullback(x, w, inputs, outputs): from cotangents ``w`` of some outputs, to the cotangents of some inputs, at ``x``.
Pullback = Callable[[Tensors, Tensors, Sequence[int], Sequence[int]], Tensors]


@dataclass(frozen=True, eq=False)
class TransformableFunction:
    """A function as it runs first, and as it is recomputed; its vjp, jvp and vmap are again such functions.

    Args:
        first: The function in its first run.
        again: The function in all later runs, in which it draws the random numbers of the first run.
        transforms: The transforms that were active at the first run, the outermost first.
        pullback: Its rule for reverse mode; ``None`` to derive one from the function.
        unsupported_message: If the pullback is the only derivative: the message of the error that all others raise.
        key: Identity of the function, if it may run compiled.
        executor: The executor of the first run. A backward pass in another thread would not see it.
    """

    first: TensorFunction
    again: TensorFunction
    transforms: tuple[Any, ...]
    pullback: Pullback | None = None
    unsupported_message: str = ""
    key: FunctionKey | None = None
    executor: Executor | None = None

    def vjp(self, count: int, inputs: Sequence[int], outputs: Sequence[int]) -> TransformableFunction:
        """Return the vjp: from all ``count`` inputs, and cotangents of some outputs, to cotangents of some inputs."""
        if self.pullback is None:
            self._check_supported()
        rule = self.pullback or functools.partial(_pullback, self.again)

        def again(*args: Tensor) -> Tensors:
            return rule(args[:count], args[count:], inputs, outputs)

        return TransformableFunction(
            again,
            again,
            self.transforms,
            unsupported_message=self.unsupported_message,
            key=self._key("vjp", count, tuple(inputs), tuple(outputs)),
            executor=self.executor,
        )

    def jvp(self, count: int, inputs: Sequence[int], *, values: bool) -> TransformableFunction:
        """Return the :func:`pushforward`; with ``values``, it takes the place of the function's first run."""
        self._check_supported()
        again = pushforward(self.again, count, inputs, values=values)
        first = pushforward(self.first, count, inputs, values=True) if values else again
        key = self._key("jvp", count, tuple(inputs), values)
        return TransformableFunction(first, again, self.transforms, key=key, executor=self.executor)

    def vmap(self, in_dims: tuple[int | None, ...], level: int, randomness: str) -> TransformableFunction:
        """Return the function mapped over some inputs by the vmap at a level.

        A vmap that was not active at the first run must not draw different random numbers for each entry.
        """
        if level > len(self.transforms) or self.transforms[level - 1] != TransformType.Vmap:
            randomness = "same"
        per_example = self.pullback

        def pullback(x: Tensors, w: Tensors, inputs: Sequence[int], outputs: Sequence[int]) -> Tensors:
            assert per_example is not None
            dims = [in_dims[i] for i in inputs]
            each = torch.func.vmap(
                lambda x, w: per_example(x, w, inputs, outputs),
                (in_dims, 0),
                tuple(d or 0 for d in dims),
                randomness=randomness,
            )
            return tuple(g.sum(0) if d is None else g for g, d in zip(each(x, w), dims, strict=True))

        first, again = (torch.func.vmap(f, in_dims, randomness=randomness) for f in (self.first, self.again))
        return TransformableFunction(
            first,
            again,
            self.transforms[: level - 1],
            None if per_example is None else pullback,
            self.unsupported_message,
            self._key("vmap", in_dims),
            self.executor,
        )

    def _key(self, *transform: Hashable) -> FunctionKey | None:
        return None if self.key is None else self.key.then(*transform)

    def _check_supported(self) -> None:
        if self.unsupported_message:
            raise NotImplementedError(self.unsupported_message)


def differentiable(t: Tensor) -> bool:
    """Return whether tensors of this dtype have derivatives."""
    return t.is_floating_point() or t.is_complex()


def _pullback(f: TensorFunction, x: Tensors, w: Tensors, inputs: Sequence[int], outputs: Sequence[int]) -> Tensors:
    """Apply the :data:`Pullback` of a function that has no explicit one."""

    def of_some_inputs(*differentiated: Tensor) -> Tensors:
        out = f(*replace_at(x, inputs, differentiated))
        return tuple(out[i] for i in outputs)

    return _vjp(of_some_inputs, [x[i] for i in inputs], w, (*x, *w))


def _vjp(f: TensorFunction, x: Sequence[Tensor], w: Sequence[Tensor], arguments: Sequence[Tensor]) -> Tensors:
    """Return the vjp of ``f`` at ``x`` applied to ``w``, by :func:`torch.func.vjp` where a transform is active.

    Elsewhere by plain autograd, which builds a graph of the gradient only if one of the ``arguments`` that ``f`` uses
    requires a gradient. At the end of a backward pass none does, and there :func:`torch.func.vjp`, which always builds
    the graph, took twice the memory. :func:`torch.func.vjp` also fails inside hooks on saved tensors.
    """
    transformed = in_transform() or in_dual_level()
    if transformed or any(map(is_legacy_batched, arguments)):
        pull: Callable[..., Tensors] = torch.func.vjp(f, *x)[1]
        return pull(tuple(w))
    with torch.enable_grad():
        differentiated = [t.view_as(t) if t.requires_grad else t.detach().requires_grad_() for t in x]
        pairs = [(o, c) for o, c in zip(f(*differentiated), w, strict=True) if o.requires_grad]
        if not pairs:
            return tuple(map(torch.zeros_like, x))
        out, cotangents = zip(*pairs, strict=True)
        create_graph = any(t.requires_grad for t in arguments)
        return torch.autograd.grad(out, differentiated, cotangents, create_graph=create_graph, materialize_grads=True)


def pushforward(f: TensorFunction, count: int, inputs: Sequence[int], *, values: bool) -> TensorFunction:
    """Return the jvp of a function: from all ``count`` inputs, and tangents of some, to tangents of the outputs.

    Args:
        f: A function of tensors that returns a tuple of tensors.
        count: Number of its inputs.
        inputs: Indices of the inputs that have a tangent.
        values: Return all outputs and then a tangent of each, zero for those that are not differentiable. Otherwise
            return only the tangents of the differentiable outputs.
    """

    def pushforward(*args: Tensor) -> Tensors:
        x = args[:count]
        is_differentiable: list[bool] = []

        def of_some_inputs(*differentiated: Tensor) -> tuple[Tensors, tuple[Tensor, ...]]:
            out = f(*replace_at(x, inputs, differentiated))
            is_differentiable[:] = [differentiable(o) for o in out]
            return tuple(o for o in out if differentiable(o)), tuple(o for o in out if not differentiable(o))

        out, tangents, constant = _jvp(of_some_inputs, tuple(x[i] for i in inputs), args[count:])
        if not values:
            return tangents
        a, b, c = iter(out), iter(constant), iter(tangents)
        outputs = [next(a) if d else next(b) for d in is_differentiable]
        return *outputs, *(
            next(c) if d else torch.zeros_like(o) for d, o in zip(is_differentiable, outputs, strict=True)
        )

    return pushforward


def _jvp(f: Callable[..., tuple[Tensors, Tensors]], x: Tensors, t: Tensors) -> tuple[Tensors, Tensors, Tensors]:
    """Return outputs, tangents and constant outputs of a function, as :func:`torch.func.jvp` with ``has_aux`` does.

    Unlike that, it also works inside of a ``dual_level`` that the user opened.
    """
    if not in_dual_level() or jvp_is_active():
        result: Any = torch.func.jvp(f, x, t, has_aux=True)
        return result
    with set_forward_mode_enabled(True):
        out, constant = f(*(forward_ad.make_dual(a, b) for a, b in zip(x, t, strict=True)))
        pairs = [forward_ad.unpack_dual(o) for o in out]
    tangents = tuple(torch.zeros_like(p.primal) if p.tangent is None else p.tangent for p in pairs)
    return tuple(p.primal for p in pairs), tangents, constant
