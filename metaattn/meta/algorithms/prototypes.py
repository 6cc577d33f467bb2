"""Heads made of prototypes: prototypical networks, which end there, and ProtoMAML, which starts there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from .._checks import check_count, check_embed
from ..optim import Params
from ._learner import Batch, MetaParams
from .maml import GradientBased

Embed = Callable[[Params, Tensor], Tensor]


@dataclass(frozen=True)
class Prototypical(GradientBased):
    """Classification whose linear head is made of the classes' mean features in the support set.

    The squared distance to a class's prototype ``c``, less what all classes share, is a linear function of the
    features: ``-|f - c|^2 = 2 c.f - |c|^2 - |f|^2``. So the head is of weight ``2 c`` and bias ``-|c|^2``.

    Args:
        embed: ``embed(params, inputs)``: features ``[N, F]``, what the head takes.
        way: How many classes; targets are from 0.
        weight: The name of the head's weight, ``[way, F]``. It is no meta-parameter.
        bias: That of its bias, ``[way]``.

    Raises:
        TypeError: No ``embed``, or a ``way`` that is no integer; else as :class:`GradientBased`.
        ValueError: A ``way`` below 2; a head's name that no parameter has, in :meth:`init`.

    FunctionKey:
        Snell, Swersky and Zemel 2017 (arXiv 1703.05175), equations 1, 2 and 8.
    """

    embed: Embed | None = None
    way: int = 0
    weight: str = "head.weight"
    bias: str = "head.bias"
    least_steps: ClassVar[int] = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_embed(self.embed)
        check_count("way", self.way, 2)

    def init(self, params: Params) -> MetaParams:
        """See :class:`Learner`; without the head."""
        meta = super().init(params)
        for name in (self.weight, self.bias):
            if name not in params:
                raise ValueError(f"no parameter is named {name!r}, for the head; there are {sorted(params)}")
            del meta["params"][name]
        return meta

    def start(self, meta: MetaParams, support: Batch) -> Params:
        """The parameters with the head of a task's prototypes, a differentiable function of the others."""
        assert self.embed is not None
        inputs, targets = support
        features = self.embed(meta["params"], inputs)
        members = (targets == torch.arange(self.way, device=targets.device)[:, None]).to(features.dtype)
        centres = members @ features / members.sum(1, keepdim=True).clamp_min(1)
        return {**meta["params"], self.weight: 2 * centres, self.bias: -centres.square().sum(-1)}

    def trajectory(self, meta: MetaParams, support: Batch, steps: int | None = None) -> list[Params]:
        """See :class:`Learner`; where no steps are trained, none are taken."""
        if self.steps == 0:
            return [self.start(meta, support)] * (1 + (steps or 0))
        return super().trajectory(meta, support, steps)


def prototypical(loss: Callable[..., Any], *, embed: Embed, way: int, **settings: Any) -> Prototypical:
    """Prototypical networks: the nearest prototype in feature space; no inner loop.

    Args:
        loss: As for :class:`GradientBased`: with cross entropy, that of a softmax over negative squared distances.
        embed: As for :class:`Prototypical`.
        way: Likewise.
        **settings: Of :class:`Prototypical`.

    FunctionKey:
        Snell, Swersky and Zemel 2017 (arXiv 1703.05175), algorithm 1.

    Example:
        >>> import torch
        >>> from metaattn.meta import prototypical
        >>> def embed(params, x):
        ...     return x @ params["w"]
        >>> def loss(params, x, y):
        ...     logits = embed(params, x) @ params["head.weight"].mT + params["head.bias"]
        ...     return torch.nn.functional.cross_entropy(logits, y)
        >>> learner = prototypical(loss, embed=embed, way=2)
        >>> meta = learner.init({"w": torch.eye(2), "head.weight": torch.zeros(2, 2), "head.bias": torch.zeros(2)})
        >>> x, y = torch.tensor([[0.0, 1.0], [2.0, 0.0]]), torch.tensor([0, 1])
        >>> learner.adapt(meta, (x, y))["head.bias"].tolist()
        [-1.0, -4.0]
    """
    return Prototypical(loss, **{**settings, "embed": embed, "way": way, "steps": 0})


def proto_maml(loss: Callable[..., Any], *, embed: Embed, way: int, **settings: Any) -> Prototypical:
    """ProtoMAML: MAML from the head of prototypes, through which the meta-gradient goes as well.

    Args:
        loss: As for :class:`GradientBased`.
        embed: As for :class:`Prototypical`.
        way: Likewise.
        **settings: Of :class:`Prototypical`.

    Raises:
        ValueError: Steps below 1: those are :func:`prototypical` networks.

    FunctionKey:
        Triantafillou et al. 2020 (arXiv 1903.03096), Proto-MAML.

    Example:
        >>> import torch
        >>> from metaattn.meta import proto_maml
        >>> def embed(params, x):
        ...     return x @ params["w"]
        >>> def loss(params, x, y):
        ...     logits = embed(params, x) @ params["head.weight"].mT + params["head.bias"]
        ...     return torch.nn.functional.cross_entropy(logits, y)
        >>> learner = proto_maml(loss, embed=embed, way=2, steps=3, learning_rate=0.1)
        >>> meta = learner.init({"w": torch.eye(2), "head.weight": torch.zeros(2, 2), "head.bias": torch.zeros(2)})
        >>> list(meta["params"])  # the head is of each task's prototypes
        ['w']
        >>> x, y = torch.randn(8, 4, 2), torch.tensor([0, 1, 0, 1]).expand(8, 4)  # eight tasks
        >>> losses, gradients = learner.value_and_grad(meta, (x, y), (x, y))
        >>> losses.shape, gradients["params"]["w"].shape
        (torch.Size([8]), torch.Size([2, 2]))
    """
    check_count("steps", settings.get("steps", 1), 1)
    return Prototypical(loss, **{**settings, "embed": embed, "way": way})
