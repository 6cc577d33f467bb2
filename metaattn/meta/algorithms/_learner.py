"""Base class of all algorithms: meta-parameters, their adaptation to a task, and an objective over many tasks."""

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

MetaParams = dict[str, Params]  # by group ("params", "rates", …), and by name in it
Samples = Sequence[Tensor]  # what the loss takes after the parameters: (inputs, targets)


class Learner(ABC):
    """Base class of meta-learning algorithms.

    Shapes: a task's *support set* and *query set* are sequences of tensors, which the loss takes after the parameters;
    usually a pair ``(inputs, targets)``, such as ``[shots, tokens, width]`` and ``[shots]``. :meth:`adapt`,
    :meth:`trajectory`, :meth:`task_loss` and :meth:`objective` take one task. :meth:`losses` and :meth:`value_and_grad`
    take many, stacked in a new first dimension of every tensor: ``[tasks, shots, tokens, width]`` and
    ``[tasks, shots]``.

    *Meta-parameters* are a dict of groups of named tensors, ``{"params": {name: tensor}, "rates": {name: tensor}, …}``,
    made by :meth:`init`. A learner itself holds settings only and never changes.

    A new algorithm implements :meth:`init` (the meta-parameters) and :meth:`trajectory` (the adaptation to a task). If
    it is not trained by the query loss after adaptation, it also overrides :meth:`objective`.

    Attributes:
        loss: ``loss(params, *samples)`` of one task's samples returns a scalar or, with ``has_aux``, a pair of the
            scalar and a pytree of tensors (metrics).
        has_aux: True if the loss returns metrics.

    Example:
        >>> import torch
        >>> from metaattn.meta import Learner, maml
        >>> def loss(params, x, y):
        ...     return (x @ params["w"] - y).square().mean()
        >>> learner = maml(loss, learning_rate=0.1)
        >>> isinstance(learner, Learner)
        True
        >>> meta = learner.init({"w": torch.zeros(2)})
        >>> optimizer = torch.optim.SGD(meta["params"].values(), lr=0.01)
        >>> support, query = [(torch.randn(3, 5, 2), torch.randn(3, 5)) for _ in range(2)]  # three tasks of five
        >>> losses, gradients = learner.value_and_grad(meta, support, query)
        >>> for name, p in meta["params"].items():
        ...     p.grad = gradients["params"][name]
        >>> optimizer.step()
    """

    loss: Callable[..., Any]
    has_aux: bool

    @property
    def groups(self) -> tuple[str, ...]:
        """Names of the groups of meta-parameters that this learner needs."""
        return ("params",)

    @abstractmethod
    def init(self, params: Params) -> MetaParams:
        """Return initial meta-parameters.

        Args:
            params: A model's parameters, ``{name: tensor}`` of any shapes; of a module,
                ``dict(module.named_parameters())``.

        Returns:
            Copies of the parameters, and further groups that this learner learns; all require gradients.

        Raises:
            TypeError: ``params`` is not a dict of tensors, but for example a module.
            ValueError: There are no parameters, or none that a task adapts.

        Example:
            >>> import torch
            >>> from metaattn.meta import maml
            >>> def loss(params, x):
            ...     return (params["w"] - x).square().sum()
            >>> learner = maml(loss, steps=3, learns="tensor", per_step=True)
            >>> meta = learner.init({"w": torch.zeros(2)})
            >>> meta["params"]["w"].shape, meta["rates"]["w"].shape
            (torch.Size([2]), torch.Size([3]))
        """

    @abstractmethod
    def trajectory(self, meta: MetaParams, support: Samples, steps: int | None = None) -> list[Params]:
        """Return a model's parameters before, between and after the inner steps on one task.

        Args:
            meta: Meta-parameters of :meth:`init`.
            support: One task's support set, such as inputs ``[shots, tokens, width]`` and targets ``[shots]``.
            steps: Number of inner steps; ``None`` for the learner's own.

        Returns:
            A list of ``steps + 1`` dicts, each with the names and shapes of the model's parameters. They are
            differentiable in the meta-parameters.

        Raises:
            TypeError: ``meta`` was not made by :meth:`init` of such a learner.

        Example:
            >>> import torch
            >>> from metaattn.meta import maml
            >>> learner = maml(lambda params, x: (params["w"] - x).square().sum(), learning_rate=0.25)
            >>> meta = learner.init({"w": torch.zeros(1)})
            >>> [params["w"].item() for params in learner.trajectory(meta, (torch.ones(1),), steps=3)]
            [0.0, 0.5, 0.75, 0.875]
        """

    def at(self, progress: float) -> Learner:
        """Return the learner for a given time in meta-training: settings may be annealed (:func:`maml_plus_plus`).

        Args:
            progress: Fraction of meta-training that is done, from 0 to 1.

        Returns:
            A learner with the same meta-parameters; this one if nothing is annealed.

        Raises:
            ValueError: ``progress`` is outside ``[0, 1]``, for a learner that anneals.
            TypeError: ``progress`` is not a number, for a learner that anneals.

        Example:
            >>> from metaattn.meta import maml_plus_plus
            >>> learner = maml_plus_plus(lambda params, x: (params["w"] - x).square().sum(), first_order_until=0.3)
            >>> learner.at(0.1).differentiated(), learner.at(0.5).differentiated()
            ('first_order', 'reverse')
        """
        return self

    def adapt(self, meta: MetaParams, support: Samples, steps: int | None = None) -> Params:
        """Return a model's parameters adapted to one task: the last of :meth:`trajectory`.

        Args:
            meta: Meta-parameters of :meth:`init`.
            support: One task's support set, such as inputs ``[shots, tokens, width]`` and targets ``[shots]``.
            steps: Number of inner steps; ``None`` for the learner's own.

        Returns:
            A dict with the names and shapes of the model's parameters.

        Raises:
            TypeError: ``meta`` was not made by :meth:`init` of such a learner.

        Example:
            >>> import torch
            >>> from torch.func import functional_call
            >>> from metaattn import Transformer
            >>> from metaattn.meta import maml
            >>> model = Transformer(input="continuous", in_features=3, output="pooled", out_features=2, dim=8, heads=2)
            >>> def loss(params, x, y):
            ...     return torch.nn.functional.cross_entropy(functional_call(model, params, (x,)), y)
            >>> learner = maml(loss, steps=2)
            >>> meta = learner.init(dict(model.named_parameters()))
            >>> shots, labels = torch.randn(4, 7, 3), torch.tensor([0, 1, 0, 1])  # four sequences of seven tokens
            >>> adapted = learner.adapt(meta, (shots, labels))
            >>> functional_call(model, adapted, (torch.randn(5, 7, 3),)).shape
            torch.Size([5, 2])
        """
        return self.trajectory(meta, support, steps)[-1]

    def task_loss(self, meta: MetaParams, support: Samples, query: Samples) -> Any:
        """Return the loss on one task's query set after adaptation to its support set.

        Args:
            meta: Meta-parameters of :meth:`init`.
            support: One task's support set, such as inputs ``[shots, tokens, width]`` and targets ``[shots]``.
            query: The same task's query set, such as ``[queries, tokens, width]`` and ``[queries]``.

        Returns:
            What the loss returns: a scalar or, with ``has_aux``, a pair of it and metrics.

        Raises:
            TypeError: ``meta`` was not made by :meth:`init` of such a learner.

        Example:
            >>> import torch
            >>> from metaattn.meta import maml
            >>> learner = maml(lambda params, x: (params["w"] - x).square().sum(), learning_rate=0.25)
            >>> meta, x = learner.init({"w": torch.zeros(1)}), torch.ones(1)
            >>> learner.task_loss(meta, (x,), (x,)).item()  # at w = 0.5
            0.25
        """
        return scored(self.loss, self.adapt(meta, support), query)

    def objective(self, meta: MetaParams, support: Samples, query: Samples) -> tuple[Tensor, Any]:
        """Return the scalar whose gradient trains the meta-parameters on one task, and what to report of the task.

        Args:
            meta: Meta-parameters of :meth:`init`.
            support: One task's support set, such as inputs ``[shots, tokens, width]`` and targets ``[shots]``.
            query: The same task's query set, such as ``[queries, tokens, width]`` and ``[queries]``.

        Returns:
            The scalar objective, by default the query loss, and the result of :meth:`task_loss`.

        Raises:
            TypeError: ``meta`` was not made by :meth:`init` of such a learner.

        Example:
            >>> import torch
            >>> from metaattn.meta import reptile
            >>> learner = reptile(lambda params, x: (params["w"] - x).square().sum(), learning_rate=0.25)
            >>> meta, x = learner.init({"w": torch.zeros(1)}), torch.ones(1)
            >>> objective, loss = learner.objective(meta, (x,), (x,))  # w moves from 0 to 1
            >>> objective.item(), loss.item()
            (0.5, 0.0)
        """
        out = self.task_loss(meta, support, query)
        return (out[0] if self.has_aux else out), out

    def losses(self, meta: MetaParams, support: Samples, query: Samples, *, chunk_size: int | None = None) -> Any:
        """Return :meth:`task_loss` of many tasks, by :func:`torch.func.vmap` over them.

        Args:
            meta: Meta-parameters of :meth:`init`.
            support: Support sets, stacked in the first dimension of every tensor, such as inputs ``[tasks, shots,
                tokens, width]`` and targets ``[tasks, shots]``.
            query: Query sets of the same tasks, such as ``[tasks, queries, tokens, width]`` and ``[tasks, queries]``.
            chunk_size: Number of tasks that are computed at once, at least 1; ``None`` for all. Less takes less memory.

        Returns:
            Losses ``[tasks]`` or, with ``has_aux``, a pair of them and metrics ``[tasks, ...]``. They are
            differentiable in the meta-parameters.

        Raises:
            TypeError: ``meta`` was not made by :meth:`init` of such a learner; a set is not a sequence of tensors.
            ValueError: There are no tasks, or not the same number in all tensors; ``chunk_size`` is below 1.

        Example:
            >>> import torch
            >>> from metaattn.meta import maml
            >>> learner = maml(lambda params, x: (params["w"] - x).square().sum(), learning_rate=0.25)
            >>> meta = learner.init({"w": torch.zeros(1)})
            >>> x = torch.tensor([[0.0], [1.0], [2.0]])  # three tasks of one sample
            >>> learner.losses(meta, (x,), (x,)).tolist()
            [0.0, 0.25, 1.0]
        """
        check_meta(meta, self.groups)
        check_tasks(support, query, chunk_size)
        f = vmap(self.task_loss, (None, 0, 0), chunk_size=chunk_size, randomness="different")
        return f(meta, tuple(support), tuple(query))

    def value_and_grad(
        self, meta: MetaParams, support: Samples, query: Samples, *, chunk_size: int | None = None
    ) -> tuple[Any, MetaParams]:
        """Return the losses of many tasks, and the gradient of their mean :meth:`objective`.

        The outermost derivative is taken by :mod:`torch.autograd`, because :func:`torch.func.grad` would also store the
        graph of its own backward pass. The graph of one chunk of tasks is freed before the next begins, so that memory
        is that of one chunk.

        Args:
            meta: Meta-parameters of :meth:`init`.
            support: Support sets, stacked in the first dimension of every tensor, such as inputs ``[tasks, shots,
                tokens, width]`` and targets ``[tasks, shots]``. One task needs that dimension too (``x[None]``):
                without it, six sequences ``[6, tokens, width]`` are taken for six tasks, not for one task of six.
            query: Query sets of the same tasks, such as ``[tasks, queries, tokens, width]`` and ``[tasks, queries]``.
            chunk_size: Number of tasks that are computed at once, at least 1; ``None`` for all. Less takes less memory.

        Returns:
            The result of :meth:`losses` without its graph, and the gradient: a dict of dicts with the groups, names and
            shapes of ``meta``.

        Raises:
            TypeError: ``meta`` was not made by :meth:`init` of such a learner; a set is not a sequence of tensors.
            ValueError: There are no tasks, or not the same number in all tensors; ``chunk_size`` is below 1.

        Example:
            >>> import torch
            >>> from torch.func import functional_call
            >>> from metaattn import Transformer
            >>> from metaattn.meta import maml
            >>> model = Transformer(input="continuous", in_features=3, output="pooled", out_features=1, dim=8, heads=2)
            >>> def loss(params, x, y):
            ...     return (functional_call(model, params, (x,)).squeeze(-1) - y).square().mean()
            >>> learner = maml(loss, steps=2, learning_rate=0.1, gradient="mixed")
            >>> meta = learner.init(dict(model.named_parameters()))
            >>> tasks, shots, queries, tokens = 16, 5, 10, 7
            >>> support = torch.randn(tasks, shots, tokens, 3), torch.randn(tasks, shots)
            >>> query = torch.randn(tasks, queries, tokens, 3), torch.randn(tasks, queries)
            >>> losses, gradients = learner.value_and_grad(meta, support, query, chunk_size=8)
            >>> losses.shape, gradients["params"]["head.weight"].shape
            (torch.Size([16]), torch.Size([1, 8]))
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
            chunk = slice(start, start + size)
            objective, out = each(fresh, *(tuple(t[chunk] for t in data) for data in (support, query)))
            grads = torch.autograd.grad(objective.sum() / tasks, leaves, allow_unused=True)
            total = [g if t is None else t if g is None else t + g for t, g in zip(total, grads, strict=True)]
            outputs.append(tree_map(torch.Tensor.detach, out))
        gradients = [torch.zeros_like(leaf) if t is None else t for leaf, t in zip(leaves, total, strict=True)]
        return tree_map(lambda *chunks: torch.cat(chunks), *outputs), _grouped(meta, names, gradients)


def _grouped(meta: MetaParams, names: Sequence[tuple[str, str]], tensors: Sequence[Tensor]) -> MetaParams:
    out: MetaParams = {group: {} for group in meta}
    for (group, k), t in zip(names, tensors, strict=True):
        out[group][k] = t
    return out


def copies(groups: MetaParams) -> MetaParams:
    """Return copies of all tensors, which are leaves of autograd and require gradients."""
    return {g: {k: t.detach().clone().requires_grad_() for k, t in group.items()} for g, group in groups.items()}
