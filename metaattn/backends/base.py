"""What a backend is: four primitives on plain tensors.

The calculus of attention closes on two families of functions. With ``x`` the inputs, ``w`` a cotangent
of ``(out, lse)`` and ``t1 … tn`` tangents of ``x``:

* ``D_n(x; t1 … tn)`` is the n-th directional derivative of ``(out, lse)``;
* ``G_n(x; w; t1 … tn)`` is the gradient of ``<w, D_n(x; t1 … tn)>`` with respect to ``x``.

A backend implements the four that first and second derivatives need: forward ``F = D_0``, backward
``B = G_0``, tangent ``T = D_1`` and second order ``S = G_1``. ``n >= 2`` is third order and above; one
implementation (:mod:`metaattn.backends.blockwise`) serves it for every backend.

Backends see plain tensors: no autograd, no ``torch.func`` wrappers. :mod:`metaattn.ops` owns the rules.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Problem:
    """The static part of one attention call.

    Key ``j`` takes part in row ``i`` if ``i - left <= j <= i + right`` (``None``: no limit). A causal
    mask is ``right=0``: the band is aligned to the top left, as in PyTorch's ``is_causal``. ``in_one``: gradients are
    wanted as :func:`in_one` makes them, and cost nothing more where a backend writes them into :func:`room_in_one`.
    """

    scale: float
    left: int | None = None
    right: int | None = None
    dropout_p: float = 0.0
    in_one: bool = False

    @property
    def banded(self) -> bool:
        """Whether there is such a limit."""
        return self.left is not None or self.right is not None


class Operands(NamedTuple):
    """The tensors of one attention call, all of one rank ``>= 4``.

    query ``[*B, Hq, Nq, D]``; key ``[*B, Hkv, Nk, D]``; value ``[*B, Hkv, Nk, Dv]`` with ``Hq % Hkv == 0``
    and equal ``*B`` (a dimension that does not vary has stride 0). bias (added to the scores) and mask
    (True takes part): broadcastable to ``[*B, Hq, Nq, Nk]``. seeds: int64 ``[*B, Hq, 1, 1]``, present if
    and only if there is dropout; the dropout of an element is a function of its seed, row and column.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    bias: Tensor | None = None
    mask: Tensor | None = None
    seeds: Tensor | None = None


class Tangent(NamedTuple):
    """One tangent of the differentiable operands, or a cotangent of them; ``None`` is zero."""

    query: Tensor | None = None
    key: Tensor | None = None
    value: Tensor | None = None
    bias: Tensor | None = None

    @property
    def is_zero(self) -> bool:
        """Whether every part is absent."""
        return all(t is None for t in self)


class Rows(NamedTuple):
    """``out`` ``[*B, Hq, Nq, Dv]`` and ``lse`` ``[*B, Hq, Nq]``: values, tangents or cotangents.

    As a tangent or a cotangent either may be ``None``, which is zero.
    """

    out: Tensor | None = None
    lse: Tensor | None = None

    @property
    def is_zero(self) -> bool:
        """Whether both parts are absent."""
        return self.out is None and self.lse is None


class Values(NamedTuple):
    """What the forward pass returns: ``out`` in the inputs' dtype, ``lse`` in :func:`accumulator`'s."""

    out: Tensor
    lse: Tensor


class Gradients(NamedTuple):
    """What the backward pass returns; ``bias`` is ``None`` unless it was asked for."""

    query: Tensor
    key: Tensor
    value: Tensor
    bias: Tensor | None


Pair = tuple[Gradients, Gradients]


class Backend(Protocol):
    """Four pure functions of plain tensors. Results are new tensors with full batch dimensions.

    ``values`` is what ``forward`` returned for the same operands. Rows whose keys are all masked give
    ``out = 0``, ``lse = -inf`` and zeros everywhere else.
    """

    name: str

    def refuses(self, problem: Problem, x: Operands) -> str | None:
        """Why this backend cannot serve the call, and who can; ``None`` if it can."""
        ...

    def forward(self, problem: Problem, x: Operands) -> Values:
        """F: attention itself."""
        ...

    def backward(self, problem: Problem, x: Operands, values: Values, cotangent: Rows, *, bias_grad: bool) -> Gradients:
        """B: the gradient of ``<cotangent, F(x)>``; the gradient of the bias only if ``bias_grad``."""
        ...

    def forward_jvp(self, problem: Problem, x: Operands, values: Values, tangent: Tangent) -> Values:
        """T: the derivative of F along ``tangent``."""
        ...

    def forward_with_jvp(self, problem: Problem, x: Operands, direction: Tangent) -> tuple[Values, Values]:
        """F and T at once."""
        ...

    def backward_jvp(
        self,
        problem: Problem,
        x: Operands,
        values: Values,
        values_tangent: Values,
        cotangent: Rows,
        tangent: Tangent,
        *,
        cotangent_tangent: Rows,
        bias_grad: bool,
    ) -> Gradients:
        """S: the derivative of B along ``tangent``, where the cotangent has the tangent ``cotangent_tangent``.

        ``values_tangent`` is what ``tangent`` returned for the same operands and tangent.
        """
        ...

    def backward_with_jvp(
        self,
        problem: Problem,
        x: Operands,
        values: Values,
        values_tangent: Values,
        cotangent: Rows,
        tangent: Tangent,
        *,
        cotangent_tangent: Rows,
        bias_grad: bool,
    ) -> Pair:
        """B and S at once."""
        ...


def in_turn(backend: ModuleType) -> Callable[..., Pair]:
    """``backward_with_jvp`` of a backend that has no kernel for both: its B, then its S, each as the call finds it."""

    def backward_with_jvp(
        problem: Problem,
        x: Operands,
        values: Values,
        values_tangent: Values,
        cotangent: Rows,
        *rest: Any,
        **options: Any,
    ) -> Pair:
        first = backend.backward(problem, x, values, cotangent, bias_grad=options["bias_grad"])
        return first, backend.backward_jvp(problem, x, values, values_tangent, cotangent, *rest, **options)

    return backward_with_jvp


def tokens_first(query: Tensor) -> bool:
    """Whether the heads of a token lie side by side in memory, as a projection leaves them: ``out`` then does as well.

    So that what follows, heads joined again, needs no copy.
    """
    heads, rows = query.shape[-3:-1]
    return heads > 1 and rows > 1 and 0 < query.stride(-3) < query.stride(-2)


def room_in_one(parts: Sequence[Tensor]) -> list[Tensor]:
    """Room for tensors like these, ``[*B, H, N, D]`` with one N and D, where :func:`in_one` need not copy them."""
    (*batch, _, rows, size), heads = parts[0].shape, [t.shape[-3] for t in parts]
    room = parts[0].new_empty(*batch, rows, sum(heads), size)
    return [part.transpose(-3, -2) for part in room.split(heads, -2)]


def in_one(parts: Sequence[Tensor]) -> Tensor:
    """Gradients ``[*B, H, N, D]`` of query, key and value as that ``[*B, N, heads of all, D]`` of what was split."""
    turned = [t.transpose(-3, -2) for t in parts]
    first, heads = turned[0], [t.shape[-2] for t in turned]
    one = torch.empty((*first.shape[:-2], sum(heads), first.shape[-1]), device="meta")
    lies = all(
        t.stride() == room.stride()
        and t.storage_offset() - first.storage_offset() == room.storage_offset()
        and t.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        for t, room in zip(turned, one.split(heads, -2), strict=True)
    )
    return first.as_strided(one.shape, one.stride()) if lies else torch.cat(turned, -2)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums, softmax and lse: float64 for float64 inputs, float32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32
