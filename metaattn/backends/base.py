"""The interface of a backend: six primitives on plain tensors, and the data that they take and return.

A backend computes attention and its derivatives. It sees plain tensors only: no autograd and no ``torch.func``
wrappers. The differentiation rules are in :mod:`metaattn.ops`, which calls the primitives.

**Mathematics.** Let ``x`` be the inputs, ``w`` a cotangent of ``(out, lse)`` and ``t1 … tn`` tangents of ``x``. Two
families of functions contain every derivative of attention:

* ``D_n(x; t1 … tn)``, the n-th directional derivative of ``(out, lse)``;
* ``G_n(x; w; t1 … tn)``, the gradient of ``<w, D_n(x; t1 … tn)>`` with respect to ``x``.

First and second derivatives need four of them. ``docs/mathematics.md`` derives their formulas:

============================  ===========  ====================================================================
primitive                     formula      result
============================  ===========  ====================================================================
``forward``                   F = D_0      ``out`` and ``lse``
``backward``                  B = G_0      gradients of query, key, value and (if requested) bias
``forward_jvp``               T = D_1      tangents of ``out`` and ``lse``
``backward_jvp``              S = G_1      tangents of the gradients
``forward_with_jvp``          F and T      both; a backend may fuse them
``backward_with_jvp``         B and S      both; a backend may fuse them
============================  ===========  ====================================================================

Third and higher derivatives (``n >= 2``) have one implementation for all backends,
:func:`metaattn.backends.blockwise.directional` and :func:`~metaattn.backends.blockwise.gradient`.

**How to write a new backend.**

1. Subclass :class:`Backend`, set ``name`` and implement the four abstract primitives. The two fused ones have defaults
   that call the others one after the other::

       class MyBackend(Backend):
           name = "mine"

           def forward(self, problem, x):
               ...
               return Values(out, lse)

           def backward(self, problem, x, values, cotangent, *, bias_grad): ...
           def forward_jvp(self, problem, x, values, tangent): ...
           def backward_jvp(self, problem, x, inputs): ...


       backend = MyBackend()

   :mod:`metaattn.backends.reference` is the shortest complete example. It follows the formulas line by line.
   :mod:`metaattn.backends.masking` has grouped heads, band, mask, bias and dropout for backends in plain PyTorch.
2. Keep the contract of :class:`Backend`: results are new tensors with full batch dimensions, an absent tangent or
   cotangent (``None``) is zero, and a query row whose keys are all masked gives ``out = 0``, ``lse = -inf`` and zero
   derivatives.
3. Override :meth:`Backend.unsupported_reason` if some calls are not supported. It returns an error message that says
   what the backend supports, what it received and what the user can do. An explicit request never falls back to
   another backend silently.
4. Register the instance in ``BACKENDS`` of :mod:`metaattn.backends.registry`; or, if its module imports an optional
   package, its name in ``LAZY``.
5. Test it: add the name to ``BACKENDS`` in ``tests/conftest.py``. Every case and every nesting of transforms then runs
   on it. ``python -m metaattn doctor --backend NAME`` compares its derivatives with float64.
6. If it is the fastest choice somewhere, let :func:`metaattn.backends.auto.choose` select it there.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

PRIMITIVES = ("forward", "backward", "forward_jvp", "forward_with_jvp", "backward_jvp", "backward_with_jvp")


@dataclass(frozen=True)
class Problem:
    """The static part of one attention call.

    Query row ``i`` attends to key ``j`` if ``i - left <= j <= i + right``, where ``None`` means no limit. A causal mask
    is ``right=0``: the band is aligned to the top left, as in PyTorch's ``is_causal``.

    Attributes:
        scale: Factor of the scores.
        left: How many keys before its own position a row sees.
        right: How many keys after its own position a row sees.
        dropout_p: Probability that dropout sets an element to zero.
        pack_qkv_gradients: The caller will pass the gradients to :func:`pack_qkv`. A backend that writes them
            into :func:`empty_packed_qkv` saves the copy there.
    """

    scale: float
    left: int | None = None
    right: int | None = None
    dropout_p: float = 0.0
    pack_qkv_gradients: bool = False

    @property
    def banded(self) -> bool:
        """Return whether the band hides some keys."""
        return self.left is not None or self.right is not None


class Operands(NamedTuple):
    """The tensors of one attention call, all of the same rank ``>= 4``.

    Attributes:
        query: ``[*B, Hq, Nq, D]``.
        key: ``[*B, Hkv, Nk, D]`` with ``Hq % Hkv == 0``. All three have equal ``*B``; a broadcast dimension has
            stride 0.
        value: ``[*B, Hkv, Nk, Dv]``.
        bias: Added to the scores; broadcasts to ``[*B, Hq, Nq, Nk]``.
        mask: Boolean, True where a key takes part; broadcasts to ``[*B, Hq, Nq, Nk]``.
        seeds: int64 ``[*B, Hq, 1, 1]``, present if and only if there is dropout. The dropout of an element is a
            function of its seed, row and column.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    bias: Tensor | None = None
    mask: Tensor | None = None
    seeds: Tensor | None = None


class Tangent(NamedTuple):
    """A tangent or a cotangent of the differentiable operands; ``None`` is zero."""

    query: Tensor | None = None
    key: Tensor | None = None
    value: Tensor | None = None
    bias: Tensor | None = None

    @property
    def is_zero(self) -> bool:
        """Return whether all four are absent."""
        return all(t is None for t in self)


class Rows(NamedTuple):
    """A tangent or a cotangent of the results: ``out`` ``[*B, Hq, Nq, Dv]``, ``lse`` ``[*B, Hq, Nq]``.

    ``None`` is zero.
    """

    out: Tensor | None = None
    lse: Tensor | None = None

    @property
    def is_zero(self) -> bool:
        """Return whether both are absent."""
        return self.out is None and self.lse is None


