"""One custom function that saves only its inputs, and whose derivatives are such functions again.

Its constant is a :class:`~metaattn.autodiff._derivatives.TransformableFunction`. The vjp and jvp call the same custom
function with the vjp and jvp of that, and under vmap it is applied to the mapped function. So it is closed under
differentiation to any order, and no rule contains an ordinary operation (see the trap in :mod:`metaattn.ops._rules`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ._captured import check_outputs
from ._custom_function import CustomFunction, PresenceMask, current_tangent, in_forward_mode
from ._derivatives import differentiable
from ._executor import active_executor, isolate
from ._functorch import active_transforms, is_legacy_batched
from ._pytree import Tensors


class Recompute(CustomFunction):
    """Apply a :class:`TransformableFunction`, the constant, to its tensors, all of which are present."""

    @classmethod
    def call(cls, mask: PresenceMask, *tensors: Tensor) -> Any:
        """Call the function; in forward mode, compute values and tangents together.

        There the tangents are known before the rule runs (see ``_rules._Forward``).
        """
        if not in_forward_mode() or any(t.requires_grad for t in tensors):
            return cls.apply(mask, *tensors)
        tangents = [current_tangent(t) if differentiable(t) else None for t in tensors]
        present = [t for t in tangents if t is not None]
        if not present or any(map(is_legacy_batched, present)):
            return cls.apply(mask, *tensors)
        inputs = [i for i, t in enumerate(tangents) if t is not None]
        primals = [forward_ad.unpack_dual(t).primal for t in tensors]
        parts = cls.invoke(mask.static.jvp(len(tensors), inputs, values=True), *primals, *present)
        half = len(parts) // 2
        return tuple(
            forward_ad.make_dual(p, t) if differentiable(p) else p
            for p, t in zip(parts[:half], parts[half:], strict=True)
        )

    @staticmethod
    def forward(mask: PresenceMask, *tensors: Tensor) -> Tensors:
        # The vmap of ``is_grads_batched`` has no rule for detach, and its tensors need none.
        inputs = [t if is_legacy_batched(t) else t.detach() for t in tensors]
        executor, key = active_executor(mask.static.executor), mask.static.key
        if executor is not None and key is not None:
            compiled = executor.run(key, mask.static.first, inputs)
            if compiled is not None:
                return compiled
        inputs = isolate(inputs)
        before = [t._version for t in inputs]
        with torch.enable_grad():  # records nothing, unless the function captures a tensor that requires a gradient
            outputs = mask.static.first(*inputs)
        if [t._version for t in inputs] != before:
            raise ValueError(
                "the function changed an argument, or a buffer of its module, in place: run again it would not give "
                "the same; return the new value instead"
            )
        check_outputs(outputs)
        return outputs

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        CustomFunction.save(ctx, inputs[0], inputs[1:])
        ctx.mark_non_differentiable(*(o for o in output if not differentiable(o)))
        ctx.outputs = [differentiable(o) for o in output]

    @staticmethod
    def backward(ctx: Any, *w: Tensor | None) -> Any:
        x = CustomFunction.saved(ctx)[0]
        needs_grad = CustomFunction.needs_grad(ctx)
        inputs = [i for i, t in enumerate(x) if needs_grad[i] and differentiable(t)]
        outputs = [i for i, (t, d) in enumerate(zip(w, ctx.outputs, strict=True)) if t is not None and d]
        grads: list[Tensor | None] = [None] * len(x)
        if outputs and inputs:
            vjp = ctx.mask.static.vjp(len(x), inputs, outputs)
            for i, g in zip(inputs, Recompute.invoke(vjp, *x, *(w[i] for i in outputs)), strict=True):
                grads[i] = g
        return None, *grads

    @staticmethod
    def jvp(ctx: Any, _: None, *tangents: Tensor | None) -> Any:
        x = CustomFunction.saved(ctx)[0]
        inputs = [i for i, t in enumerate(tangents) if t is not None and differentiable(x[i])]
        if not inputs:
            return (None,) * len(ctx.outputs)
        jvp = ctx.mask.static.jvp(len(x), inputs, values=False)
        out_tangents = iter(Recompute.invoke(jvp, *x, *(tangents[i] for i in inputs)))
        return tuple(next(out_tangents) if d else None for d in ctx.outputs)

    @classmethod
    def vmap(
        cls, info: Any, in_dims: tuple[Any, ...], mask: PresenceMask, *tensors: Tensor
    ) -> tuple[Tensors, tuple[int, ...]]:
        """Apply the mapped function one level down."""
        level = 1 + len(active_transforms())
        out = cls.invoke(mask.static.vmap(in_dims[1:], level, info.randomness), *tensors)
        return out, (0,) * len(out)
