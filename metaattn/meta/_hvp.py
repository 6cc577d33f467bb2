"""Products with second derivatives, forward over reverse."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.func import grad

from ..autodiff import pushforward, replace_at

Vector = tuple[Tensor, ...]


def hessian_product(
    objective: Callable[..., Tensor],
    x: Vector,
    moved: Sequence[int],
    directions: Sequence[Tensor],
    wrt: Sequence[int],
    *,
    first_data: int,
) -> Vector:
    """Return the derivative of the gradient of ``objective(*x)`` along directions.

    With ``L`` the objective, ``d^2 L / (d x[wrt] d x[moved]) . directions``: of the Hessian of ``L`` the rows ``wrt``
    and the columns ``moved``, times a vector.

    Args:
        objective: A scalar of the tensors ``x``.
        x: Tensors of any shapes.
        moved: Places in ``x`` of the tensors that move.
        directions: One for each of these, of its shape.
        wrt: Places in ``x`` of the tensors that the gradient is taken with respect to.
        first_data: From this place on, floating-point tensors that do not move get a tangent of zeros. Without one,
            PyTorch (2.11, 2.13; ``tests/boundaries`` checks it) rejects the gradient of
            :func:`torch.nn.functional.mse_loss`, whose target has none.

    Returns:
        A tensor for each place in ``wrt``, of its shape.
    """

    def gradient(*x: Tensor) -> Vector:
        return grad(lambda of_wrt: objective(*replace_at(x, wrt, of_wrt)))(tuple(x[i] for i in wrt))

    constant = [i for i in range(first_data, len(x)) if i not in moved and x[i].is_floating_point()]
    zeros = (torch.zeros_like(x[i]) for i in constant)
    return pushforward(gradient, len(x), [*moved, *constant], values=False)(*x, *directions, *zeros)
