"""Learned learning rates: Meta-SGD."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

from ..gradients import Gradient
from ..optim import InnerOptimizer, sgd
from .maml import GradientBased


def meta_sgd(
    loss: Callable[..., Any],
    *,
    steps: int = 1,
    learning_rate: float = 0.1,
    optimizer: InnerOptimizer | None = None,
    gradient: str | Gradient = "reverse",
    adapts: Sequence[str] = ("*",),
    learns: Literal["nothing", "scalar", "tensor", "element"] = "element",
    per_step: bool = False,
    has_aux: bool = False,
) -> GradientBased:
    """MAML that also learns a learning rate for each element of each parameter: Meta-SGD.

    Args:
        loss: ``loss(params, *samples)`` of one task's samples, such as inputs ``[shots, tokens, width]`` and targets
            ``[shots]``: a scalar; with ``has_aux`` a pair of it and metrics.
        steps: Number of inner steps, at least 1.
        learning_rate: Initial value of the learning rates, at least 0.
        optimizer: Optimizer of the inner steps; ``None`` for :func:`metaattn.meta.sgd`.
        gradient: Mode in which the inner loop is differentiated: ``"reverse"``, ``"mixed"``, ``"first_order"``,
            ``"truncated"``, ``"implicit"``, or an object with settings; see :func:`metaattn.meta.trajectory`.
        adapts: Patterns (:mod:`fnmatch`) for the names of the parameters that a task adapts. A pattern that begins with
            ``!`` excludes the names that it matches.
        learns: Learning rates that are meta-parameters: ``"nothing"``, one ``"scalar"`` for all parameters, one per
            ``"tensor"``, or one per ``"element"``.
        per_step: Learn separate learning rates for each inner step.
        has_aux: The loss returns a pair of the scalar and metrics, a pytree of tensors.

    Returns:
        A :class:`GradientBased` learner. Its meta-parameters are ``"params"`` and ``"rates"``, the latter
        ``{name: [1, *parameter.shape]}`` by default.

    Raises:
        ValueError: A setting is outside its range; in use, ``adapts`` matches no parameter.
        TypeError: A setting has the wrong type, such as an optimizer given by name; an option does not exist.

    Source:
        Li et al. 2017 (arXiv 1707.09835), algorithm 1.

    Example:
        >>> import torch
        >>> from metaattn.meta import meta_sgd
        >>> learner = meta_sgd(lambda params, x, y: (x @ params["w"] - y).square().mean(), learning_rate=0.5)
        >>> learner.init({"w": torch.zeros(2)})["rates"]["w"]
        tensor([[0.5000, 0.5000]], requires_grad=True)
    """
    return GradientBased(
        loss,
        steps=steps,
        learning_rate=learning_rate,
        optimizer=sgd() if optimizer is None else optimizer,
        gradient=gradient,
        adapts=adapts,
        learns=learns,
        per_step=per_step,
        has_aux=has_aux,
    )
