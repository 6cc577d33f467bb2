"""Base class of functions with rules for both modes, and sums of tensors for use in those rules."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

from . import _dispatch
from ._functorch import (
    TransformType,
    active_transforms,
    in_dual_level,
    innermost_interpreter,
    innermost_transform,
    is_legacy_batched,
    unwrap_for_grad,
)
from ._torch_internals import is_zero_tensor


def add_terms(terms: Sequence[Sequence[Tensor | None]], like: Sequence[Any]) -> tuple[Tensor, ...]:
    """Add tuples of tensors, in which an absent tensor is zero, elementwise.

    Args:
        terms: The tuples, all of one length.
        like: Tensors for the shape and dtype of the result where a tensor is absent in every tuple.
    """
    columns = ([t for t in column if t is not None] for column in zip(*terms, strict=True))
    return tuple(torch.zeros_like(p) if not c else Sum.of_terms(c) for c, p in zip(columns, like, strict=False))


@dataclass(frozen=True)
class PresenceMask:
    """The constants of a function, and which of its optional tensors are present: its arguments are only these.

    Args:
        static: The constants.
        present: For each tensor that the function may take, whether it is present.
    """

    static: Any
    present: tuple[bool, ...]

    def expand(self, entries: Sequence[Any], absent: Any = None) -> list[Any]:
        """Return one entry for each of the function's tensors, given those of the present ones."""
        rest = iter(entries)
        return [next(rest) if present else absent for present in self.present]

    def compress(self, entries: Sequence[Any]) -> tuple[Any, ...]:
        """Return the entries of the present tensors, given one for each of the function's tensors."""
        return tuple(e for e, present in zip(entries, self.present, strict=True) if present)


class CustomFunction(Function):
    """An ``autograd.Function`` that :mod:`._dispatch` applies level by level.

    A subclass has the static methods ``forward``, ``setup_context``, ``backward`` and ``jvp`` of an
    :class:`torch.autograd.Function`. Their first argument is a :class:`PresenceMask`, the others are tensors, and
    ``forward`` returns a tuple of tensors. Absent cotangents and tangents are ``None`` in the rules, so that no rule
    computes with zeros.
    """

    single_level: type[Any]

    def __init_subclass__(cls) -> None:
        cls.single_level = _dispatch.single_level(cls)

    @classmethod
    def apply(cls, constant: Any, *tensors: Tensor) -> Any:
        """Apply the function under the active transforms."""
        return _dispatch.apply(cls, constant, *tensors)

    @classmethod
    def invoke(cls, static: Any, *tensors: Tensor | None) -> Any:
        """Call the function with its constants and all of its tensors, ``None`` for those that are absent."""
        mask = PresenceMask(static, tuple(t is not None for t in tensors))
        return cls.call(mask, *(t for t in tensors if t is not None))

    @classmethod
    def call(cls, *args: Any) -> Any:
        """Call the function at the current level. A subclass may do something else than :meth:`apply` here."""
        return cls.apply(*args)

    @classmethod
    def vmap(cls, info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        """Fold the mapped dimension into the batch; unmapped tensors are expanded with stride 0, not copied."""

        def fold(a: Any, dim: int | None) -> Any:
            if not isinstance(a, Tensor):
                return a
            return a.expand(info.batch_size, *a.shape) if dim is None else a.movedim(dim, 0)

        out = cls.call(*map(fold, args, in_dims))
        return out, (0,) * len(out)

    @staticmethod
    def save(ctx: Any, mask: PresenceMask, inputs: Sequence[Tensor], outputs: Sequence[Tensor] = ()) -> None:
        """Save tensors for the rules of both modes."""
        ctx.mask = mask
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs, *outputs)
        ctx.save_for_forward(*inputs, *outputs)

    @staticmethod
    def saved(ctx: Any) -> tuple[list[Any], Sequence[Tensor]]:
        """Return all of the saved inputs, absent ones included, and the saved outputs.

        Call it once in a rule: activation checkpointing recomputes at each access.
        """
        saved = ctx.saved_tensors
        n = sum(ctx.mask.present)
        return ctx.mask.expand(saved[:n]), saved[n:]

    @staticmethod
    def needs_grad(ctx: Any) -> list[bool]:
        """Return for each of the inputs, absent ones included, whether its gradient is requested."""
        return ctx.mask.expand(ctx.needs_input_grad[1:], False)


