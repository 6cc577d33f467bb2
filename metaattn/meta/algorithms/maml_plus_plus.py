"""MAML with annealed losses and derivatives, which trains more steadily: MAML++."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import Tensor

from .._checks import check_share
from .._compiled_step import scored
from ..gradients import Gradient
from ..optim import InnerOptimizer, Params, sgd
from ._learner import MetaParams, Samples
from .maml import GradientBased


@dataclass(frozen=True)
class MAMLPlusPlus(GradientBased):
    """MAML that begins with a loss after every inner step, and with first-order gradients.

    Both are annealed over meta-training: ``learner.at(progress)`` returns the learner for a given time.
    :func:`maml_plus_plus` makes one with the paper's settings.

    Args:
        loss: As for :class:`GradientBased`.
        steps: Number of inner steps, at least 1.
        learning_rate: Learning rate of the inner steps; its initial value if it is learned.
        optimizer: Optimizer of the inner steps.
        gradient: Mode in which the inner loop is differentiated after ``first_order_until``.
        adapts: Patterns for the names of the parameters that a task adapts, as for :class:`GradientBased`.
        learns: Learning rates that are meta-parameters, as for :class:`GradientBased`.
        per_step: Learn separate learning rates for each inner step.
        has_aux: The loss returns a pair of the scalar and metrics.
        multi_step_until: Fraction of meta-training, from 0 to 1, over which the weights of the losses after earlier
            steps fall to zero.
        first_order_until: Fraction of meta-training, from 0 to 1, during which inner gradients are constants.
        progress: Fraction of meta-training that is done, from 0 to 1.

    Raises:
        ValueError: A fraction is outside ``[0, 1]``; otherwise as :class:`GradientBased`.
        TypeError: A fraction is not a number; otherwise as :class:`GradientBased`.

    Source:
        Antoniou, Edwards and Storkey 2019 (arXiv 1810.09502), section 4.

    Example:
        >>> from metaattn.meta import MAMLPlusPlus
        >>> learner = MAMLPlusPlus(lambda params, x: (params["w"] - x).square().sum(), steps=4, multi_step_until=0.5)
        >>> learner.at(0.0).weights()
        [0.25, 0.25, 0.25, 0.25]
    """

    multi_step_until: float = 0.1
    first_order_until: float = 0.3
    progress: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("multi_step_until", "first_order_until", "progress"):
            check_share(name, getattr(self, name))

    def at(self, progress: float) -> MAMLPlusPlus:
        """See :class:`Learner`."""
        return replace(self, progress=progress)

    def weights(self) -> list[float]:
        """Return the weights of the losses after each inner step, ``v`` in section 4 of the paper.

        They change linearly in ``progress``, from equal weights to the last loss only.

        Returns:
            ``steps`` numbers that sum to 1.
        """
        done = 1.0 if self.progress >= self.multi_step_until else self.progress / self.multi_step_until
        early = (1 - done) / self.steps
        return [early] * (self.steps - 1) + [1 - early * (self.steps - 1)]

    def differentiated(self) -> str | Gradient:
        """See :class:`GradientBased`."""
        return "first_order" if self.progress < self.first_order_until else self.gradient

    def objective(self, meta: MetaParams, support: Samples, query: Samples) -> tuple[Tensor, Any]:
        """Return the weighted sum of the query losses after each step, and the query loss after the last.

        Args:
            meta: Meta-parameters of :meth:`init`.
            support: One task's support set, such as inputs ``[shots, tokens, width]`` and targets ``[shots]``.
            query: The same task's query set, such as ``[queries, tokens, width]`` and ``[queries]``.

        Returns:
            A scalar, and the result of :meth:`task_loss`.
        """
        passed: list[Params] = self.trajectory(meta, support)[1:]
        counted = [(v, p) for v, p in zip(self.weights(), passed, strict=True) if v > 0]
        outs = [scored(self.loss, p, query) for _, p in counted]
        losses = [out[0] if self.has_aux else out for out in outs]
        total = sum(v * loss for (v, _), loss in zip(counted, losses, strict=True))
        assert isinstance(total, Tensor)
        return total, outs[-1]


def maml_plus_plus(
    loss: Callable[..., Any],
    *,
    multi_step_until: float = 0.1,
    first_order_until: float = 0.3,
    progress: float = 1.0,
    steps: int = 1,
    learning_rate: float = 0.1,
    optimizer: InnerOptimizer | None = None,
    gradient: str | Gradient = "reverse",
    adapts: Sequence[str] = ("*",),
    learns: Literal["nothing", "scalar", "tensor", "element"] = "tensor",
    per_step: bool = True,
    has_aux: bool = False,
) -> MAMLPlusPlus:
    """MAML++: losses after several steps, learned rates per tensor and step, annealed order of derivatives.

    Use ``learner.at(progress)`` at each meta-step to anneal; the learner itself is that of the end of meta-training.

    Args:
        loss: ``loss(params, *samples)`` of one task's samples, such as inputs ``[shots, tokens, width]`` and targets
            ``[shots]``: a scalar; with ``has_aux`` a pair of it and metrics.
        multi_step_until: Fraction of meta-training, from 0 to 1, over which the weights of the losses after earlier
            steps fall to zero.
        first_order_until: Fraction of meta-training, from 0 to 1, during which inner gradients are constants.
        progress: Fraction of meta-training that is done, from 0 to 1.
        steps: Number of inner steps, at least 1.
        learning_rate: Learning rate of the inner steps, at least 0; its initial value if it is learned.
        optimizer: Optimizer of the inner steps; ``None`` for :func:`metaattn.meta.sgd`.
        gradient: Mode in which the inner loop is differentiated after ``first_order_until``: ``"reverse"``,
            ``"mixed"``, ``"first_order"``, ``"truncated"``, ``"implicit"``, or an object with settings; see
            :func:`metaattn.meta.trajectory`.
        adapts: Patterns (:mod:`fnmatch`) for the names of the parameters that a task adapts. A pattern that begins with
            ``!`` excludes the names that it matches.
        learns: Learning rates that are meta-parameters: ``"nothing"``, one ``"scalar"`` for all parameters, one per
            ``"tensor"``, or one per ``"element"``.
        per_step: Learn separate learning rates for each inner step.
        has_aux: The loss returns a pair of the scalar and metrics, a pytree of tensors.

    Returns:
        A :class:`MAMLPlusPlus` learner. Its meta-parameters are ``"params"`` and ``"rates"``, the latter
        ``{name: [steps]}`` by default.

    Raises:
        ValueError: A setting is outside its range; in use, ``adapts`` matches no parameter.
        TypeError: A setting has the wrong type, such as an optimizer given by name; an option does not exist.

    Source:
        Antoniou, Edwards and Storkey 2019 (arXiv 1810.09502), section 4: MSL, LSLR and DA. Its batch normalisation per
        step is left to the model.

    Example:
        >>> from metaattn.meta import maml_plus_plus
        >>> learner = maml_plus_plus(lambda params, x: (params["w"] - x).square().sum(), steps=2, multi_step_until=0.5)
        >>> learner.at(0.0).weights(), learner.at(0.25).weights(), learner.at(0.5).weights()
        ([0.5, 0.5], [0.25, 0.75], [0.0, 1.0])
        >>> learner.at(0.1).differentiated(), learner.at(0.5).differentiated()
        ('first_order', 'reverse')
    """
    return MAMLPlusPlus(
        loss,
        multi_step_until=multi_step_until,
        first_order_until=first_order_until,
        progress=progress,
        steps=steps,
        learning_rate=learning_rate,
        optimizer=sgd() if optimizer is None else optimizer,
        gradient=gradient,
        adapts=adapts,
        learns=learns,
        per_step=per_step,
        has_aux=has_aux,
    )
