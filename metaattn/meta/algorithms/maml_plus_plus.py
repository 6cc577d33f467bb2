"""MAML that is trained more steadily: MAML++."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from .._checks import check_share
from .._compiled_step import scored
from ..gradients import Gradient
from ..optim import Params
from ._learner import Batch, MetaParams
from .maml import GradientBased


@dataclass(frozen=True)
class MAMLPlusPlus(GradientBased):
    """MAML with a loss after every inner step at first, and with first-order gradients at first.

    Both are annealed over meta-training: ``learner.at(progress)`` is the learner at a time.

    Args:
        multi_step_until: Up to this share of meta-training the losses after earlier steps count, less and less.
        first_order_until: Up to this share inner gradients are constants.
        progress: The share that is done.

    Raises:
        ValueError: A share outside ``[0, 1]``; else as :class:`GradientBased`.

    FunctionKey:
        Antoniou, Edwards and Storkey 2019 (arXiv 1810.09502), section 4.
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
        """Of the losses after each inner step, ``v`` of section 4: from equal to the last alone, linearly."""
        done = 1.0 if self.progress >= self.multi_step_until else self.progress / self.multi_step_until
        early = (1 - done) / self.steps
        return [early] * (self.steps - 1) + [1 - early * (self.steps - 1)]

    def differentiated(self) -> str | Gradient:
        """See :class:`GradientBased`."""
        return "first_order" if self.progress < self.first_order_until else self.gradient

    def objective(self, meta: MetaParams, support: Batch, query: Batch) -> tuple[Tensor, Any]:
        """The weighted sum of the query losses after each step; what is told is of the last."""
        passed: list[Params] = self.trajectory(meta, support)[1:]
        counted = [(v, p) for v, p in zip(self.weights(), passed, strict=True) if v > 0]
        outs = [scored(self.loss, p, query) for _, p in counted]
        losses = [out[0] if self.has_aux else out for out in outs]
        total = sum(v * loss for (v, _), loss in zip(counted, losses, strict=True))
        assert isinstance(total, Tensor)
        return total, outs[-1]


def maml_plus_plus(loss: Callable[..., Any], **settings: Any) -> MAMLPlusPlus:
    """MAML++: multi-step loss, learning rates for each tensor and step, annealed order of derivatives.

    Args:
        loss: As for :class:`GradientBased`.
        **settings: Of :class:`MAMLPlusPlus` and :class:`GradientBased`.

    FunctionKey:
        Antoniou, Edwards and Storkey 2019 (arXiv 1810.09502), section 4: MSL, LSLR and DA. Its
        batch normalisation per step is a matter of the model.

    Example:
        >>> from metaattn.meta import maml_plus_plus
        >>> learner = maml_plus_plus(lambda params, x: (params["w"] - x).square().sum(), steps=2, multi_step_until=0.5)
        >>> learner.at(0.0).weights(), learner.at(0.25).weights(), learner.at(0.5).weights()
        ([0.5, 0.5], [0.25, 0.75], [0.0, 1.0])
        >>> learner.at(0.1).differentiated(), learner.at(0.5).differentiated()
        ('first_order', 'reverse')
    """
    return MAMLPlusPlus(loss, **{"learns": "tensor", "per_step": True, **settings})
