"""The pieces of a compiled meta-step: an inner step and its derivative, the outer loss and its derivative.

Each is recorded and lowered once and run at every inner step: the number of steps is in none of them. So the step's
index is a tensor, and the parameters that are adapted are of their own for each task from the first step on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.func import grad, vjp

from ..autodiff import (
    CustomFunction,
    Pullback,
    TransformType,
    active_transforms,
    differentiable,
    is_differentiated,
    recompute,
    replace_at,
    split_tensors,
)
from ..compile.cache_key import function_key
from ..compile.compiler import MetaStepCompiler, active_compiler
from ._closure_checks import check_loop, check_loss
from ._hvp import Vector, gradient_along
from ._inner_loop import Loop, StepOf, detach
from .optim import Params, Rates, State

Kind = Literal["reverse", "mixed", "first_order"]


def compiled_step(loop: Loop, adapted: Params, state: State, kind: Kind) -> StepOf | None:
    """A step of the loop as a compiled piece, if the meta-step is compiled and this can be.

    Args:
        loop: What the steps are made of.
        adapted: What they start from.
        state: Likewise.
        kind: How the inner gradient is differentiated: by recomputing it backwards, by forward over reverse, or not.
    """
    pieces = active_compiler()
    if pieces is None:
        return None
    source = function_key("step", kind, loop.names, loop.loss, loop.optimizer)

    def check() -> str | None:
        if kind == "mixed":
            check_loop(loop, adapted, state)  # what it refuses is an error, compiled or not
        return _reason(lambda: check_loop(loop, adapted, state))

    if not pieces.admits(source, check):
        return None
    device = next(iter(adapted.values())).device

    def gradient(adapted: Params, fixed: Params, data: tuple[Any, ...]) -> Params:
        g = grad(loop.objective)(adapted, fixed, data)
        return detach(g) if kind == "first_order" else g

    def run(
        adapted: Params, state: State, fixed: Params, data: tuple[Any, ...], rates: Rates, index: Tensor
    ) -> tuple[Params, State]:
        return loop.optimizer.update(gradient(adapted, fixed, data), state, adapted, rates, index)

    def step(
        adapted: Params, state: State, fixed: Params, data: tuple[Any, ...], rates: Rates, index: int
    ) -> tuple[Params, State]:
        args = (adapted, state, fixed, data, rates, torch.full((), index, device=device))
        pullback = _forward_over_reverse(loop, args) if kind == "mixed" else None
        new: tuple[Params, State] = recompute(run, *args, pullback=pullback, key=source)
        return new

    return step


def _forward_over_reverse(loop: Loop, args: Any) -> Pullback:
    """The derivative of a step: back through the update, and then :func:`gradient_along` its cotangent."""
    _, restore = split_tensors(args)
    adapted, _, fixed, data, _, _ = args
    # The places of the tensors: those of the loss are the adapted, the fixed and the data.
    sizes = [len(split_tensors(tree)[0]) for tree in args]
    bounds = [sum(sizes[:i]) for i in range(len(sizes) + 1)]
    of_loss = [*range(bounds[1]), *range(bounds[2], bounds[4])]
    own = range(bounds[1])
    _, restore_loss = split_tensors((adapted, fixed, data))

    def objective(*here: Tensor) -> Tensor:
        return loop.objective(*restore_loss(here))

    def pullback(x: Vector, w: Vector, wrt: Sequence[int], of: Sequence[int]) -> Vector:
        in_loss = tuple(x[i] for i in of_loss)
        found = grad(lambda moved: objective(*replace_at(in_loss, own, moved)))(in_loss[: len(own)])
        in_update = [i for i in wrt if i not in range(bounds[2], bounds[4])]

        def update(found: Vector, *moved: Tensor) -> Vector:
            adapted, state, _, _, rates, index = restore(replace_at(x, in_update, moved))
            gradients = dict(zip(adapted, found, strict=True))
            out = split_tensors(loop.optimizer.update(gradients, state, adapted, rates, index))[0]
            return tuple(out[i] for i in of)

        direction, *parts = vjp(update, found, *(x[i] for i in in_update))[1](w)
        total = dict(zip(in_update, parts, strict=True))
        wanted = [i for i in wrt if i in of_loss]
        along = gradient_along(
            objective, in_loss, own, direction, [of_loss.index(i) for i in wanted], still=len(own) + sizes[2]
        )
        for i, g in zip(wanted, along, strict=True):
            total[i] = total[i] + g if i in total else g
        return tuple(total[i] for i in wrt)

    return pullback


def scored(loss: Callable[..., Any], params: Params, batch: Sequence[Tensor]) -> Any:
    """``loss(params, *batch)``; as a compiled piece if the meta-step is compiled and this can be.

    Its gradient is wanted once, and is found beside its value.
    """
    pieces = active_compiler()
    if pieces is None:
        return loss(params, *batch)
    source = function_key("loss", loss)
    if not pieces.admits(source, lambda: _reason(lambda: check_loss(loss, params, batch))):
        return loss(params, *batch)

    def run(params: Params, batch: tuple[Tensor, ...]) -> Any:
        return loss(params, *batch)

    moving = {k: p for k, p in params.items() if differentiable(p) and is_differentiated(p)}
    if not moving or set(active_transforms()) - {TransformType.Vmap} or any(is_differentiated(t) for t in batch):
        return recompute(run, params, tuple(batch), key=source)

    def with_gradient(moving: Params, still: Params, batch: tuple[Tensor, ...]) -> Any:
        def value(moving: Params) -> tuple[Tensor, Any]:
            out = run({k: moving[k] if k in moving else still[k] for k in params}, batch)
            return (out[0] if isinstance(out, tuple) else out), out

        return grad(value, has_aux=True)(moving)

    still = {k: p for k, p in params.items() if k not in moving}
    gradient, out = recompute(
        with_gradient, detach(moving), detach(still), tuple(batch), key=source.then("with gradient", tuple(params))
    )
    outputs, restore = split_tensors(out)
    known = _WithGradient.invoke((len(outputs), len(moving), pieces), *outputs, *moving.values(), *gradient.values())
    return restore(known)


def _reason(check: Callable[[], bool]) -> str | None:
    """Why a loss that is checked so cannot be compiled, though it runs."""
    try:
        drew = check()
    except ValueError as error:
        return str(error).removeprefix("with this gradient, ").removesuffix("; or use gradient='reverse'")
    return "it draws random numbers, which would not be those of an eager run" if drew else None


def spread(adapted: Params, data: Any) -> Params:
    """Parameters of their own for each entry of what the data are mapped over, in memory of their own."""
    if active_compiler() is None:
        return adapted
    like = [t.detach() for t in split_tensors(data)[0]]
    return dict(zip(adapted, _Spread.invoke(len(adapted), *adapted.values(), *like), strict=True))


class _Spread(CustomFunction):
    """The first tensors, mapped wherever another one is: the rule for vmap folds all."""

    @staticmethod
    def forward(form: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(t.view_as(t) if t.is_contiguous() else t.contiguous() for t in tensors[: form.static])

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.count = inputs[0].static
        ctx.others = len(inputs) - 1 - ctx.count
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *w: Tensor | None) -> Any:
        return None, *w, *(None,) * ctx.others

    @staticmethod
    def jvp(ctx: Any, _: None, *moved: Tensor | None) -> Any:
        return tuple(None if t is None else t.view_as(t) for t in moved[: ctx.count])


class _WithGradient(CustomFunction):
    """A scalar and what is told beside it, with its known gradient. Tensors: all of these, parameters, gradients."""

    @staticmethod
    def forward(form: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(t.view_as(t) for t in tensors[: form.static[0]])

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        outputs, moving, ctx.compiler = inputs[0].static
        ctx.counts = outputs, moving
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(o for o in output if not differentiable(o)))
        ctx.save_for_backward(*inputs[1 + outputs + moving :])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, w: Tensor | None, *others: Tensor | None) -> Any:
        outputs, moving = ctx.counts
        if any(t is not None for t in others):
            raise NotImplementedError(
                "compiled, what a loss tells beside its value has no derivative; leave out mode='inductor'"
            )
        grads = (None,) * moving if w is None else _scaled(ctx.compiler, w, *ctx.saved_tensors)
        return None, *(None,) * outputs, *grads, *(None,) * moving


def _scaled(pieces: MetaStepCompiler, w: Tensor, *grads: Tensor) -> tuple[Tensor, ...]:
    """Gradients times a number for each of the tasks; compiled if the meta-step is."""

    def scaled(w: Tensor, *grads: Tensor) -> tuple[Tensor, ...]:
        return tuple((w.reshape(w.shape + (1,) * (g.dim() - w.dim())) * g).to(g.dtype) for g in grads)

    compiled = pieces.run(function_key("scaled"), scaled, (w, *grads))
    return scaled(w, *grads) if compiled is None else compiled