class Values(NamedTuple):
    """Results of the forward pass, or their tangents.

    Attributes:
        out: ``[*B, Hq, Nq, Dv]``, in the dtype of the inputs.
        lse: Log-sum-exp of the scores of a row, ``[*B, Hq, Nq]``, in the dtype of :func:`accumulator`.
    """

    out: Tensor
    lse: Tensor


class Gradients(NamedTuple):
    """Results of the backward pass, or their tangents, in the shapes and dtypes of the operands.

    ``bias`` is ``None`` unless it was requested.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    bias: Tensor | None


class BackwardJvpInputs(NamedTuple):
    """Inputs of ``backward_jvp`` and ``backward_with_jvp``, in addition to the problem and the operands.

    Attributes:
        values: Results of ``forward`` for the same operands.
        values_tangent: Results of ``forward_jvp`` for the same operands and ``tangent``.
        cotangent: Cotangent of the results, at which the backward pass is evaluated.
        tangent: Tangent of the operands, along which it is differentiated.
        cotangent_tangent: Tangent of ``cotangent`` along the same direction.
        bias_grad: Whether to compute the gradient of the bias.
    """

    values: Values
    values_tangent: Values | Rows
    cotangent: Rows
    tangent: Tangent
    cotangent_tangent: Rows = Rows()
    bias_grad: bool = False


class Backend(ABC):
    """Attention and its derivatives as pure functions of plain tensors; see the head of this module.

    Results are new tensors with full batch dimensions. ``values`` is what ``forward`` returned for the same operands.
    A query row whose keys are all masked gives ``out = 0``, ``lse = -inf`` and zero derivatives.
    """

    name: ClassVar[str]

    def unsupported_reason(self, problem: Problem, x: Operands) -> str | None:
        """Return why this backend does not support the call and what to do; ``None`` if it supports the call."""
        return None

    def fuses_backward_with_jvp(self, x: Operands, bias_grad: bool) -> bool:
        """Return whether :meth:`backward_with_jvp` is cheaper than ``backward`` and ``backward_jvp`` in sequence."""
        return False

    @abstractmethod
    def forward(self, problem: Problem, x: Operands) -> Values:
        """Compute F: attention."""

    @abstractmethod
    def backward(self, problem: Problem, x: Operands, values: Values, cotangent: Rows, *, bias_grad: bool) -> Gradients:
        """Compute B: the gradient of ``<cotangent, F(x)>``, with that of the bias only if ``bias_grad``."""

    @abstractmethod
    def forward_jvp(self, problem: Problem, x: Operands, values: Values, tangent: Tangent) -> Values:
        """Compute T: the derivative of F along ``tangent``."""

    @abstractmethod
    def backward_jvp(self, problem: Problem, x: Operands, inputs: BackwardJvpInputs) -> Gradients:
        """Compute S: the derivative of B along ``inputs.tangent`` and ``inputs.cotangent_tangent``."""

    def forward_with_jvp(self, problem: Problem, x: Operands, tangent: Tangent) -> tuple[Values, Values]:
        """Compute F and T. By default one after the other."""
        values = self.forward(problem, x)
        return values, self.forward_jvp(problem, x, values, tangent)

    def backward_with_jvp(
        self, problem: Problem, x: Operands, inputs: BackwardJvpInputs
    ) -> tuple[Gradients, Gradients]:
        """Compute B and S. By default one after the other."""
        gradients = self.backward(problem, x, inputs.values, inputs.cotangent, bias_grad=inputs.bias_grad)
        return gradients, self.backward_jvp(problem, x, inputs)


def tokens_first(query: Tensor) -> bool:
    """Return whether the heads of a token are adjacent in memory, as a linear projection leaves them.

    ``out`` then gets the same memory order, so that joining the heads again needs no copy.
    """
    heads, rows = query.shape[-3:-1]
    return heads > 1 and rows > 1 and 0 < query.stride(-3) < query.stride(-2)


def empty_packed_qkv(like: Sequence[Tensor]) -> list[Tensor]:
    """Return empty tensors for gradients that :func:`pack_qkv` packs without a copy.

    Args:
        like: Query, key and value, ``[*B, H, N, D]`` with equal N and D.

    Returns:
        One tensor for each, in its shape. All are views of one buffer ``[*B, N, total heads, D]``.
    """
    (*batch, _, rows, size), heads = like[0].shape, [t.shape[-3] for t in like]
    buffer = like[0].new_empty(*batch, rows, sum(heads), size)
    return [part.transpose(-3, -2) for part in buffer.split(heads, -2)]


def pack_qkv(gradients: Sequence[Tensor]) -> Tensor:
    """Return the gradients of query, key and value as that of the packed projection that they were split from.

    Args:
        gradients: Of query, key and value, ``[*B, H, N, D]``.

    Returns:
        ``[*B, N, total heads, D]``: a view if they are adjacent as in :func:`empty_packed_qkv`, otherwise a copy.
    """
    by_token = [t.transpose(-3, -2) for t in gradients]
    first, heads = by_token[0], [t.shape[-2] for t in by_token]
    packed = torch.empty((*first.shape[:-2], sum(heads), first.shape[-1]), device="meta")
    adjacent = all(
        t.stride() == part.stride()
        and t.storage_offset() - first.storage_offset() == part.storage_offset()
        and t.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        for t, part in zip(by_token, packed.split(heads, -2), strict=True)
    )
    return first.as_strided(packed.shape, packed.stride()) if adjacent else torch.cat(by_token, -2)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of sums, softmax and lse: float64 for float64 inputs, float32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32
