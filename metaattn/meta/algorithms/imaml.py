"""Implicit gradients of the adapted parameters: iMAML."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

from ..gradients import Implicit
from ..optim import InnerOptimizer, sgd
from .maml import GradientBased


def imaml(
    loss: Callable[..., Any],
    *,
    proximal: float = 1.0,
    damping: float = 0.0,
    iterations: int = 10,
    tolerance: float = 1e-6,
    steps: int = 1,
    learning_rate: float = 0.1,
    optimizer: InnerOptimizer | None = None,
    adapts: Sequence[str] = ("*",),
    learns: Literal["nothing", "scalar", "tensor", "element"] = "nothing",
    per_step: bool = False,
    has_aux: bool = False,
) -> GradientBased:
    """MAML with implicit gradients: a task minimises its loss near the initial parameters.

    The derivative is that at the minimum (:class:`metaattn.meta.Implicit`). Its memory and cost do not grow with the
    number of inner steps; take enough of them to reach the minimum.

    Args:
        loss: ``loss(params, *samples)`` of one task's samples, such as inputs ``[shots, tokens, width]`` and targets
            ``[shots]``: a scalar; with ``has_aux`` a pair of it and metrics.
        proximal: Strength of the pull towards the initial parameters, positive.
        damping: Added to the diagonal of the Hessian in the linear system only, at least 0.
        iterations: Maximum number of conjugate-gradient iterations, at least 1.
        tolerance: Relative residual at which they stop, at least 0.
        steps: Number of inner steps, at least 1.
        learning_rate: Learning rate of the inner steps, at least 0; its initial value if it is learned.
        optimizer: Optimizer of the inner steps; ``None`` for :func:`metaattn.meta.sgd`.
        adapts: Patterns (:mod:`fnmatch`) for the names of the parameters that a task adapts. A pattern that begins with
            ``!`` excludes the names that it matches.
        learns: Learning rates that are meta-parameters: ``"nothing"``, one ``"scalar"`` for all parameters, one per
            ``"tensor"``, or one per ``"element"``.
        per_step: Learn separate learning rates for each inner step.
        has_aux: The loss returns a pair of the scalar and metrics, a pytree of tensors.

    Returns:
        A :class:`GradientBased` learner. Its meta-parameters are ``"params"`` and, if rates are learned, ``"rates"``;
        the gradient of learned rates is zero.

    Raises:
        ValueError: A setting is outside its range; in use, ``adapts`` matches no parameter.
        TypeError: A setting has the wrong type, such as an optimizer given by name; an option does not exist.

    Source:
        Rajeswaran et al. 2019 (arXiv 1909.04630), lemma 1 and algorithms 1 and 2.

    Example:
        >>> import torch
        >>> from metaattn.meta import imaml
        >>> def loss(params, x):
        ...     return (params["w"] - x).square().sum()
        >>> learner = imaml(loss, proximal=2.0, steps=9, learning_rate=0.25)
        >>> meta, x = learner.init({"w": torch.zeros(1)}), torch.ones(3, 1)
        >>> losses, gradients = learner.value_and_grad(meta, (x,), (x,))  # the minimum is at (2 x + 2 w) / 4 = 0.5
        >>> losses, gradients["params"]["w"]
        (tensor([0.2500, 0.2500, 0.2500]), tensor([-0.5000]))
    """
    return GradientBased(
        loss,
        steps=steps,
        learning_rate=learning_rate,
        optimizer=sgd() if optimizer is None else optimizer,
        adapts=adapts,
        learns=learns,
        per_step=per_step,
        has_aux=has_aux,
        gradient=Implicit(proximal, damping, iterations, tolerance),
    )
