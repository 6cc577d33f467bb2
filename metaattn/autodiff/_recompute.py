"""One function that saves only its inputs, and whose derivatives are such functions again.

The vjp of a :class:`~metaattn.autodiff._derivatives.Derivable` is one, by its own rule or ``torch.func.vjp`` of it, its jvp by
``torch.func.jvp``, and under vmap it is one of ``torch.func.vmap``: closed to any order, and in no rule is
there an ordinary operation (see the trap in :mod:`metaattn.ops._rules`).
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
from ._pytree import Tensors


class Recompute(CustomFunction):
    """A program as one function. Tensors: those of the program, all of them there."""

    @classmethod
    def call(cls, form: PresenceMask, *tensors: Tensor) -> Any:
        """In forward mode the tangents are at hand: values and tangents are one program, see ``_rules._Forward``."""
        if not in_forward_mode() or any(t.requires_grad for t in tensors):
            return cls.apply(form, *tensors)
        tangents = [current_tangent(t) if differentiable(t) else None for t in tensors]
        known = [t for t in tangents if t is not None]
        if not known or any(map(torch._C._functorch.is_legacy_batchedtensor, known)):
            return cls.apply(form, *tensors)
        wrt = [i for i, t in enumerate(tangents) if t is not None]
        primals = [forward_ad.unpack_dual(t).primal for t in tensors]
        parts = cls.of(form.static.jvp(len(tensors), wrt, values=True), *primals, *known)
        half = len(parts) // 2
        return tuple(
            forward_ad.make_dual(p, t) if differentiable(p) else p
            for p, t in zip(parts[:half], parts[half:], strict=True)
        )

    @staticmethod
    def forward(form: PresenceMask, *tensors: Tensor) -> Tensors:
        # The vmap of ``is_grads_batched`` has no rule for detach, and nothing to detach.
        inputs = [t if torch._C._functorch.is_legacy_batchedtensor(t) else t.detach() for t in tensors]
        executor, key = active_executor(form.static.executor), form.static.key
        if executor is not None and key is not None:
            compiled = executor.run(key, form.static.first, inputs)
            if compiled is not None:
                return compiled
        inputs = isolate(inputs)
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
        CustomFunction.keep(ctx, inputs[0], inputs[1:])
        ctx.mark_non_differentiable(*(o for o in output if not differentiable(o)))
        ctx.outputs = [differentiable(o) for o in output]

    @staticmethod
    def backward(ctx: Any, *w: Tensor | None) -> Any:
        x = CustomFunction.kept(ctx)[0]
        needed = CustomFunction.needed(ctx)
        wrt = [i for i, t in enumerate(x) if needed[i] and differentiable(t)]
        of = [i for i, (t, d) in enumerate(zip(w, ctx.outputs, strict=True)) if t is not None and d]
        grads: list[Tensor | None] = [None] * len(x)
        if of and wrt:
            pulled = ctx.form.static.vjp(len(x), wrt, of)
            for i, g in zip(wrt, Recompute.of(pulled, *x, *(w[i] for i in of)), strict=True):
                grads[i] = g
        return None, *grads

    @staticmethod
    def jvp(ctx: Any, _: None, *tangents: Tensor | None) -> Any:
        x = CustomFunction.kept(ctx)[0]
        wrt = [i for i, t in enumerate(tangents) if t is not None and differentiable(x[i])]
        if not wrt:
            return (None,) * len(ctx.outputs)
        pushed = ctx.form.static.jvp(len(x), wrt, values=False)
        moved = iter(Recompute.of(pushed, *x, *(tangents[i] for i in wrt)))
        return tuple(next(moved) if d else None for d in ctx.outputs)

    @classmethod
    def vmap(
        cls, info: Any, in_dims: tuple[Any, ...], form: PresenceMask, *tensors: Tensor
    ) -> tuple[Tensors, tuple[int, ...]]:
        """The mapped program, one level down."""
        level = 1 + len(torch._C._functorch.get_interpreter_stack() or ())
        out = cls.of(form.static.vmap(in_dims[1:], level, info.randomness), *tensors)
        return out, (0,) * len(out)
