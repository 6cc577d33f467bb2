"""Meta-learning algorithms: what is learned across tasks, and how a task adapts it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from torch import Tensor
from torch.func import vmap

from ._checks import check_count, check_learning_rate, check_meta, check_optimizer, check_params, check_tasks
from .gradients import Gradient, check_gradient, trajectory
from .optim import InnerOptimizer, Params, Rates, sgd

MetaParams = dict[str, Params]
Batch = Sequence[Tensor]


@dataclass(frozen=True)
class GradientBased:
    """Learning of initial parameters, and of learning rates if asked, by gradients through adaptation.

    :func:`maml`, :func:`first_order_maml`, :func:`anil` and :func:`meta_sgd` are its named settings.

    Args:
        loss: ``loss(params, inputs, targets)`` of one batch, a scalar; with ``has_aux`` a pair of it and a
            dict of tensors (metrics) that are carried along.
        steps: Inner steps, at least 1.
        learning_rate: Of the inner steps, at the start if it is learned.
        optimizer: Of the inner steps.
        gradient: How the inner loop is differentiated, see :func:`metaattn.meta.trajectory`.
        adapts: Patterns (:mod:`fnmatch`) of the names of the parameters that a task adapts.
        learns: Which learning rates are meta-parameters: ``"nothing"``; one ``"scalar"``; one for each
            ``"tensor"``; one for each ``"element"``.
        per_step: Whether each inner step has learning rates of its own.
        has_aux: Whether the loss returns metrics.

    Raises:
        ValueError: A value that is none of those allowed; patterns that match no parameter (on use).
        TypeError: A value of another type, such as an optimizer's name.
    """

    loss: Callable[..., Any]
    steps: int = 1
    learning_rate: float = 0.1
    optimizer: InnerOptimizer = field(default_factory=sgd)
    gradient: str | Gradient = "reverse"
    adapts: Sequence[str] = ("*",)
    learns: Literal["nothing", "scalar", "tensor", "element"] = "nothing"
    per_step: bool = False
    has_aux: bool = False

    def __post_init__(self) -> None:
        check_count("steps", self.steps, 1)
        check_learning_rate(self.learning_rate)
        check_optimizer(self.optimizer)
        check_gradient(self.gradient)
        if isinstance(self.adapts, str):
            raise TypeError(f"adapts must be a sequence of patterns, such as ({self.adapts!r},); got {self.adapts!r}")
        if self.learns not in ("nothing", "scalar", "tensor", "element"):
            raise ValueError(f"learns must be 'nothing', 'scalar', 'tensor' or 'element'; got {self.learns!r}")

    def init(self, params: Params) -> MetaParams:
        """Meta-parameters from a model's: copies that require gradients, of it and of the learned rates.

        Raises:
            TypeError: Anything but a dict of tensors, such as a module.
            ValueError: No parameters, or none that a task adapts.
        """
        check_params(params)
        self.adapted(params)
        out = {"params": params, "rates": self._initial_rates(params)}
        return {k: {n: t.detach().clone().requires_grad_() for n, t in group.items()} for k, group in out.items()}

    def _initial_rates(self, params: Params) -> Params:
        steps = self.steps if self.per_step else 1
        like = next(iter(params.values()))
        if self.learns == "nothing":
            return {}
        if self.learns == "scalar":
            return {"all": like.new_full((steps,), self.learning_rate)}
        shapes = {k: p.shape if self.learns == "element" else () for k, p in params.items()}
        return {k: params[k].new_full((steps, *shapes[k]), self.learning_rate) for k in self.adapted(params)}

    def _rates(self, meta: MetaParams) -> Rates:
        if self.learns == "nothing":
            return self.learning_rate
        return meta["rates"]["all"] if self.learns == "scalar" else meta["rates"]

    def adapted(self, params: Params) -> list[str]:
        """The names of the parameters that a task adapts."""
        names = [k for k in params if any(fnmatchcase(k, pattern) for pattern in self.adapts)]
        if not names:
            raise ValueError(f"no parameter matches {list(self.adapts)}; there are {sorted(params)}")
        return names

    def trajectory(self, meta: MetaParams, support: Batch, steps: int | None = None) -> list[Params]:
        """The parameters before, between and after the inner steps on a task's support set.

        Raises:
            TypeError: Meta-parameters that are not of :meth:`init`.
        """
        check_meta(meta, self.learns != "nothing")

        def loss(params: Params, *batch: Tensor) -> Tensor:
            return self.loss(params, *batch)[0] if self.has_aux else self.loss(params, *batch)

        return trajectory(
            loss,
            meta["params"],
            support,
            optimizer=self.optimizer,
            rates=self._rates(meta),
            steps=self.steps if steps is None else steps,
            adapts=self.adapted(meta["params"]),
            gradient=self.gradient,
        )

    def adapt(self, meta: MetaParams, support: Batch, steps: int | None = None) -> Params:
        """The parameters adapted to a task."""
        return self.trajectory(meta, support, steps)[-1]

    def task_loss(self, meta: MetaParams, support: Batch, query: Batch) -> Any:
        """The loss on a task's query set after adaptation to its support set; with ``has_aux`` a pair."""
        return self.loss(self.adapt(meta, support), *query)

    def losses(self, meta: MetaParams, support: Batch, query: Batch, *, chunk_size: int | None = None) -> Any:
        """:meth:`task_loss` of many tasks, stacked in the first dimension, by vmap in chunks of ``chunk_size``.

        Raises:
            TypeError: Meta-parameters that are not of :meth:`init`; sets that are no sequences of tensors.
            ValueError: No tasks, or not as many in all tensors; ``chunk_size`` below 1.
        """
        check_tasks(support, query, chunk_size)
        f = vmap(self.task_loss, (None, 0, 0), chunk_size=chunk_size, randomness="different")
        return f(meta, tuple(support), tuple(query))

    def value_and_grad(
        self, meta: MetaParams, support: Batch, query: Batch, *, chunk_size: int | None = None
    ) -> tuple[Any, MetaParams]:
        """The tasks' losses and the gradient of their mean with respect to all meta-parameters.

        The outermost derivative is :mod:`torch.autograd`'s: :func:`torch.func.grad` would keep a graph of
        its own backward. The graph of a chunk is freed before the next begins, so that memory is that of a chunk.

        Args:
            meta: The meta-parameters.
            support: Inputs, targets, …; tasks stacked in the first dimension.
            query: Likewise.
            chunk_size: How many tasks are worked on at once; all by default.

        Returns:
            What :meth:`losses` returns, detached, and gradients in the form of ``meta``.

        Raises:
            TypeError: As :meth:`losses`.
            ValueError: As :meth:`losses`.
        """
        check_meta(meta, self.learns != "nothing")
        tasks = check_tasks(support, query, chunk_size)
        size = tasks if chunk_size is None else chunk_size
        names = [(group, k) for group, tensors in meta.items() for k in tensors]
        leaves = [meta[group][k].detach().requires_grad_() for group, k in names]
        fresh: MetaParams = {group: {} for group in meta}
        for (group, k), leaf in zip(names, leaves, strict=True):
            fresh[group][k] = leaf
        outputs, total = [], [torch.zeros_like(leaf) for leaf in leaves]
        for start in range(0, tasks, size):
            part = slice(start, start + size)
            out = self.losses(fresh, [t[part] for t in support], [t[part] for t in query])
            loss = out[0] if self.has_aux else out
            grads = torch.autograd.grad(loss.sum() / tasks, leaves, allow_unused=True)
            total = [t if g is None else t + g for t, g in zip(total, grads, strict=True)]
            outputs.append(torch.utils._pytree.tree_map(torch.Tensor.detach, out))
        gradients: MetaParams = {group: {} for group in meta}
        for (group, k), g in zip(names, total, strict=True):
            gradients[group][k] = g
        return torch.utils._pytree.tree_map(lambda *parts: torch.cat(parts), *outputs), gradients


