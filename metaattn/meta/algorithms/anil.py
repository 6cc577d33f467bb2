"""Adaptation of a part of the model: its head alone (ANIL), or all but its head (BOIL)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from .maml import GradientBased


def anil(loss: Callable[..., Any], *, adapts: Sequence[str] = ("head.*",), **settings: Any) -> GradientBased:
    """Almost no inner loop: a task adapts the head alone.

    Args:
        loss: As for :class:`GradientBased`.
        adapts: Patterns of the names of what a task adapts.
        **settings: Of :class:`GradientBased`.

    FunctionKey:
        Raghu et al. 2020 (arXiv 1909.09157), section 4.

    Example:
        >>> import torch
        >>> from metaattn.meta import anil
        >>> learner = anil(lambda params, x, y: (params["head.w"] * params["body.w"] * x - y).square().mean())
        >>> learner.adapted({"body.w": torch.ones(()), "head.w": torch.ones(())})
        ['head.w']
    """
    return GradientBased(loss, adapts=adapts, **settings)


def boil(loss: Callable[..., Any], *, adapts: Sequence[str] = ("*", "!head.*"), **settings: Any) -> GradientBased:
    """Body only inner loop: a task adapts all but the head.

    Args:
        loss: As for :class:`GradientBased`.
        adapts: Patterns of the names of what a task adapts.
        **settings: Of :class:`GradientBased`.

    FunctionKey:
        Oh et al. 2021 (arXiv 2008.08882), section 3: a learning rate of 0 for the head.

    Example:
        >>> import torch
        >>> from metaattn.meta import boil
        >>> learner = boil(lambda params, x, y: (params["head.w"] * params["body.w"] * x - y).square().mean())
        >>> learner.adapted({"body.w": torch.ones(()), "head.w": torch.ones(())})
        ['body.w']
    """
    return GradientBased(loss, adapts=adapts, **settings)
