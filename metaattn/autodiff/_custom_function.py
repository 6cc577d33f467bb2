"""What the rules are made of: the base of the functions, sums in forward mode, lists of tangents."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import retrieve_current_functorch_interpreter
from torch.autograd import Function, forward_ad

from . import _dispatch


def total(terms: Sequence[Sequence[Tensor | None]], like: Sequence[Any]) -> tuple[Tensor, ...]:
    """The sum of tuples of tensors, where an absent one is zero; zeros like ``like`` if all are."""
    columns = ([t for t in column if t is not None] for column in zip(*terms, strict=True))
    return tuple(torch.zeros_like(p) if not c else Sum.of_terms(c) for c, p in zip(columns, like, strict=False))


@dataclass(frozen=True)
class PresenceMask:
    """The constants of a function, and which of its tensors are there: only these are its arguments."""

    static: Any
    there: tuple[bool, ...]

    def fill(self, tensors: Sequence[Any], absent: Any = None) -> list[Any]:
        """One entry for each of the function's tensors, ``absent`` for those that are not there."""
        rest = iter(tensors)
        return [next(rest) if there else absent for there in self.there]

    def pick(self, entries: Sequence[Any]) -> tuple[Any, ...]:
        """The entries of those that are there."""
        return tuple(e for e, there in zip(entries, self.there, strict=True) if there)


class CustomFunction(Function):
    """Base of the functions. Their first argument is a :class:`PresenceMask`, the others are tensors.

    Absent cotangents and tangents stay ``None``, so that no rule works on a zero.
    """

    single_level: type[Any]

    def __init_subclass__(cls) -> None:
        cls.single_level = _dispatch.single_level(cls)

    @classmethod
    def apply(cls, constant: Any, *tensors: Tensor) -> Any:
        """The function at the transforms at work."""
        return _dispatch.apply(cls, constant, *tensors)

    @classmethod
    def of(cls, static: Any, *tensors: Tensor | None) -> Any:
        """The function of its constants and all of its tensors, ``None`` for those that are not there."""
        form = PresenceMask(static, tuple(t is not None for t in tensors))
        return cls.call(form, *(t for t in tensors if t is not None))

    @classmethod
    def vmap(cls, info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        """Fold the mapped dimension into the batch; what is not mapped is expanded by stride 0, not copied."""

        def fold(a: Any, dim: int | None) -> Any:
            if not isinstance(a, Tensor):
                return a
            return a.expand(info.batch_size, *a.shape) if dim is None else a.movedim(dim, 0)

        out = cls.call(*map(fold, args, in_dims))
        return out, (0,) * len(out)

    @classmethod
    def call(cls, *args: Any) -> Any:
        """How the function is called at the current level."""
        return cls.apply(*args)

    @staticmethod
    def keep(ctx: Any, form: PresenceMask, inputs: Sequence[Tensor], outputs: Sequence[Tensor] = ()) -> None:
        """Save tensors for both modes."""
        ctx.form = form
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs, *outputs)
        ctx.save_for_forward(*inputs, *outputs)

    @staticmethod
    def kept(ctx: Any) -> tuple[list[Any], Sequence[Tensor]]:
        """All of the inputs, and the outputs. Once in a rule: activation checkpointing recomputes at each access."""
        saved = ctx.saved_tensors
        n = sum(ctx.form.there)
        return ctx.form.fill(saved[:n]), saved[n:]

    @staticmethod
    def needed(ctx: Any) -> list[bool]:
        """For each of the inputs, whether its gradient is asked for."""
        return ctx.form.fill(ctx.needs_input_grad[1:], False)


