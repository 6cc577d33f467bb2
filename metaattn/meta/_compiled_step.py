"""The parts of a meta-step that are compiled: an inner step, the outer loss, and their derivatives.

Each is recorded and compiled once, whatever the number of inner steps. Parameters are expanded per task before the
first step, so that every inner step has the same shapes and shares one graph; the number of the step is a tensor.
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
from ._hvp import Vector, hessian_product
from ._inner_loop import Loop, StepFunction, detach
from .optim import Params, Rates, State

Kind = Literal["reverse", "mixed", "first_order"]


def compiled_step(loop: Loop, adapted: Params, state: State, kind: Kind) -> StepFunction | None:
    """Return a step of the loop that runs compiled; ``None`` if the meta-step is not compiled, or the step cannot be.

    Args:
        loop: The inner loop.
        adapted: The parameters that it starts from.
        state: The state of the optimizer that it starts from.
        kind: How the inner gradient is differentiated: by running it again in reverse mode, forward over reverse, or
            not at all.

    Raises:
        ValueError: See :func:`check_loop`; with ``kind="mixed"`` only.
    """
    compiler = loop.compiler
    if compiler is None:
        return None
    key = function_key("step", kind, loop.names, loop.loss, loop.optimizer)

    def check() -> str | None:
        if kind == "mixed":
            check_loop(loop, adapted, state)  # an error in mixed mode, compiled or not
        return _why_not_compiled(lambda: check_loop(loop, adapted, state))

    if not compiler.admits(key, check):
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
        new: tuple[Params, State] = recompute(run, *args, pullback=pullback, key=key)
        return new

    return step


def _forward_over_reverse(loop: Loop, args: Any) -> Pullback:
    """Return the derivative of a step: back through the update, then a Hessian product along the cotangent it gives."""
    _, restore = split_tensors(args)
    adapted, _, fixed, data, _, _ = args
    # Of the step's tensors, the loss takes the adapted and fixed parameters and the data: the first, third and fourth
    # argument. Places among the step's tensors are numbered as in ``args``, those among the loss's as in ``of_loss``.
    sizes = [len(split_tensors(tree)[0]) for tree in args]
    bounds = [sum(sizes[:i]) for i in range(len(sizes) + 1)]
    of_adapted, only_in_loss = range(bounds[1]), range(bounds[2], bounds[4])
    of_loss = [*of_adapted, *only_in_loss]
    _, restore_loss = split_tensors((adapted, fixed, data))

    def objective(*x: Tensor) -> Tensor:
        return loop.objective(*restore_loss(x))

    def pullback(x: Vector, w: Vector, wrt: Sequence[int], outputs: Sequence[int]) -> Vector:
        x_loss = tuple(x[i] for i in of_loss)
        gradient = grad(lambda adapted: objective(*replace_at(x_loss, of_adapted, adapted)))(x_loss[: len(of_adapted)])
        wrt_update = [i for i in wrt if i not in only_in_loss]
        wrt_loss = [i for i in wrt if i in of_loss]

        def update(gradient: Vector, *moved: Tensor) -> Vector:
            adapted, state, _, _, rates, index = restore(replace_at(x, wrt_update, moved))
            gradients = dict(zip(adapted, gradient, strict=True))
            out = split_tensors(loop.optimizer.update(gradients, state, adapted, rates, index))[0]
            return tuple(out[i] for i in outputs)

        direction, *through_update = vjp(update, gradient, *(x[i] for i in wrt_update))[1](w)
        through_gradient = hessian_product(
            objective,
            x_loss,
            of_adapted,
            direction,
            [of_loss.index(i) for i in wrt_loss],
            first_data=len(of_adapted) + sizes[2],
        )
        total = dict(zip(wrt_update, through_update, strict=True))
        for i, g in zip(wrt_loss, through_gradient, strict=True):
            total[i] = total[i] + g if i in total else g
        return tuple(total[i] for i in wrt)

    return pullback


def scored(loss: Callable[..., Any], params: Params, batch: Sequence[Tensor]) -> Any:
    """Return ``loss(params, *batch)``; compiled if the meta-step is compiled and the loss can be.

    A compiled loss computes its gradient with its value, since an outer loss is differentiated once.

    Args:
        loss: Returns a scalar, or a tuple of a scalar and a tree of metrics.
        params: Parameters by name.
        batch: What the loss takes after the parameters.
    """
    compiler = active_compiler()
    if compiler is None:
        return loss(params, *batch)
    key = function_key("loss", loss)
    if not compiler.admits(key, lambda: _why_not_compiled(lambda: check_loss(loss, params, batch))):
        return loss(params, *batch)

    def run(params: Params, batch: tuple[Tensor, ...]) -> Any:
        return loss(params, *batch)

    moving = {k: p for k, p in params.items() if differentiable(p) and is_differentiated(p)}
    if not moving or set(active_transforms()) - {TransformType.Vmap} or any(is_differentiated(t) for t in batch):
        return recompute(run, params, tuple(batch), key=key)

    def with_gradient(moving: Params, constant: Params, batch: tuple[Tensor, ...]) -> Any:
        def value(moving: Params) -> tuple[Tensor, Any]:
            out = run({k: moving[k] if k in moving else constant[k] for k in params}, batch)
            return (out[0] if isinstance(out, tuple) else out), out

        return grad(value, has_aux=True)(moving)

    constant = {k: p for k, p in params.items() if k not in moving}
    gradient, out = recompute(
        with_gradient, detach(moving), detach(constant), tuple(batch), key=key.then("with gradient", tuple(params))
    )
    outputs, restore = split_tensors(out)
    static = (len(outputs), len(moving), compiler)
    return restore(_LossWithGradient.invoke(static, *outputs, *moving.values(), *gradient.values()))


def _why_not_compiled(check: Callable[[], bool]) -> str | None:
    """Return why a loss that runs cannot be compiled, from a check such as :func:`check_loss`; ``None`` if it can."""
    try:
        drew = check()
    except ValueError as error:
        return str(error).removeprefix("with this gradient, ").removesuffix("; or use gradient='reverse'")
    return "it draws random numbers, which would not be those of an eager run" if drew else None


def expand_per_task(adapted: Params, data: Any, compiler: MetaStepCompiler | None) -> Params:
    """Return parameters in separate memory for each task, if the meta-step is compiled; else as they are.

    Args:
        adapted: Parameters that are the same for all tasks.
        data: A tree of tensors. Where a vmap maps one of them, over tasks, the parameters are mapped as well.
        compiler: Of the meta-step.
    """
    if compiler is None:
        return adapted
    like = [t.detach() for t in split_tensors(data)[0]]
    return dict(zip(adapted, _ExpandPerTask.invoke(len(adapted), *adapted.values(), *like), strict=True))


class _ExpandPerTask(CustomFunction):
    """The first ``static`` tensors, mapped where any other tensor is: the base's rule for vmap expands all of them."""

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
    def jvp(ctx: Any, _: None, *tangents: Tensor | None) -> Any:
        return tuple(None if t is None else t.view_as(t) for t in tangents[: ctx.count])