class PrecomputedResult(CustomFunction):
    """Results that are known already, as a function of the tensors of a rule that computed them.

    A level of reverse mode above one of forward mode (``jvp`` of ``grad``) would otherwise run the function of a rule a
    second time. With this class it takes the results that were computed at the levels below, with their tangents, and
    adds the gradient of the rule. Tensors: those of the rule, then its results.
    """

    @classmethod
    def results(cls, rule: type[CustomFunction], mask: PresenceMask, tensors: Sequence[Tensor]) -> Any:
        """Return what a rule returns for its tensors at the innermost level, which is one of reverse mode."""
        results = call_one_level_down(functools.partial(rule.call, mask), *tensors)
        return cls.apply((rule, mask), *tensors, *results)

    @staticmethod
    def forward(rule_and_mask: tuple[type[CustomFunction], PresenceMask], *tensors: Tensor) -> Any:
        return tuple(t.view_as(t) for t in tensors[sum(rule_and_mask[1].present) :])

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        (ctx.rule, mask), *tensors = inputs
        ctx.rule.setup_context(ctx, (mask, *tensors[: len(tensors) - len(output)]), output)
        ctx.count = len(output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        return *ctx.rule.backward(ctx, *grads), *(None,) * ctx.count

    @staticmethod
    def jvp(ctx: Any, _: None, *tangents: Tensor | None) -> Any:
        return tuple(None if t is None else t.view_as(t) for t in tangents[-ctx.count :])


class Sum(CustomFunction):
    """Sum of tensors for jvp rules, where an ordinary addition loses tangents (see :mod:`metaattn.ops._rules`)."""

    @classmethod
    def of_terms(cls, terms: Sequence[Tensor]) -> Tensor:
        """Return the sum of one or more tensors."""
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
    """Return the tangent that a tensor has at the current level of forward mode, if any."""
    tangent = forward_ad.unpack_dual(t).tangent if isinstance(t, Tensor) else None
    return None if tangent is None or is_zero_tensor(tangent) else tangent


def current_tangents(tensors: Sequence[Tensor]) -> list[Tensor | None]:
    """Return the tangents that tensors have at this level; no tangents where dual numbers cannot be unpacked.

    That is the case where reverse mode is active at the same level (a ``dual_level`` with tensors that require grad),
    for its graph must be one of dual numbers; and under the vmap of gradcheck, whose tensors cannot be made dual.
    """
    if not in_forward_mode() or any(t.requires_grad for t in tensors):
        return [None] * len(tensors)
    tangents = [current_tangent(t) for t in tensors]
    if any(t is not None and is_legacy_batched(t) for t in tangents):
        return [None] * len(tensors)
    return tangents


def reverse_over_forward() -> bool:
    """Return whether the innermost level is one of reverse mode and a level below it is one of forward mode."""
    if not in_dual_level():
        return False
    active = active_transforms()
    return bool(active) and active[-1] == TransformType.Grad and TransformType.Jvp in active[:-1]


def call_one_level_down(call: Callable[..., Any], *tensors: Tensor) -> Any:
    """Run a call at the level below the innermost one, which is one of reverse mode."""
    innermost = innermost_interpreter()
    level = innermost.level()
    with torch.enable_grad(), innermost.lower():
        return call(*(unwrap_for_grad(t, level) for t in tensors))


def in_forward_mode() -> bool:
    """Return whether the innermost level is one of forward mode, so that tensors show their tangents here."""
    if not in_dual_level():
        return False
    level = innermost_transform()
    return level is None or level.key() == TransformType.Jvp
