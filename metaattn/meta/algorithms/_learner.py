"""What every algorithm is: meta-parameters, a way to adapt them to a task, and an objective of many tasks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap
from torch.utils._pytree import tree_map

from .._checks import check_meta, check_tasks
from .._compiled_step import scored
from ..optim import Params

MetaParams = dict[str, Params]
Batch = Sequence[Tensor]


class Learner(ABC):
    """A meta-learning algorithm.

    A new one says what it learns (:meth:`init`) and how a task adapts it (:meth:`trajectory`); and, if it is
    not trained by the query loss after adaptation, :meth:`objective`.
    """

    loss: Callable[..., Any]
    has_aux: bool

    @property
    def groups(self) -> tuple[str, ...]:
        """The groups of meta-parameters that there must be."""
        return ("params",)

    @abstractmethod
    def init(self, params: Params) -> MetaParams:
        """Meta-parameters from a model's: copies that require gradients.

        Raises:
            TypeError: Anything but a dict of tensors, such as a module.
            ValueError: No parameters, or none that a task adapts.
        """

    @abstractmethod
    def trajectory(self, meta: MetaParams, support: Batch, steps: int | None = None) -> list[Params]:
        """The model's parameters before, between and after the inner steps on a task's support set.

        Raises:
            TypeError: Meta-parameters that are not of :meth:`init`.
        """

    def at(self, progress: float) -> Learner:
        """The algorithm as it is when ``progress``, of 0 to 1, of meta-training is done."""
        return self

    def adapt(self, meta: MetaParams, support: Batch, steps: int | None = None) -> Params:
        """The parameters adapted to a task."""
        return self.trajectory(meta, support, steps)[-1]

    def task_loss(self, meta: MetaParams, support: Batch, query: Batch) -> Any:
        """The loss on a task's query set after adaptation to its support set; with ``has_aux`` a pair."""
        return scored(self.loss, self.adapt(meta, support), query)

    def objective(self, meta: MetaParams, support: Batch, query: Batch) -> tuple[Tensor, Any]:
        """What is differentiated for a task, a scalar; and what is told of the task, as by :meth:`task_loss`."""
        out = self.task_loss(meta, support, query)
        return (out[0] if self.has_aux else out), out

    def losses(self, meta: MetaParams, support: Batch, query: Batch, *, chunk_size: int | None = None) -> Any:
        """:meth:`task_loss` of many tasks, stacked in the first dimension, by vmap in chunks of ``chunk_size``.

        Raises:
            TypeError: Meta-parameters that are not of :meth:`init`; sets that are no sequences of tensors.
            ValueError: No tasks, or not as many in all tensors; ``chunk_size`` below 1.
        """
        check_meta(meta, self.groups)
        check_tasks(support, query, chunk_size)
        f = vmap(self.task_loss, (None, 0, 0), chunk_size=chunk_size, randomness="different")
        return f(meta, tuple(support), tuple(query))

    def value_and_grad(
        self, meta: MetaParams, support: Batch, query: Batch, *, chunk_size: int | None = None
    ) -> tuple[Any, MetaParams]:
        """The tasks' losses and the gradient of the mean :meth:`objective` with respect to all meta-parameters.

        The outermost derivative is :mod:`torch.autograd`'s: :func:`torch.func.grad` would keep a graph of
        its own backward. The graph of a chunk is freed before the next begins, so that memory is that of a chunk.

        Args:
            meta: The meta-parameters.
            support: Inputs, targets, …; tasks stacked in the first dimension, be it one task: ``x[None]``.
            query: Likewise.
            chunk_size: How many tasks are worked on at once; all by default.

        Returns:
            What :meth:`losses` returns, detached, and gradients in the form of ``meta``.

        Raises:
            TypeError: As :meth:`losses`.
            ValueError: As :meth:`losses`.
        """
        check_meta(meta, self.groups)
        tasks = check_tasks(support, query, chunk_size)
        size = tasks if chunk_size is None else chunk_size
        names = [(group, k) for group, tensors in meta.items() for k in tensors]
        leaves = [meta[group][k].detach().requires_grad_() for group, k in names]
        fresh = _grouped(meta, names, leaves)
        each = vmap(self.objective, (None, 0, 0), randomness="different")
        outputs: list[Any] = []
        total: list[Tensor | None] = [None] * len(leaves)
        for start in range(0, tasks, size):
            part = slice(start, start + size)
            objective, out = each(fresh, *(tuple(t[part] for t in data) for data in (support, query)))
            grads = torch.autograd.grad(objective.sum() / tasks, leaves, allow_unused=True)
            total = [g if t is None else t if g is None else t + g for t, g in zip(total, grads, strict=True)]
            outputs.append(tree_map(torch.Tensor.detach, out))
        gradients = [torch.zeros_like(leaf) if t is None else t for leaf, t in zip(leaves, total, strict=True)]
        return tree_map(lambda *parts: torch.cat(parts), *outputs), _grouped(meta, names, gradients)


def _grouped(meta: MetaParams, names: Sequence[tuple[str, str]], tensors: Sequence[Tensor]) -> MetaParams:
    out: MetaParams = {group: {} for group in meta}
    for (group, k), t in zip(names, tensors, strict=True):
        out[group][k] = t
    return out


def copies(groups: MetaParams) -> MetaParams:
    """Meta-parameters of their own: leaves that require gradients."""
    return {g: {k: t.detach().clone().requires_grad_() for k, t in group.items()} for g, group in groups.items()}
