"""Adaptation of a few context parameters: CAVIA."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from .._checks import check_count, check_meta, check_params
from ..gradients import Gradient, trajectory
from ..optim import InnerOptimizer, Params, sgd
from ._learner import MetaParams, Samples, copies
from .maml import GradientBased

CONTEXT = "context"


@dataclass(frozen=True)
class Cavia(GradientBased):
    """Adaptation of a context vector, starting at zero; all tasks share the parameters of the model.

    The context enters a layer as additional inputs, whose weights are meta-parameters. That adds ``context @ weight``
    to the layer's bias. :func:`cavia` makes one.

    Args:
        loss: As for :class:`GradientBased`.
        steps: Number of inner steps, at least 1.
        learning_rate: Learning rate of the inner steps.
        optimizer: Optimizer of the inner steps.
        gradient: Mode in which the inner loop is differentiated.
        adapts: Not used: a task adapts the context only.
        learns: Learning rates that are meta-parameters, as for :class:`GradientBased`; of the context.
        per_step: Learn separate learning rates for each inner step.
        has_aux: The loss returns a pair of the scalar and metrics.
        size: Length of the context, at least 1.
        into: Name of the bias that the context is added to; a parameter of any shape.

    Raises:
        TypeError: ``size`` is not an integer; otherwise as :class:`GradientBased`.
        ValueError: ``size`` is below 1; no parameter is named ``into`` (in :meth:`init`); otherwise as
            :class:`GradientBased`.

    Source:
        Zintgraf et al. 2019 (arXiv 1810.03642), section 3.

    Example:
        >>> import torch
        >>> from metaattn.meta import Cavia
        >>> learner = Cavia(lambda params, x, y: (params["w"] * x + params["b"] - y).square().mean(), size=2, into="b")
        >>> meta = learner.init({"w": torch.ones(()), "b": torch.zeros(3)})
        >>> meta["context"]["weight"].shape
        torch.Size([2, 3])
    """

    size: int = 4
    into: str = "embed.bias"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("size", self.size, 1)

    @property
    def groups(self) -> tuple[str, ...]:
        """Names of the groups of meta-parameters: those of :class:`GradientBased`, and ``"context"``."""
        return (*super().groups, CONTEXT)

    def adapted(self, params: Params) -> list[str]:
        """Return ``["context"]``, the only parameter that a task adapts.

        Args:
            params: Not used.
        """
        return [CONTEXT]

    def init(self, params: Params) -> MetaParams:
        """Return copies of the model's parameters, the learned rates, and random weights of the context.

        The weights are random because both context and weights would have zero gradients if both were zero.

        Args:
            params: A model's parameters, ``{name: tensor}`` of any shapes.

        Returns:
            ``{"params": {name: tensor}, "rates": {name: tensor}, "context": {"weight": [size, *bias.shape]}}``.

        Raises:
            TypeError: ``params`` is not a dict of tensors.
            ValueError: No parameter is named ``into``.
        """
        check_params(params)
        if self.into not in params:
            raise ValueError(
                f"into must be the name of a parameter to add the context to; got {self.into!r}, and the parameters "
                f"are {sorted(params)}"
            )
        bias = params[self.into]
        weight = torch.randn(self.size, *bias.shape, dtype=bias.dtype, device=bias.device) / self.size**0.5
        context = {CONTEXT: bias.new_zeros(self.size)}
        return copies({"params": params, "rates": self.initial_rates(context), CONTEXT: {"weight": weight}})

    def joined(self, context: Tensor, params: Params, weight: Tensor) -> Params:
        """Return the model's parameters with the context added to its bias.

        Args:
            context: The context, ``[size]``.
            params: The model's parameters, ``{name: tensor}``.
            weight: Weights of the context, ``[size, *bias.shape]``.
        """
        return {**params, self.into: params[self.into] + torch.tensordot(context, weight, 1)}

    def trajectory(self, meta: MetaParams, support: Samples, steps: int | None = None) -> list[Params]:
        """See :class:`Learner`."""
        check_meta(meta, self.groups)
        params, weight = meta["params"], meta[CONTEXT]["weight"]

        def loss(inner: Params, params: Params, weight: Tensor, *samples: Tensor) -> Tensor:
            return self.plain_loss(self.joined(inner[CONTEXT], params, weight), *samples)

        passed = trajectory(
            loss,
            {CONTEXT: weight.new_zeros(self.size)},
            (params, weight, *support),
            optimizer=self.optimizer,
            rates=self.rates(meta),
            steps=self.steps if steps is None else steps,
            gradient=self.differentiated(),
        )
        return [self.joined(inner[CONTEXT], params, weight) for inner in passed]


def cavia(
    loss: Callable[..., Any],
    *,
    size: int = 4,
    into: str = "embed.bias",
    steps: int = 1,
    learning_rate: float = 0.1,
    optimizer: InnerOptimizer | None = None,
    gradient: str | Gradient = "reverse",
    learns: Literal["nothing", "scalar", "tensor", "element"] = "nothing",
    per_step: bool = False,
    has_aux: bool = False,
) -> Cavia:
    """Context adaptation (CAVIA): a task adapts a context vector only.

    The context starts at zero and is added to one bias of the model through meta-learned weights. The model's
    parameters are meta-learned too, and stay fixed within a task.

    Args:
        loss: ``loss(params, *samples)`` of one task's samples, such as inputs ``[shots, tokens, width]`` and targets
            ``[shots]``: a scalar; with ``has_aux`` a pair of it and metrics.
        size: Length of the context, at least 1.
        into: Name of the bias that the context is added to; a parameter of any shape.
        steps: Number of inner steps, at least 1.
        learning_rate: Learning rate of the inner steps, at least 0; its initial value if it is learned.
        optimizer: Optimizer of the inner steps; ``None`` for :func:`metaattn.meta.sgd`.
        gradient: Mode in which the inner loop is differentiated: ``"reverse"``, ``"mixed"``, ``"first_order"``,
            ``"truncated"``, ``"implicit"``, or an object with settings; see :func:`metaattn.meta.trajectory`.
        learns: Learning rates of the context that are meta-parameters: ``"nothing"``, one ``"scalar"``, one per
            ``"tensor"`` (the context is one), or one per ``"element"``.
        per_step: Learn separate learning rates for each inner step.
        has_aux: The loss returns a pair of the scalar and metrics, a pytree of tensors.

    Returns:
        A :class:`Cavia` learner. Its meta-parameters are ``"params"``, ``"context"`` and, with learned rates,
        ``"rates"``.

    Raises:
        ValueError: A setting is outside its range; no parameter is named ``into`` (in :meth:`Learner.init`).
        TypeError: A setting has the wrong type, such as an optimizer given by name; an option does not exist.

    Source:
        Zintgraf et al. 2019 (arXiv 1810.03642), algorithm 1.

    Example:
        >>> import torch
        >>> from metaattn.meta import cavia
        >>> learner = cavia(lambda params, x, y: (params["w"] * x + params["b"] - y).square().mean(), size=2, into="b")
        >>> meta = learner.init({"w": torch.ones(()), "b": torch.zeros(())})
        >>> x, y = torch.randn(8, 5), torch.randn(8, 5)  # eight tasks of five samples
        >>> _, gradients = learner.value_and_grad(meta, (x, y), (x, y))
        >>> {group: list(tensors) for group, tensors in gradients.items()}
        {'params': ['w', 'b'], 'rates': [], 'context': ['weight']}
    """
    return Cavia(
        loss,
        size=size,
        into=into,
        steps=steps,
        learning_rate=learning_rate,
        optimizer=sgd() if optimizer is None else optimizer,
        gradient=gradient,
        learns=learns,
        per_step=per_step,
        has_aux=has_aux,
    )
