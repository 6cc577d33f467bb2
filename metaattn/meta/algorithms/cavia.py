"""Adaptation of a few context parameters: CAVIA."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .._checks import check_count, check_meta, check_params
from ..gradients import trajectory
from ..optim import Params
from ._learner import Batch, MetaParams, copies
from .maml import GradientBased

CONTEXT = "context"


@dataclass(frozen=True)
class Cavia(GradientBased):
    """A task adapts a context vector, from zero; all parameters of the model are shared by the tasks.

    The context enters as further inputs of a layer, whose weights for it are meta-parameters: that adds ``context @
    weight`` to the layer's bias.

    Args:
        size: Of the context.
        into: The name of that bias, of any shape.

    Raises:
        TypeError: A size that is no integer; else as :class:`GradientBased`.
        ValueError: A size below 1; a name that no parameter has, in :meth:`init`.

    FunctionKey:
        Zintgraf et al. 2019 (arXiv 1810.03642), section 3.
    """

    size: int = 4
    into: str = "embed.bias"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("size", self.size, 1)

    @property
    def groups(self) -> tuple[str, ...]:
        """See :class:`Learner`."""
        return (*super().groups, CONTEXT)

    def adapted(self, params: Params) -> list[str]:
        """The context alone."""
        return [CONTEXT]

    def init(self, params: Params) -> MetaParams:
        """See :class:`Learner`; with the weights of the context, drawn at random (at zero it could not learn)."""
        check_params(params)
        if self.into not in params:
            raise ValueError(f"no parameter is named {self.into!r}, to add the context to; there are {sorted(params)}")
        bias = params[self.into]
        weight = torch.randn(self.size, *bias.shape, dtype=bias.dtype, device=bias.device) / self.size**0.5
        context = {CONTEXT: bias.new_zeros(self.size)}
        return copies({"params": params, "rates": self.initial_rates(context), CONTEXT: {"weight": weight}})

    def joined(self, context: Tensor, params: Params, weight: Tensor) -> Params:
        """The model's parameters in a context."""
        return {**params, self.into: params[self.into] + torch.tensordot(context, weight, 1)}

    def trajectory(self, meta: MetaParams, support: Batch, steps: int | None = None) -> list[Params]:
        """See :class:`Learner`."""
        check_meta(meta, self.groups)
        params, weight = meta["params"], meta[CONTEXT]["weight"]

        def loss(inner: Params, params: Params, weight: Tensor, *batch: Tensor) -> Tensor:
            return self.plain_loss(self.joined(inner[CONTEXT], params, weight), *batch)

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


def cavia(loss: Callable[..., Any], **settings: Any) -> Cavia:
    """CAVIA.

    Args:
        loss: As for :class:`GradientBased`.
        **settings: Of :class:`Cavia` and :class:`GradientBased`.

    FunctionKey:
        Zintgraf et al. 2019 (arXiv 1810.03642), algorithm 1.

    Example:
        >>> import torch
        >>> from metaattn.meta import cavia
        >>> learner = cavia(lambda params, x, y: (params["w"] * x + params["b"] - y).square().mean(), size=2, into="b")
        >>> meta = learner.init({"w": torch.ones(()), "b": torch.zeros(())})
        >>> x, y = torch.randn(8, 5), torch.randn(8, 5)
        >>> _, gradients = learner.value_and_grad(meta, (x, y), (x, y))
        >>> {group: list(tensors) for group, tensors in gradients.items()}
        {'params': ['w', 'b'], 'rates': [], 'context': ['weight']}
    """
    return Cavia(loss, **settings)
