"""Learning of initial parameters and learning rates, by gradients through adaptation: MAML."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, ClassVar, Literal

from torch import Tensor

from .._checks import check_count, check_learning_rate, check_meta, check_optimizer, check_params
from ..gradients import Gradient, check_gradient, trajectory
from ..optim import InnerOptimizer, Params, Rates, sgd
from ._learner import Batch, Learner, MetaParams, copies


@dataclass(frozen=True)
class GradientBased(Learner):
    """Learning of initial parameters, and of learning rates if asked, by gradients through adaptation.

    :func:`maml`, :func:`first_order_maml`, :func:`anil`, :func:`boil`, :func:`meta_sgd` and :func:`imaml` are its
    named settings.

    Args:
        loss: ``loss(params, inputs, targets)`` of one batch, a scalar; with ``has_aux`` a pair of it and a
            dict of tensors (metrics) that are carried along.
        steps: Inner steps, at least 1.
        learning_rate: Of the inner steps, at the start if it is learned.
        optimizer: Of the inner steps.
        gradient: How the inner loop is differentiated, see :func:`metaattn.meta.trajectory`.
        adapts: Patterns (:mod:`fnmatch`) of the names of the parameters that a task adapts; what matches one
            that begins with ``!`` it does not.
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
        """See :class:`Learner`."""
        return ("params",) if self.learns == "nothing" else ("params", "rates")

    def init(self, params: Params) -> MetaParams:
        """Meta-parameters from a model's: copies that require gradients, of it and of the learned rates.

        Raises:
            TypeError: Anything but a dict of tensors, such as a module.
            ValueError: No parameters, or none that a task adapts.
        """
        check_params(params)
        self.adapted(params)
        return copies({"params": params, "rates": self.initial_rates(params)})

    def initial_rates(self, params: Params) -> Params:
        """Those that are learned, as they are at first; of the parameters that a task adapts."""
        steps = self.steps if self.per_step else 1
        like = next(iter(params.values()))
        if self.learns == "nothing":
            return {}
        if self.learns == "scalar":
            return {"all": like.new_full((steps,), self.learning_rate)}
        shapes = {k: p.shape if self.learns == "element" else () for k, p in params.items()}
        return {k: params[k].new_full((steps, *shapes[k]), self.learning_rate) for k in self.adapted(params)}

    def rates(self, meta: MetaParams) -> Rates:
        """As the inner optimizer takes them."""
        if self.learns == "nothing":
            return self.learning_rate
        return meta["rates"]["all"] if self.learns == "scalar" else meta["rates"]

    def adapted(self, params: Params) -> list[str]:
        """The names of the parameters that a task adapts."""
        wanted = [p for p in self.adapts if not p.startswith("!")]
        unwanted = [p[1:] for p in self.adapts if p.startswith("!")]
        names = [k for k in params if _matches(k, wanted) and not _matches(k, unwanted)]
        if not names:
            raise ValueError(f"no parameter matches {list(self.adapts)}; there are {sorted(params)}")
        return names

    def start(self, meta: MetaParams, support: Batch) -> Params:
        """What a task's inner steps start from."""
        return meta["params"]

    def differentiated(self) -> str | Gradient:
        """How the inner loop is differentiated now."""
        return self.gradient

    def plain_loss(self, params: Params, *batch: Tensor) -> Tensor:
        """The loss without metrics."""
        return self.loss(params, *batch)[0] if self.has_aux else self.loss(params, *batch)

    def trajectory(self, meta: MetaParams, support: Batch, steps: int | None = None) -> list[Params]:
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


def maml(loss: Callable[..., Any], **settings: Any) -> GradientBased:
    """Model-agnostic meta-learning, second order.

    Args:
        loss: As for :class:`GradientBased`.
        **settings: Of :class:`GradientBased`.

    FunctionKey:
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

    Args:
        loss: As for :class:`GradientBased`.
        **settings: Of :class:`GradientBased`, but for ``gradient``.

    FunctionKey:
        Finn, Abbeel and Levine 2017 (arXiv 1703.03400), section 5.2.

    Example:
        >>> import torch
        >>> from metaattn.meta import first_order_maml
        >>> learner = first_order_maml(lambda params, x: (params["w"] - x).square().sum(), learning_rate=0.25)
        >>> meta, x = learner.init({"w": torch.zeros(1)}), torch.ones(3, 1)
        >>> learner.value_and_grad(meta, (x,), (x,))[1]["params"]["w"]  # at 0.5, the end; maml halves it
        tensor([-1.])
    """
    return GradientBased(loss, **{**settings, "gradient": "first_order"})
