"""Products of batches of matrices and their tangents, on plain tensors.

The product of two matrices that both have tangents is three products, and four reads of each factor: with the sum of
two of them, four kernels, which are small where models are. Our kernel does all in one, and two independent ones at a
time, such as the two gradients of a linear layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .auto import load


class Product(NamedTuple):
    """``a b`` if ``value``, and with tangents ``a_t b + a b_t``. ``[batch, M, K]``, ``[batch, K, N]``, any strides."""

    a: Tensor
    b: Tensor
    a_t: Tensor | None = None
    b_t: Tensor | None = None
    value: bool = True

    @property
    def results(self) -> int:
        """How many there are."""
        return self.value + (self.a_t is not None)


def served(like: Tensor) -> bool:
    """Whether our kernel may serve products with factors like this one."""
    triton = load("triton") if like.is_cuda else "elsewhere it is PyTorch's"
    return not isinstance(triton, str) and bool(triton.multiplies(like))


def multiply(jobs: Sequence[Product]) -> list[Tensor]:
    """The results of one or two products, each its value and then its tangent. All factors are of one dtype."""
    triton = load("triton") if served(jobs[0].a) else ""
    results: list[Tensor] | None = None if isinstance(triton, str) else triton.multiply(jobs)
    return [t for job in jobs for t in in_pytorch(job)] if results is None else results


def in_pytorch(job: Product) -> list[Tensor]:
    """The results of a product by PyTorch's own."""
    results = [torch.bmm(job.a, job.b)] if job.value else []
    if job.a_t is not None and job.b_t is not None:
        results.append(torch.baddbmm(torch.bmm(job.a_t, job.b), job.a, job.b_t))
    return results
