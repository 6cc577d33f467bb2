"""Meta-training towards the adapted parameters: Reptile."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from .._compiled_step import scored
from ..gradients import Gradient
from ..optim import InnerOptimizer, sgd
from ._learner import MetaParams, Samples
from .maml import GradientBased


@dataclass(frozen=True)
class Reptile(GradientBased):
    """Reptile: the meta-gradient is the initial parameters minus the adapted ones.

    Reptile has no query set: in meta-training a task adapts to all of its samples, support and query. The reported loss
    of a task is that of the adapted parameters on its query samples. :func:`reptile` makes one.

    Args:
        loss: As for :class:`GradientBased`.
        steps: Number of inner steps, at least 1.
        learning_rate: Learning rate of the inner steps.
        optimizer: Optimizer of the inner steps.
        gradient: Mode of the inner loop; not differentiated by the meta-gradient. ``"implicit"`` adds its proximal
            term.
        adapts: Patterns for the names of the parameters that a task adapts, as for :class:`GradientBased`.
        learns: Must be ``"nothing"``.
        per_step: Not used, because no learning rates are learned.
        has_aux: The loss returns a pair of the scalar and metrics.

    Raises:
        ValueError: Learning rates are to be learned, which this meta-gradient does not reach; otherwise as
            :class:`GradientBased`.
        TypeError: As :class:`GradientBased`.

    Source:
        Nichol, Achiam and Schulman 2018 (arXiv 1803.02999), algorithm 2.

    Example:
        >>> import torch
        >>> from metaattn.meta import Reptile
        >>> learner = Reptile(lambda params, x: (params["w"] - x).square().sum(), learning_rate=0.25)
        >>> meta, x = learner.init({"w": torch.zeros(1)}), torch.ones(3, 1)  # three tasks
        >>> learner.value_and_grad(meta, (x,), (x,))[1]["params"]["w"]  # w moves from 0 to 1
        tensor([-1.])
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.learns != "nothing":
            raise ValueError(
                f"Reptile learns initial parameters only, so learns must be 'nothing'; got {self.learns!r}"
            )

    def objective(self, meta: MetaParams, support: Samples, query: Samples) -> tuple[Tensor, Any]:
        """Return ``|initial - adapted|^2 / 2`` with constant adapted parameters, and the query loss.

        The gradient of this objective in the initial parameters is the difference ``initial - adapted``.

        Args:
            meta: Meta-parameters of :meth:`init`.
            support: One task's support set, such as inputs ``[shots, tokens, width]`` and targets ``[shots]``.
            query: The same task's query set, such as ``[queries, tokens, width]`` and ``[queries]``; the task adapts to
                these samples too.

        Returns:
            A scalar, and the result of :meth:`task_loss`.
        """
        samples = [torch.cat(pair) for pair in zip(support, query, strict=True)]
        with torch.no_grad():
            adapted = {k: p.detach() for k, p in self.adapt(meta, samples).items()}
            out = scored(self.loss, adapted, query)
        distance = torch.stack([(meta["params"][k] - p).square().sum() for k, p in adapted.items()]).sum()
        return distance / 2, out


def reptile(
    loss: Callable[..., Any],
    *,
    steps: int = 1,
    learning_rate: float = 0.1,
    optimizer: InnerOptimizer | None = None,
    gradient: str | Gradient = "first_order",
    adapts: Sequence[str] = ("*",),
    learns: Literal["nothing"] = "nothing",
    per_step: bool = False,
    has_aux: bool = False,
) -> Reptile:
    """Reptile: the meta-gradient is the initial parameters minus the adapted ones.

    In meta-training a task adapts to all of its samples, support and query together.

    Args:
        loss: ``loss(params, *samples)`` of one task's samples, such as inputs ``[shots, tokens, width]`` and targets
            ``[shots]``: a scalar; with ``has_aux`` a pair of it and metrics.
        steps: Number of inner steps, at least 1.
        learning_rate: Learning rate of the inner steps, at least 0.
        optimizer: Optimizer of the inner steps; ``None`` for :func:`metaattn.meta.sgd`.
        gradient: Mode of the inner loop; not differentiated by the meta-gradient. ``"implicit"`` adds its proximal
            term.
        adapts: Patterns (:mod:`fnmatch`) for the names of the parameters that a task adapts. A pattern that begins with
            ``!`` excludes the names that it matches.
        learns: Must be ``"nothing"``: this meta-gradient does not reach learning rates.
        per_step: Not used, because no learning rates are learned.
        has_aux: The loss returns a pair of the scalar and metrics, a pytree of tensors.

    Returns:
        A :class:`Reptile` learner. Its meta-parameters are ``"params"``.

    Raises:
        ValueError: A setting is outside its range; in use, ``adapts`` matches no parameter.
        TypeError: A setting has the wrong type, such as an optimizer given by name; an option does not exist.

    Source:
        Nichol, Achiam and Schulman 2018 (arXiv 1803.02999), algorithm 2; the difference as a gradient for Adam and
        other optimizers: section 3.

    Example:
        >>> import torch
        >>> from metaattn.meta import reptile
        >>> learner = reptile(lambda params, x: (params["w"] - x).square().sum(), steps=1, learning_rate=0.25)
        >>> meta, x = learner.init({"w": torch.zeros(1)}), torch.ones(3, 1)
        >>> learner.value_and_grad(meta, (x,), (x,))[1]["params"]["w"]  # two samples: a step from 0 to 1
        tensor([-1.])
    """
    return Reptile(
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
