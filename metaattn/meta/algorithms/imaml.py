"""Implicit gradients of the adapted parameters: iMAML."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..gradients import Implicit
from .maml import GradientBased


def imaml(
    loss: Callable[..., Any],
    *,
    proximal: float = 1.0,
    damping: float = 0.0,
    iterations: int = 10,
    tolerance: float = 1e-6,
    **settings: Any,
) -> GradientBased:
    """MAML whose task minimises its loss near the initial parameters, differentiated at the minimum.

    Memory and cost of the derivative do not grow with the inner steps, of which there should be enough.

    Args:
        loss: As for :class:`GradientBased`.
        proximal: The strength of the pull to the initial parameters.
        damping: Of the solution, see :class:`metaattn.meta.Implicit`.
        iterations: Of conjugate gradients, at most.
        tolerance: At which they stop.
        **settings: Of :class:`GradientBased`.

    Raises:
        ValueError: As :class:`metaattn.meta.Implicit`.
        TypeError: Likewise.

    FunctionKey:
        Rajeswaran et al. 2019 (arXiv 1909.04630), lemma 1 and algorithms 1 and 2.

    Example:
        >>> import torch
        >>> from metaattn.meta import imaml
        >>> def loss(params, x):
        ...     return (params["w"] - x).square().sum()
        >>> learner = imaml(loss, proximal=2.0, steps=9, learning_rate=0.25)
        >>> meta, x = learner.init({"w": torch.zeros(1)}), torch.ones(3, 1)
        >>> losses, gradients = learner.value_and_grad(meta, (x,), (x,))  # the end is at (2 x + 2 w) / 4 = 0.5
        >>> losses, gradients["params"]["w"]
        (tensor([0.2500, 0.2500, 0.2500]), tensor([-0.5000]))
    """
    implicit = Implicit(proximal, damping, iterations, tolerance)
    return GradientBased(loss, **{**settings, "gradient": implicit})
