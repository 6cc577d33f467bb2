"""Learned learning rates: Meta-SGD."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .maml import GradientBased


def meta_sgd(loss: Callable[..., Any], **settings: Any) -> GradientBased:
    """MAML that also learns a learning rate for each element of each parameter.

    Args:
        loss: As for :class:`GradientBased`.
        **settings: Of :class:`GradientBased`; ``learning_rate`` is where the learned ones start.

    FunctionKey:
        Li et al. 2017 (arXiv 1707.09835), algorithm 1.

    Example:
        >>> import torch
        >>> from metaattn.meta import meta_sgd
        >>> learner = meta_sgd(lambda params, x, y: (x @ params["w"] - y).square().mean(), learning_rate=0.5)
        >>> learner.init({"w": torch.zeros(2)})["rates"]["w"]
        tensor([[0.5000, 0.5000]], requires_grad=True)
    """
    return GradientBased(loss, **{"learns": "element", **settings})