def maml(loss: Callable[..., Any], **settings: Any) -> GradientBased:
    """Model-agnostic meta-learning, second order.

    Args:
        loss: As for :class:`GradientBased`.
        **settings: Of :class:`GradientBased`.

    Source:
        Finn, Abbeel and Levine 2017 (arXiv 1703.03400), algorithm 1.

    Example:
        >>> import torch
        >>> from metaattn.meta import maml
        >>> def loss(params, x, y):
        ...     return (params["w"] * x - y).square().mean()
        >>> learner = maml(loss, steps=2, learning_rate=0.1)
        >>> meta = learner.init({"w": torch.tensor(0.0)})
        >>> x, y = torch.randn(8, 5), torch.randn(8, 5)  # eight tasks
        >>> losses, gradients = learner.value_and_grad(meta, (x, y), (x, y))
        >>> losses.shape, gradients["params"]["w"].shape
        (torch.Size([8]), torch.Size([]))
    """
    return GradientBased(loss, **settings)


def first_order_maml(loss: Callable[..., Any], **settings: Any) -> GradientBased:
    """MAML with the inner gradients taken for constants.

    Source:
        Finn, Abbeel and Levine 2017 (arXiv 1703.03400), section 5.2.
    """
    return GradientBased(loss, **{**settings, "gradient": "first_order"})


def anil(loss: Callable[..., Any], *, adapts: Sequence[str] = ("head.*",), **settings: Any) -> GradientBased:
    """Almost no inner loop: a task adapts the head alone.

    Args:
        loss: As for :class:`GradientBased`.
        adapts: Patterns of the names of what a task adapts.
        **settings: Of :class:`GradientBased`.

    Source:
        Raghu et al. 2020 (arXiv 1909.09157).
    """
    return GradientBased(loss, adapts=adapts, **settings)


def meta_sgd(loss: Callable[..., Any], **settings: Any) -> GradientBased:
    """MAML that also learns a learning rate for each element of each parameter.

    Source:
        Li et al. 2017 (arXiv 1707.09835), algorithm 1.
    """
    return GradientBased(loss, **{"learns": "element", **settings})
