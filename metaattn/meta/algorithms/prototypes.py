"""Heads made of class prototypes: prototypical networks, and ProtoMAML, which adapts such a head."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from .._checks import check_count, check_embed
from ..gradients import Gradient
from ..optim import InnerOptimizer, Params, sgd
from ._learner import MetaParams, Samples
from .maml import GradientBased

Embed = Callable[[Params, Tensor], Tensor]


@dataclass(frozen=True)
class Prototypical(GradientBased):
    """Classification with a linear head that is made of the classes' mean features in the support set.

    The squared distance to a class's prototype ``c`` is linear in the features ``f``, except for a term that all
    classes share: ``-|f - c|^2 = 2 c.f - |c|^2 - |f|^2``. The head therefore has weight ``2 c`` and bias ``-|c|^2``.
    With ``steps=0`` the head is not adapted further (:func:`prototypical`), otherwise the inner loop starts from it
    (:func:`proto_maml`).

    Args:
        loss: As for :class:`GradientBased`; the support set must be a pair of inputs and integer targets ``[shots]``.
        steps: Number of inner steps, at least 0.
        learning_rate: Learning rate of the inner steps; its initial value if it is learned.
        optimizer: Optimizer of the inner steps.
        gradient: Mode in which the inner loop is differentiated.
        adapts: Patterns for the names of the parameters that a task adapts, as for :class:`GradientBased`.
        learns: Learning rates that are meta-parameters, as for :class:`GradientBased`.
        per_step: Learn separate learning rates for each inner step.
        has_aux: The loss returns a pair of the scalar and metrics.
        embed: ``embed(params, inputs)`` returns the features ``[shots, features]`` that the head takes.
        way: Number of classes, at least 2; targets are ``0 … way - 1``.
        weight: Name of the head's weight, ``[way, features]``. It is not a meta-parameter.
        bias: Name of the head's bias, ``[way]``. It is not a meta-parameter.

    Raises:
        TypeError: ``embed`` is not callable; ``way`` is not an integer; otherwise as :class:`GradientBased`.
        ValueError: ``way`` is below 2; no parameter is named ``weight`` or ``bias`` (in :meth:`init`); otherwise as
            :class:`GradientBased`.

    Source:
        Snell, Swersky and Zemel 2017 (arXiv 1703.05175), equations 1, 2 and 8.

    Example:
        >>> import torch
        >>> from metaattn.meta import Prototypical
        >>> def loss(params, x, y):
        ...     return torch.nn.functional.cross_entropy(x @ params["head.weight"].mT + params["head.bias"], y)
        >>> learner = Prototypical(loss, steps=0, embed=lambda params, x: x, way=2)
        >>> x, y = torch.tensor([[0.0, 1.0], [2.0, 0.0]]), torch.tensor([0, 1])
        >>> learner.start({"params": {}}, (x, y))["head.weight"].tolist()
        [[0.0, 2.0], [4.0, 0.0]]
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
        """Return copies of the model's parameters except the head, and the learned rates.

        Args:
            params: A model's parameters, ``{name: tensor}``, with the head.

        Returns:
            ``{"params": {name: tensor}, "rates": {name: tensor}}``; the head is not in ``"params"``.

        Raises:
            TypeError: ``params`` is not a dict of tensors.
            ValueError: No parameter has the name of the head's weight or bias.
        """
        meta = super().init(params)
        for option in ("weight", "bias"):
            name = getattr(self, option)
            if name not in params:
                raise ValueError(
                    f"{option} must be the name of the head's {option}; got {name!r}, and the parameters are "
                    f"{sorted(params)}"
                )
            del meta["params"][name]
        return meta

    def start(self, meta: MetaParams, support: Samples) -> Params:
        """Return the parameters with a head of the task's prototypes.

        Args:
            meta: Meta-parameters of :meth:`init`.
            support: One task's support set: inputs ``[shots, ...]`` and integer targets ``[shots]``.

        Returns:
            The parameters, and the head: weight ``[way, features]`` and bias ``[way]``, differentiable functions of the
            other parameters.
        """
        assert self.embed is not None
        inputs, targets = support
        features = self.embed(meta["params"], inputs)
        members = (targets == torch.arange(self.way, device=targets.device)[:, None]).to(features.dtype)
        centres = members @ features / members.sum(1, keepdim=True).clamp_min(1)
        return {**meta["params"], self.weight: 2 * centres, self.bias: -centres.square().sum(-1)}

    def trajectory(self, meta: MetaParams, support: Samples, steps: int | None = None) -> list[Params]:
        """See :class:`Learner`; a learner with ``steps=0`` returns the same parameters ``steps + 1`` times."""
        if self.steps == 0:
            return [self.start(meta, support)] * (1 + (steps or 0))
        return super().trajectory(meta, support, steps)


