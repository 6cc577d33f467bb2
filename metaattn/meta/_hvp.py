"""Products with second derivatives: forward over reverse."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.func import grad

from ..autodiff import pushforward, replace_at

Vector = tuple[Tensor, ...]


def gradient_along(
    objective: Callable[..., Tensor],
    x: Vector,
    at: Sequence[int],
    directions: Sequence[Tensor],
    wrt: Sequence[int],
    *,
    still: int,
) -> Vector:
    """The derivative of the gradient of ``objective(*x)`` in the tensors ``wrt``, along directions of those ``at``.

    From the place ``still`` on, other floating-point tensors get a tangent of zeros. Without one PyTorch (2.11, 2.13;
    held by ``tests/boundaries``) refuses the gradient of :func:`torch.nn.functional.mse_loss`, whose target has none.
    """

    def gradients(*here: Tensor) -> Vector:
        return grad(lambda moved: objective(*replace_at(here, wrt, moved)))(tuple(here[i] for i in wrt))

    others = [i for i in range(still, len(x)) if i not in at and x[i].is_floating_point()]
    zeros = (torch.zeros_like(x[i]) for i in others)
    return pushforward(gradients, len(x), [*at, *others], values=False)(*x, *directions, *zeros)