class _LossWithGradient(CustomFunction):
    """A loss and its metrics, given with the gradient of the loss.

    Tensors: the outputs, of which the first is the loss; the parameters; their gradients.
    """

    @staticmethod
    def forward(form: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(t.view_as(t) for t in tensors[: form.static[0]])

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        outputs, params, ctx.compiler = inputs[0].static
        ctx.counts = outputs, params
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(o for o in output if not differentiable(o)))
        ctx.save_for_backward(*inputs[1 + outputs + params :])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, w: Tensor | None, *of_metrics: Tensor | None) -> Any:
        outputs, params = ctx.counts
        if any(t is not None for t in of_metrics):
            raise NotImplementedError(
                "in a compiled step, what a loss returns beside its value has no derivative; leave out mode='inductor'"
            )
        grads = (None,) * params if w is None else _scaled(ctx.compiler, w, *ctx.saved_tensors)
        return None, *(None,) * outputs, *grads, *(None,) * params


def _scaled(compiler: MetaStepCompiler, w: Tensor, *grads: Tensor) -> tuple[Tensor, ...]:
    """Return gradients times a number for each task; computed by a compiled function where possible."""

    def scaled(w: Tensor, *grads: Tensor) -> tuple[Tensor, ...]:
        return tuple((w.reshape(w.shape + (1,) * (g.dim() - w.dim())) * g).to(g.dtype) for g in grads)

    compiled = compiler.run(function_key("scaled"), scaled, (w, *grads))
    return scaled(w, *grads) if compiled is None else compiled
