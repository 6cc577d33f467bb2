"""Adaptation of a part of the model: only its head (ANIL), or all but its head (BOIL)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

from ..gradients import Gradient
from ..optim import InnerOptimizer, sgd
from .maml import GradientBased


def anil(
    loss: Callable[..., Any],
    *,
    steps: int = 1,
    learning_rate: float = 0.1,
    optimizer: InnerOptimizer | None = None,
    gradient: str | Gradient = "reverse",
    adapts: Sequence[str] = ("head.*",),
    learns: Literal["nothing", "scalar", "tensor", "element"] = "nothing",
    per_step: bool = False,
    has_aux: bool = False,
) -> GradientBased:
    """Almost no inner loop (ANIL): a task adapts only the head.

    The head is the set of parameters that ``adapts`` matches. All parameters are meta-learned.

    Args:
        loss: ``loss(params, *samples)`` of one task's samples, such as inputs ``[shots, tokens, width]`` and targets
            ``[shots]``: a scalar; with ``has_aux`` a pair of it and metrics.
        steps: Number of inner steps, at least 1.
        learning_rate: Learning rate of the inner steps, at least 0; its initial value if it is learned.
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
        A :class:`GradientBased` learner. Its meta-parameters are ``"params"`` and, if rates are learned, ``"rates"``.

    Raises:
        ValueError: A setting is outside its range; in use, ``adapts`` matches no parameter.
        TypeError: A setting has the wrong type, such as an optimizer given by name; an option does not exist.

    Source:
        Raghu et al. 2020 (arXiv 1909.09157), section 4.

    Example:
        >>> import torch
        >>> from metaattn.meta import anil
        >>> learner = anil(lambda params, x, y: (params["head.w"] * params["body.w"] * x - y).square().mean())
        >>> learner.adapted({"body.w": torch.ones(()), "head.w": torch.ones(())})
        ['head.w']
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


def boil(
    loss: Callable[..., Any],
    *,
    steps: int = 1,
    learning_rate: float = 0.1,
    optimizer: InnerOptimizer | None = None,
    gradient: str | Gradient = "reverse",
    adapts: Sequence[str] = ("*", "!head.*"),
    learns: Literal["nothing", "scalar", "tensor", "element"] = "nothing",
    per_step: bool = False,
    has_aux: bool = False,
) -> GradientBased:
    """Body-only inner loop (BOIL): a task adapts all parameters except the head.

    The head is the set of parameters that ``adapts`` excludes. All parameters are meta-learned.

    Args:
        loss: ``loss(params, *samples)`` of one task's samples, such as inputs ``[shots, tokens, width]`` and targets
            ``[shots]``: a scalar; with ``has_aux`` a pair of it and metrics.
        steps: Number of inner steps, at least 1.
        learning_rate: Learning rate of the inner steps, at least 0; its initial value if it is learned.
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
        A :class:`GradientBased` learner. Its meta-parameters are ``"params"`` and, if rates are learned, ``"rates"``.

    Raises:
        ValueError: A setting is outside its range; in use, ``adapts`` matches no parameter.
        TypeError: A setting has the wrong type, such as an optimizer given by name; an option does not exist.

    Source:
        Oh et al. 2021 (arXiv 2008.08882), section 3: the head has learning rate 0.

    Example:
        >>> import torch
        >>> from metaattn.meta import boil
        >>> learner = boil(lambda params, x, y: (params["head.w"] * params["body.w"] * x - y).square().mean())
        >>> learner.adapted({"body.w": torch.ones(()), "head.w": torch.ones(())})
        ['body.w']
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
