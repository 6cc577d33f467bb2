"""Build the meta-learning algorithm of a config."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F

import metaattn
from metaattn.meta import (
    Cavia,
    Gradient,
    GradientBased,
    Implicit,
    InnerOptimizer,
    MAMLPlusPlus,
    Mixed,
    Prototypical,
    Reptile,
    Truncated,
    adam,
    momentum,
    sgd,
)

from .config import AlgorithmConfig, Config, GradientName, InnerName, Kind, Precision, TaskName

MOST_REST = 0.2  # with 0.5 (learning_rate=0.2, proximal=1, three steps) nothing was learned, with 0.13 it was
Network = Callable[[dict[str, Tensor], Tensor], Tensor]

OPTIMIZERS: dict[InnerName, Callable[[], InnerOptimizer]] = {
    InnerName.sgd: sgd,
    InnerName.momentum: momentum,
    InnerName.adam: adam,
}


def build_learner(config: Config, model: metaattn.Transformer) -> GradientBased:
    """Return the algorithm of a config, for its task and model.

    Raises:
        ValueError: The algorithm or the task does not allow a setting, or nothing would be learned.
    """
    a = config.algorithm
    _check_learns(a)
    regression = config.task.name is TaskName.sinusoid
    predict = network(model, config.precision)

    def loss(params: dict[str, Tensor], inputs: Tensor, targets: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        out = predict(params, inputs)
        if regression:
            return F.mse_loss(out, targets), {}
        return F.cross_entropy(out, targets), {"accuracy": (out.argmax(-1) == targets).to(out.dtype).mean()}

    settings: dict[str, Any] = {
        "steps": a.steps,
        "learning_rate": a.learning_rate,
        "optimizer": OPTIMIZERS[a.optimizer](),
        "gradient": _gradient(a),
        "adapts": tuple(a.adapts),
        "learns": a.learns.value,
        "per_step": a.per_step,
        "has_aux": True,
    }
    if a.kind is Kind.maml_plus_plus:
        return MAMLPlusPlus(
            loss, multi_step_until=a.multi_step_until, first_order_until=a.first_order_until, **settings
        )
    if a.kind is Kind.reptile:
        return Reptile(loss, **settings)
    if a.kind is Kind.cavia:
        return Cavia(loss, size=a.context, into=a.context_into, **settings)
    if a.kind is Kind.prototypical:
        if regression:
            raise ValueError(f"algorithm={a.name} is for classification; use task=glyphs or task=omniglot")
        return Prototypical(loss, embed=_features(model, predict), way=config.task.way, **settings)
    return GradientBased(loss, **settings)


def _check_learns(a: AlgorithmConfig) -> None:
    """Raise a ``ValueError`` if the gradient of the inner loop does not reach what is to be learned."""
    if a.steps == 0 or a.kind is Kind.reptile:
        return
    cut = a.gradient is GradientName.truncated and (a.last_steps or a.steps) < a.steps
    if cut and "*" in a.adapts and a.kind is not Kind.cavia:
        raise ValueError(
            f"with algorithm.last_steps={a.last_steps} of algorithm.steps={a.steps} the initial values of adapted "
            "parameters get no derivative, and a task adapts all of them; give algorithm.last_steps=null, or "
            "algorithm=anil, whose tasks adapt the head only"
        )
    if a.gradient is GradientName.implicit and a.kind is Kind.cavia:
        raise ValueError(
            f"algorithm.gradient=implicit does not train algorithm={a.name}: the context ends far from a minimum, and "
            "meta-training diverges; give another algorithm.gradient"
        )
    if a.gradient is GradientName.implicit and a.optimizer is InnerName.sgd:
        rest = abs(1 - a.learning_rate * a.proximal) ** a.steps
        if rest > MOST_REST:
            raise ValueError(
                "algorithm.gradient=implicit needs an inner loop that ends near its minimum: of the distance, "
                f"|1 - learning_rate * proximal| ** steps = {rest:.2g} is left, and may be at most {MOST_REST}; give "
                "algorithm.proximal=10 algorithm.learning_rate=0.05, or algorithm=imaml"
            )


def _gradient(a: AlgorithmConfig) -> str | Gradient:
    if a.gradient is GradientName.mixed:
        return Mixed(a.segments)
    if a.gradient is GradientName.truncated:
        return Truncated(max(a.steps, 1) if a.last_steps is None else a.last_steps)
    if a.gradient is GradientName.implicit:
        return Implicit(a.proximal, a.damping, a.iterations, a.tolerance)
    return a.gradient.value


def network(model: metaattn.Transformer, precision: Precision) -> Network:
    """Return the model as a function of its parameters and inputs.

    Args:
        model: The model.
        precision: The precision in which it computes; its output has the dtype of the parameters.
    """

    def call(params: dict[str, Tensor], inputs: Tensor) -> Tensor:
        return functional_call(model, params, (inputs,))

    def narrow(params: dict[str, Tensor], inputs: Tensor) -> Tensor:
        low = {k: p.to(precision.network) for k, p in params.items()}
        return call(low, inputs.to(precision.network)).to(precision.parameters)

    def autocast(params: dict[str, Tensor], inputs: Tensor) -> Tensor:
        with torch.autocast(inputs.device.type, precision.network):
            return call(params, inputs).to(precision.parameters)

    return {Precision.bfloat16: narrow, Precision.autocast: autocast}.get(precision, call)


def _features(model: metaattn.Transformer, predict: Network) -> Network:
    """Return the features that enter the model's head: the model with the identity as its head."""

    def embed(params: dict[str, Tensor], inputs: Tensor) -> Tensor:
        some, dim = next(iter(params.values())), model.config.dim
        eye = torch.eye(dim, dtype=some.dtype, device=some.device)
        head = {"head.weight": eye, "head.bias": eye.new_zeros(dim)}
        return predict({**params, **head}, inputs)

    return embed
