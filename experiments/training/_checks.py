"""Checks that the content of a checkpoint fits the run that continues it: names, shapes, dtypes and values."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from metaattn.meta.algorithms import MetaParams

from ..errors import CheckpointError

ADAM = ("step", "exp_avg", "exp_avg_sq")  # Adam's state of a parameter
REQUIRED = ("params", "lr", "betas", "eps")  # its settings in every version of PyTorch


def check_meta(saved: Any, expected: MetaParams) -> None:
    """Compare meta-parameters of a checkpoint with those that a run starts from, which may be on the meta device.

    Raises:
        CheckpointError: Names, shapes or dtypes differ, or a value is not finite.
    """
    _check_names("its meta-parameters", saved, expected, ordered=True)  # the optimizer counts them
    for group, tensors in expected.items():
        _check_names(f"its meta-parameters {group!r}", saved[group], tensors, ordered=True)
        for name, t in tensors.items():
            _check_tensor(f"meta-parameter {name!r}", saved[group][name], t)


def _check_names(what: str, found: Any, expected: dict[Any, Any], *, ordered: bool = False) -> None:
    if type(found) is not dict or (list(found) if ordered else {*found}) != (
        list(expected) if ordered else {*expected}
    ):
        other = {*found} ^ {*expected} if type(found) is dict else {type(found).__name__}
        detail = ", ".join(sorted(str(name)[:60] for name in other)[:3]) or "the order"
        raise CheckpointError(f"{what} should be those of its config; these differ: {detail}")


def _check_tensor(what: str, found: Any, expected: Tensor) -> None:
    if not isinstance(found, Tensor) or found.shape != expected.shape or found.dtype != expected.dtype:
        got = f"{list(found.shape)} of {found.dtype}" if isinstance(found, Tensor) else type(found).__name__
        raise CheckpointError(f"{what} should be {list(expected.shape)} of {expected.dtype}; got {got}")
    if not found.isfinite().all():
        raise CheckpointError(f"{what} has values that are not finite")


def check_adam(saved: dict[str, Any], own: dict[str, Any], tensors: list[Tensor], step: int) -> None:
    """Check the state of Adam, because ``load_state_dict`` accepts any shape and any value.

    Args:
        saved: The state in the checkpoint.
        own: The state of a new optimizer of the same parameters.
        tensors: The parameters.
        step: The step of the checkpoint.

    Raises:
        CheckpointError: The state is not one of Adam for these parameters at this step.
    """
    _check_names("its optimizer's parts", saved, own)
    groups, (expected,) = saved["param_groups"], own["param_groups"]
    if type(groups) is not list or len(groups) != 1 or type(groups[0]) is not dict:
        raise CheckpointError("its optimizer should have one group of parameters")
    for key, value in expected.items():
        found = groups[0].get(key, None if key in REQUIRED else value)  # versions of PyTorch add settings
        if key != "lr" and (type(found) is not type(value) or found != value):
            raise CheckpointError(f"its optimizer's {key} should be {value}; got {str(found)[:60]}")
        if key == "lr" and (type(found) is not float or not 0 <= found < math.inf):
            raise CheckpointError(f"its optimizer's lr should be a finite number; got {str(found)[:60]}")
    if step > 0 or saved["state"] != {}:
        _check_names("its optimizer's tensors", saved["state"], dict(enumerate(tensors)))
        for index, t in enumerate(tensors):
            state = saved["state"][index]
            _check_names(f"its optimizer's tensors of parameter {index}", state, dict.fromkeys(ADAM))
            for name, like in zip(ADAM, (torch.zeros(()), t, t), strict=True):
                _check_tensor(f"its optimizer's {name} of parameter {index}", state[name], like)
            if state["step"] != step:
                raise CheckpointError(f"its optimizer is at step {state['step']:g}; its own step is {step}")
            if (state["exp_avg_sq"] < 0).any():
                raise CheckpointError(f"its optimizer's exp_avg_sq of parameter {index} has a negative value")


def check_numbers(saved: dict[str, Any]) -> None:
    """Check the step, the best score, the seconds and the number of rows of metrics.

    Raises:
        CheckpointError: One of them is impossible.
    """
    seconds, rows = saved.get("seconds", 0.0), saved.get("rows", 0)
    if saved["step"] < 0:
        raise CheckpointError(f"its step should be at least 0; got {str(saved['step'])[:60]}")
    if not saved["best"] < math.inf:
        raise CheckpointError(f"its best score should be a number; got {saved['best']}")
    if type(seconds) is not float or not 0 <= seconds < math.inf:
        raise CheckpointError(f"its seconds should be a finite number; got {str(seconds)[:60]}")
    if type(rows) is not int or rows < 0:
        raise CheckpointError(f"its rows should be an integer; got {str(rows)[:60]}")
