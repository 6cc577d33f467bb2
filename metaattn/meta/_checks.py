"""Checks of the arguments of meta-learning, before any work: all of its ``TypeError`` and ``ValueError``."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from typing import Any

from torch import Tensor

from .optim import InnerOptimizer


def check_count(name: str, value: Any, least: int) -> None:
    """Check that a value is an integer of at least ``least``."""
    if not isinstance(value, Integral):
        raise TypeError(f"{name} must be an integer; got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}; got {value}")


def check_learning_rate(value: Any) -> None:
    """Check that a learning rate is a finite number of at least 0."""
    if not isinstance(value, Real):
        raise TypeError(f"learning_rate must be a number; got {value!r}")
    if not 0 <= float(value) < math.inf:
        raise ValueError(f"learning_rate must be at least 0 and finite; got {value}")


def check_scalar(loss: Any) -> None:
    """Check that a loss, which is to be differentiated, is a tensor with one number and no dimensions."""
    if not isinstance(loss, Tensor):
        raise TypeError(f"loss must return a tensor; got a {type(loss).__name__}")
    if loss.dim():
        raise ValueError(
            f"loss must return a scalar, such as a mean over the examples; got a tensor {list(loss.shape)}"
        )


def check_optimizer(optimizer: Any) -> None:
    """Check that an inner optimizer is an :class:`InnerOptimizer`, not a name or a function that makes one."""
    if not isinstance(optimizer, InnerOptimizer):
        raise TypeError(f"optimizer must be an InnerOptimizer, such as metaattn.meta.adam(); got {optimizer!r}")


def check_params(params: Any) -> None:
    """Check that parameters are a dict of tensors, with at least one."""
    if not isinstance(params, Mapping) or not all(isinstance(p, Tensor) for p in params.values()):
        raise TypeError(
            f"params must be a dict of tensors; got a {type(params).__name__}. Of a module, pass "
            "dict(module.named_parameters())"
        )
    if not params:
        raise ValueError("params must hold at least one tensor; got none")


def check_share(name: str, value: Any) -> None:
    """Check that a value is a number from 0 to 1."""
    if not isinstance(value, Real):
        raise TypeError(f"{name} must be a number; got {value!r}")
    if not 0 <= float(value) <= 1:
        raise ValueError(f"{name} must be from 0 to 1; got {value}")


def check_embed(embed: Any) -> None:
    """Check that the function that computes features is callable."""
    if not callable(embed):
        raise TypeError(f"embed must be a function of params and inputs to features [N, F]; got {embed!r}")


def check_meta(meta: Any, groups: Sequence[str]) -> None:
    """Check that meta-parameters have each of the groups that the learner learns, such as ``params`` and ``rates``."""
    expected = f"meta must be what this learner's init(params) returns, with {' and '.join(map(repr, groups))}"
    if not isinstance(meta, Mapping) or not all(isinstance(meta.get(g), Mapping) for g in groups):
        got = f"a dict of {list(meta)[:3]}" if isinstance(meta, Mapping) else f"a {type(meta).__name__}"
        raise TypeError(f"{expected}; got {got}")
    for g in groups:
        if not meta[g]:
            raise TypeError(f"{expected}; its {g!r} are empty: it is of a learner that learns no {g}")


def check_tasks(support: Any, query: Any, chunk_size: Any) -> int:
    """Check the support and query sets, and return how many tasks are stacked in the first dimension of their tensors.

    Args:
        support: Tensors ``[tasks, …]``.
        query: Tensors ``[tasks, …]``.
        chunk_size: How many tasks are computed at a time, at least 1; ``None`` for all.
    """
    for name, part in (("support", support), ("query", query)):
        if isinstance(part, Tensor) or not isinstance(part, Sequence) or not all(isinstance(t, Tensor) for t in part):
            raise TypeError(f"{name} must be a sequence of tensors, (inputs, targets); got a {type(part).__name__}")
    counts = {t.shape[0] if t.dim() else 0 for t in (*support, *query)}
    if len(counts) != 1 or 0 in counts:
        shapes = [[list(t.shape) for t in part] for part in (support, query)]
        raise ValueError(
            "support and query must have the same number of tasks in the first dimension of all their tensors, at "
            f"least 1; got the shapes {shapes[0]} and {shapes[1]}"
        )
    if chunk_size is not None and (not isinstance(chunk_size, Integral) or chunk_size < 1):
        raise ValueError(f"chunk_size must be an integer of at least 1, or None for all at once; got {chunk_size!r}")
    return counts.pop()
