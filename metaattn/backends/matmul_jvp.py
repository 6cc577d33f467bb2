"""Batched matrix products and their tangents, on plain tensors.

If both factors have tangents, a product and its tangent ``a_t b + a b_t`` are three products. PyTorch needs four
kernels for them (one is the sum of two products), which are small in small models, and reads each factor several times.
Our kernel computes all of it at once, and takes one or two independent products, such as the two gradients of a linear
layer. :mod:`metaattn.compile` replaces products in recorded graphs by :func:`multiply`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .auto import import_with_triton


class Product(NamedTuple):
    """A batched product ``a b``, its tangent ``a_t b + a b_t``, or both. Strides are arbitrary.

    Attributes:
        a: ``[batch, M, K]``.
        b: ``[batch, K, N]``.
        a_t: Tangent of ``a``. Given together with ``b_t``, it requests the tangent of the product.
        b_t: Tangent of ``b``.
        value: Whether the product itself is requested.
    """

    a: Tensor
    b: Tensor
    a_t: Tensor | None = None
    b_t: Tensor | None = None
    value: bool = True

    @property
    def results(self) -> int:
        """Return the number of results."""
        return self.value + (self.a_t is not None)


def supported(like: Tensor) -> bool:
    """Return whether our kernel supports products whose factors have the device and dtype of ``like``."""
    if not like.is_cuda:
        return False
    triton = import_with_triton("triton")
    return not isinstance(triton, str) and bool(triton.matmul_supported(like))


def multiply(jobs: Sequence[Product]) -> list[Tensor]:
    """Compute one or two products whose factors all have the same dtype.

    Returns:
        For each product its value, if requested, then its tangent, if requested; each ``[batch, M, N]``.
    """
    results: list[Tensor] | None = None
    if supported(jobs[0].a):
        triton = import_with_triton("triton")
        assert not isinstance(triton, str)
        results = triton.multiply(jobs)
    return [t for job in jobs for t in in_pytorch(job)] if results is None else results


def in_pytorch(job: Product) -> list[Tensor]:
    """Compute a product with PyTorch's kernels."""
    results = [torch.bmm(job.a, job.b)] if job.value else []
    if job.a_t is not None and job.b_t is not None:
        results.append(torch.baddbmm(torch.bmm(job.a_t, job.b), job.a, job.b_t))
    return results