class PrecomputedResult(CustomFunction):
    """Results that are known already, as functions of a rule's tensors. Tensors: those of the rule, the results.

    A level of reverse mode above one of forward mode (``jvp`` of ``grad``) would run a rule's function there as well:
    it has the results computed below, with their tangents, and adds the rule's gradient.
    """

    @classmethod
    def results(cls, rule: type[CustomFunction], form: PresenceMask, tensors: Sequence[Tensor]) -> Any:
        """What a rule returns for its tensors at the innermost level, which is one of reverse mode."""
        known = call_one_level_down(functools.partial(rule.call, form), *tensors)
        return cls.apply((rule, form), *tensors, *known)

    @staticmethod
    def forward(of: tuple[type[CustomFunction], PresenceMask], *tensors: Tensor) -> Any:
        return tuple(t.view_as(t) for t in tensors[sum(of[1].there) :])

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        (ctx.rule, form), *tensors = inputs
        ctx.rule.setup_context(ctx, (form, *tensors[: len(tensors) - len(output)]), output)
        ctx.known = len(output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        return *ctx.rule.backward(ctx, *grads), *(None,) * ctx.known

    @staticmethod
    def jvp(ctx: Any, _: None, *tangents: Tensor | None) -> Any:
        return tuple(None if t is None else t.view_as(t) for t in tangents[-ctx.known :])


class Sum(CustomFunction):
    """The sum of tensors, for use in jvp rules (see the trap in :mod:`metaattn.ops._rules`)."""

    @classmethod
    def of_terms(cls, terms: Sequence[Tensor]) -> Tensor:
        """One or more added up."""
        total: Tensor = terms[0] if len(terms) == 1 else cls.apply(len(terms), *terms)[0]
        return total

    @staticmethod
    def forward(count: int, *terms: Tensor) -> tuple[Tensor]:
        return (functools.reduce(torch.add, terms),)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.count = inputs[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return None, *(grad,) * ctx.count

    @staticmethod
    def jvp(ctx: Any, _: None, *tangents: Tensor | None) -> Any:
        return (Sum.of_terms([t for t in tangents if t is not None]),)


def current_tangent(t: Any) -> Tensor | None:
    """The tangent that a tensor has at the current level of forward mode."""
    tangent = forward_ad.unpack_dual(t).tangent if isinstance(t, Tensor) else None
    return None if tangent is None or tangent._is_zerotensor() else tangent


def current_tangents(tensors: Sequence[Tensor]) -> list[Tensor | None]:
    """The tangents that tensors have here; none where they cannot be taken apart.

    Where reverse mode is at the same level (a ``dual_level`` with leaves that require grad) its graph must be of the
    dual numbers. Tensors under gradcheck's vmap cannot be made dual.
    """
    if not in_forward_mode() or any(t.requires_grad for t in tensors):
        return [None] * len(tensors)
    tangents = [current_tangent(t) for t in tensors]
    if any(t is not None and torch._C._functorch.is_legacy_batchedtensor(t) for t in tangents):
        return [None] * len(tensors)
    return tangents


def reverse_over_forward() -> bool:
    """Whether the innermost level is one of reverse mode, with one of forward mode somewhere below it."""
    if forward_ad._current_level < 0:
        return False
    stack = torch._C._functorch.get_interpreter_stack()
    kinds = torch._C._functorch.TransformType
    if not stack or stack[-1].key() != kinds.Grad:
        return False
    return any(level.key() == kinds.Jvp for level in stack[:-1])


def call_one_level_down(call: Callable[..., Any], *tensors: Tensor) -> Any:
    """What a call returns at the level below the innermost one, which is one of reverse mode."""
    innermost = retrieve_current_functorch_interpreter()
    level = innermost.level()
    with torch.enable_grad(), innermost.lower():
        return call(*(torch._C._functorch._unwrap_for_grad(t, level) for t in tensors))


def in_forward_mode() -> bool:
    """Whether the innermost level is one of forward mode, so that tensors show their tangents here."""
    if forward_ad._current_level < 0:
        return False
    level = torch._C._functorch.peek_interpreter_stack()
    return level is None or level.key() == torch._C._functorch.TransformType.Jvp