def prototypical(
    loss: Callable[..., Any],
    *,
    embed: Embed,
    way: int,
    has_aux: bool = False,
    weight: str = "head.weight",
    bias: str = "head.bias",
) -> Prototypical:
    """Prototypical networks: classify by the nearest prototype in feature space, without an inner loop.

    With a cross-entropy loss, the class probabilities are the softmax of the negative squared distances. The options of
    an inner loop have no meaning here and do not exist.

    Args:
        loss: ``loss(params, *samples)`` of one task's samples, such as inputs ``[shots, tokens, width]`` and targets
            ``[shots]``: a scalar; with ``has_aux`` a pair of it and metrics.
        embed: ``embed(params, inputs)`` returns the features ``[shots, features]`` that the head takes.
        way: Number of classes, at least 2; targets are ``0 … way - 1``.
        has_aux: The loss returns a pair of the scalar and metrics, a pytree of tensors.
        weight: Name of the head's weight, ``[way, features]``. It is not a meta-parameter.
        bias: Name of the head's bias, ``[way]``. It is not a meta-parameter.

    Returns:
        A :class:`Prototypical` learner with ``steps=0``. Its meta-parameters are ``"params"``, without the head.

    Raises:
        ValueError: A setting is outside its range; no parameter has the name of the head's weight or bias (in
            :meth:`Learner.init`).
        TypeError: A setting has the wrong type; an option does not exist.

    Source:
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
    return Prototypical(
        loss,
        embed=embed,
        way=way,
        has_aux=has_aux,
        weight=weight,
        bias=bias,
        steps=0,
    )


def proto_maml(
    loss: Callable[..., Any],
    *,
    embed: Embed,
    way: int,
    steps: int = 1,
    learning_rate: float = 0.1,
    optimizer: InnerOptimizer | None = None,
    gradient: str | Gradient = "reverse",
    adapts: Sequence[str] = ("*",),
    learns: Literal["nothing", "scalar", "tensor", "element"] = "nothing",
    per_step: bool = False,
    has_aux: bool = False,
    weight: str = "head.weight",
    bias: str = "head.bias",
) -> Prototypical:
    """ProtoMAML: MAML that starts from a head of prototypes, through which the meta-gradient passes too.

    Args:
        loss: ``loss(params, *samples)`` of one task's samples, such as inputs ``[shots, tokens, width]`` and targets
            ``[shots]``: a scalar; with ``has_aux`` a pair of it and metrics.
        embed: ``embed(params, inputs)`` returns the features ``[shots, features]`` that the head takes.
        way: Number of classes, at least 2; targets are ``0 … way - 1``.
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
        weight: Name of the head's weight, ``[way, features]``. It is not a meta-parameter.
        bias: Name of the head's bias, ``[way]``. It is not a meta-parameter.

    Returns:
        A :class:`Prototypical` learner. Its meta-parameters are ``"params"``, without the head, and, with learned
        rates, ``"rates"``.

    Raises:
        ValueError: A setting is outside its range (without steps, use :func:`prototypical`); no parameter has the
            name of the head's weight or bias (in :meth:`Learner.init`).
        TypeError: A setting has the wrong type, such as an optimizer given by name; an option does not exist.

    Source:
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
        >>> list(meta["params"])  # each task makes its head from prototypes
        ['w']
        >>> x, y = torch.randn(8, 4, 2), torch.tensor([0, 1, 0, 1]).expand(8, 4)  # eight tasks of four samples
        >>> losses, gradients = learner.value_and_grad(meta, (x, y), (x, y))
        >>> losses.shape, gradients["params"]["w"].shape
        (torch.Size([8]), torch.Size([2, 2]))
    """
    check_count("steps", steps, 1)
    return Prototypical(
        loss,
        embed=embed,
        way=way,
        steps=steps,
        learning_rate=learning_rate,
        optimizer=sgd() if optimizer is None else optimizer,
        gradient=gradient,
        adapts=adapts,
        learns=learns,
        per_step=per_step,
        has_aux=has_aux,
        weight=weight,
        bias=bias,
    )
