"""Learning of initial parameters and learning rates by gradients through the adaptation: MAML."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, ClassVar, Literal

from torch import Tensor

from .._checks import check_count, check_learning_rate, check_meta, check_optimizer, check_params
from ..gradients import Gradient, check_gradient, trajectory
from ..optim import InnerOptimizer, Params, Rates, sgd
from ._learner import Learner, MetaParams, Samples, copies


@dataclass(frozen=True)
class GradientBased(Learner):
    """Learning of initial parameters, and optionally of learning rates, by gradients through the adaptation.

    :func:`maml`, :func:`first_order_maml`, :func:`anil`, :func:`boil`, :func:`meta_sgd` and :func:`imaml` return it
    with the settings of the respective paper. See :class:`Learner` for its use and the shapes.

    Args:
        loss: ``loss(params, *samples)`` of one task's samples, such as inputs ``[shots, tokens, width]`` and targets
            ``[shots]``: a scalar; with ``has_aux`` a pair of it and metrics.
        steps: Number of inner steps, at least 1.
        learning_rate: Learning rate of the inner steps, at least 0; its initial value if it is learned.
        optimizer: Optimizer of the inner steps.
        gradient: Mode in which the inner loop is differentiated: ``"reverse"``, ``"mixed"``, ``"first_order"``,
            ``"truncated"``, ``"implicit"``, or an object with settings; see :func:`metaattn.meta.trajectory`.
        adapts: Patterns (:mod:`fnmatch`) for the names of the parameters that a task adapts. A pattern that begins with
            ``!`` excludes the names that it matches.
        learns: Learning rates that are meta-parameters: ``"nothing"``; one ``"scalar"`` for all parameters, of shape
            ``[steps]``; one per ``"tensor"``, ``[steps]``; or one per ``"element"``, ``[steps, *parameter.shape]``. The
            dimension of steps has length 1 without ``per_step``.
        per_step: Learn separate learning rates for each inner step.
        has_aux: The loss returns a pair of the scalar and metrics, a pytree of tensors.

    Raises:
        ValueError: A setting is outside its range; in use, ``adapts`` matches no parameter.
        TypeError: A setting has the wrong type, such as an optimizer given by name.

    Source:
        Finn, Abbeel and Levine 2017 (arXiv 1703.03400), algorithm 1; learned rates: Li et al. 2017 (arXiv 1707.09835)
        and Antoniou, Edwards and Storkey 2019 (arXiv 1810.09502).

    Example:
        >>> import torch
        >>> from metaattn.meta import GradientBased, adam
        >>> def loss(params, x, y):
        ...     return (params["w"] * x - y).square().mean()
        >>> learner = GradientBased(loss, steps=3, optimizer=adam(), learning_rate=0.01, learns="scalar")
        >>> meta = learner.init({"w": torch.tensor(0.0)})
        >>> x, y = torch.randn(8, 5), torch.randn(8, 5)  # eight tasks of five samples
        >>> losses, gradients = learner.value_and_grad(meta, (x, y), (x, y))
        >>> losses.shape, gradients["params"]["w"].shape, gradients["rates"]["all"].shape
        (torch.Size([8]), torch.Size([]), torch.Size([1]))
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
    least_steps: ClassVar[int] = 1

    def __post_init__(self) -> None:
        check_count("steps", self.steps, self.least_steps)
        check_learning_rate(self.learning_rate)
        check_optimizer(self.optimizer)
        check_gradient(self.gradient)
        if isinstance(self.adapts, str):
            raise TypeError(f"adapts must be a sequence of patterns, such as ({self.adapts!r},); got {self.adapts!r}")
        if self.learns not in ("nothing", "scalar", "tensor", "element"):
            raise ValueError(f"learns must be 'nothing', 'scalar', 'tensor' or 'element'; got {self.learns!r}")

    @property
    def groups(self) -> tuple[str, ...]:
        """Names of the groups of meta-parameters: ``"params"`` and, if rates are learned, ``"rates"``."""
        return ("params",) if self.learns == "nothing" else ("params", "rates")

    def init(self, params: Params) -> MetaParams:
        """Return copies of the model's parameters and of the learned rates, which require gradients.

        Args:
            params: A model's parameters, ``{name: tensor}`` of any shapes.

        Returns:
            ``{"params": {name: tensor}, "rates": {name: tensor}}``; no rates with ``learns="nothing"``.

        Raises:
            TypeError: ``params`` is not a dict of tensors, but for example a module.
            ValueError: There are no parameters, or none that a task adapts.
        """
        check_params(params)
        self.adapted(params)
        return copies({"params": params, "rates": self.initial_rates(params)})

    def initial_rates(self, params: Params) -> Params:
        """Return the initial values of the learned rates, for the parameters that a task adapts.

        Args:
            params: A model's parameters, ``{name: tensor}``.

        Returns:
            ``{}``, ``{"all": [steps]}``, ``{name: [steps]}`` or ``{name: [steps, *parameter.shape]}``, by ``learns``.
        """
        steps = self.steps if self.per_step else 1
        like = next(iter(params.values()))
        if self.learns == "nothing":
            return {}
        if self.learns == "scalar":
            return {"all": like.new_full((steps,), self.learning_rate)}
        shapes = {k: p.shape if self.learns == "element" else () for k, p in params.items()}
        return {k: params[k].new_full((steps, *shapes[k]), self.learning_rate) for k in self.adapted(params)}

    def rates(self, meta: MetaParams) -> Rates:
        """Return the learning rates in the form that the inner optimizer takes.

        Args:
            meta: Meta-parameters of :meth:`init`.

        Returns:
            A number, a tensor ``[steps]``, or a dict of tensors; see :func:`metaattn.meta.rate`.
        """
        if self.learns == "nothing":
            return self.learning_rate
        return meta["rates"]["all"] if self.learns == "scalar" else meta["rates"]

    def adapted(self, params: Params) -> list[str]:
        """Return the names of the parameters that a task adapts, in the order of ``params``.

        Args:
            params: A model's parameters, ``{name: tensor}``.

        Raises:
            ValueError: The patterns match no name.
        """
        included = [p for p in self.adapts if not p.startswith("!")]
        excluded = [p[1:] for p in self.adapts if p.startswith("!")]
        names = [k for k in params if _matches(k, included) and not _matches(k, excluded)]
        if not names:
            raise ValueError(
                f"adapts must match the name of a parameter; got {list(self.adapts)}, and the parameters are "
                f"{sorted(params)}"
            )
        return names

    def start(self, meta: MetaParams, support: Samples) -> Params:
        """Return the parameters from which a task's inner steps start.

        Args:
            meta: Meta-parameters of :meth:`init`.
            support: One task's support set, such as inputs ``[shots, tokens, width]`` and targets ``[shots]``.
        """
        return meta["params"]

    def differentiated(self) -> str | Gradient:
        """Return the mode in which the inner loop is differentiated at this time of meta-training."""
        return self.gradient

    def plain_loss(self, params: Params, *samples: Tensor) -> Tensor:
        """Return the loss without metrics.

        Args:
            params: A model's parameters, ``{name: tensor}``.
            *samples: One task's samples, such as inputs ``[shots, tokens, width]`` and targets ``[shots]``.
        """
        return self.loss(params, *samples)[0] if self.has_aux else self.loss(params, *samples)

    def trajectory(self, meta: MetaParams, support: Samples, steps: int | None = None) -> list[Params]:
        """See :class:`Learner`."""
        check_meta(meta, self.groups)
        params = self.start(meta, support)
        return trajectory(
            self.plain_loss,
            params,
            support,
            optimizer=self.optimizer,
            rates=self.rates(meta),
            steps=self.steps if steps is None else steps,
            adapts=self.adapted(params),
            gradient=self.differentiated(),
        )


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def maml(
    loss: Callable[..., Any],
    *,
    steps: int = 1,
    learning_rate: float = 0.1,
    optimizer: InnerOptimizer | None = None,
    gradient: str | Gradient = "reverse",
    adapts: Sequence[str] = ("*",),
    learns: Literal["nothing", "scalar", "tensor", "element"] = "nothing",
    per_step: bool = False,
    has_aux: bool = False,
) -> GradientBased:
    """Model-agnostic meta-learning with second-order gradients: MAML.

    A task starts from shared initial parameters and takes gradient steps on its support set. The initial parameters are
    trained by the gradient of the loss on the query set, through those steps. See :class:`Learner` for the shapes.

    Args:
        loss: ``loss(params, *samples)`` of one task's samples, such as inputs ``[shots, tokens, width]`` and targets
            ``[shots]``: a scalar; with ``has_aux`` a pair of it and metrics.
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

    Returns:
        A :class:`GradientBased` learner. Its meta-parameters are ``"params"`` and, if rates are learned, ``"rates"``.

    Raises:
        ValueError: A setting is outside its range; in use, ``adapts`` matches no parameter.
        TypeError: A setting has the wrong type, such as an optimizer given by name; an option does not exist.

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
    return GradientBased(
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


def first_order_maml(
    loss: Callable[..., Any],
    *,
    steps: int = 1,
    learning_rate: float = 0.1,
    optimizer: InnerOptimizer | None = None,
    adapts: Sequence[str] = ("*",),
    learns: Literal["nothing", "scalar", "tensor", "element"] = "nothing",
    per_step: bool = False,
    has_aux: bool = False,
) -> GradientBased:
    """MAML with constant inner gradients: first-order MAML.

    The meta-gradient of the initial parameters is the gradient of the query loss at the adapted ones.

    Args:
        loss: ``loss(params, *samples)`` of one task's samples, such as inputs ``[shots, tokens, width]`` and targets
            ``[shots]``: a scalar; with ``has_aux`` a pair of it and metrics.
        steps: Number of inner steps, at least 1.
        learning_rate: Learning rate of the inner steps, at least 0; its initial value if it is learned.
        optimizer: Optimizer of the inner steps; ``None`` for :func:`metaattn.meta.sgd`.
        adapts: Patterns (:mod:`fnmatch`) for the names of the parameters that a task adapts. A pattern that begins with
            ``!`` excludes the names that it matches.
        learns: Learning rates that are meta-parameters: ``"nothing"``, one ``"scalar"`` for all parameters, one per
            ``"tensor"``, or one per ``"element"``.
        per_step: Learn separate learning rates for each inner step.
        has_aux: The loss returns a pair of the scalar and metrics, a pytree of tensors.

    Returns:
        A :class:`GradientBased` learner. Its meta-parameters are ``"params"`` and, if rates are learned, ``"rates"``.

    Raises:
        ValueError: A setting is outside its range; in use, ``adapts`` matches no parameter.
        TypeError: A setting has the wrong type, such as an optimizer given by name; an option does not exist.

    Source:
        Finn, Abbeel and Levine 2017 (arXiv 1703.03400), section 5.2.

    Example:
        >>> import torch
        >>> from metaattn.meta import first_order_maml
        >>> learner = first_order_maml(lambda params, x: (params["w"] - x).square().sum(), learning_rate=0.25)
        >>> meta, x = learner.init({"w": torch.zeros(1)}), torch.ones(3, 1)
        >>> learner.value_and_grad(meta, (x,), (x,))[1]["params"]["w"]  # the gradient at 0.5; with maml it is half that
        tensor([-1.])
    """
    return GradientBased(
        loss,
        steps=steps,
        learning_rate=learning_rate,
        optimizer=sgd() if optimizer is None else optimizer,
        adapts=adapts,
        learns=learns,
        per_step=per_step,
        has_aux=has_aux,
        gradient="first_order",
    )
