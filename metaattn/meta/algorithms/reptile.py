"""Moving towards what tasks adapt to: Reptile."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .._compiled_step import scored
from ._learner import Batch, MetaParams
from .maml import GradientBased


@dataclass(frozen=True)
class Reptile(GradientBased):
    """Reptile: the meta-gradient is the way back from the adapted parameters to the initial ones.

    There is no query set: in meta-training a task adapts to all of its samples, support and query. What is told
    of a task is its loss on the query samples afterwards.

    Raises:
        ValueError: Learned learning rates, which this meta-gradient does not reach; else as
            :class:`GradientBased`.

    FunctionKey:
        Nichol, Achiam and Schulman 2018 (arXiv 1803.02999), algorithm 2.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.learns != "nothing":
            raise ValueError(f"Reptile learns initial parameters alone, learns must be 'nothing'; got {self.learns!r}")

    def objective(self, meta: MetaParams, support: Batch, query: Batch) -> tuple[Tensor, Any]:
        """``|initial - adapted|^2 / 2`` with the adapted ones constant, whose gradient is their difference."""
        samples = [torch.cat(pair) for pair in zip(support, query, strict=True)]
        with torch.no_grad():
            adapted = {k: p.detach() for k, p in self.adapt(meta, samples).items()}
            out = scored(self.loss, adapted, query)
        distance = torch.stack([(meta["params"][k] - p).square().sum() for k, p in adapted.items()]).sum()
        return distance / 2, out


def reptile(loss: Callable[..., Any], **settings: Any) -> Reptile:
    """Reptile.

    Args:
        loss: As for :class:`GradientBased`.
        **settings: Of :class:`GradientBased`.

    FunctionKey:
        Nichol, Achiam and Schulman 2018 (arXiv 1803.02999), algorithm 2; the difference taken for a gradient, for
        Adam and the like: its section 3.

    Example:
        >>> import torch
        >>> from metaattn.meta import reptile
        >>> learner = reptile(lambda params, x: (params["w"] - x).square().sum(), steps=1, learning_rate=0.25)
        >>> meta, x = learner.init({"w": torch.zeros(1)}), torch.ones(3, 1)
        >>> learner.value_and_grad(meta, (x,), (x,))[1]["params"]["w"]  # two samples: a step from 0 to 1
        tensor([-1.])
    """
    return Reptile(loss, **{"gradient": "first_order", **settings})
