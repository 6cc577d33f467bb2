"""The state of meta-training: what a checkpoint saves and a resumed run restores."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor

from metaattn.meta.algorithms import MetaParams

from ..errors import CheckpointError
from . import _checks, checkpoint
from .config import Config
from .setup import Setup

# Names and types of a checkpoint's entries that a resumed run needs, besides its config.
ENTRIES: dict[str, type] = {"meta": dict, "optimizer": dict, "step": int, "best": float, "rng": dict}


def restore_meta(run: Setup, saved: MetaParams) -> MetaParams:
    """Return the meta-parameters of a checkpoint on the run's device, as leaves that require gradients.

    Raises:
        CheckpointError: Names, shapes or dtypes are not those of the run, or a value is not finite.
    """
    _checks.check_meta(saved, run.learner.init(dict(run.model.named_parameters())))
    return {g: {k: t.to(run.device).requires_grad_() for k, t in group.items()} for g, group in saved.items()}


@dataclass
class TrainState:
    """The mutable state of a run.

    Args:
        meta: The meta-parameters, by group and name.
        optimizer: The outer optimizer of ``meta``.
        step: How many steps have been taken.
        best: The best validation score so far; larger is better.
        rows: How many rows ``metrics.csv`` has.
        seconds_before: How long earlier sessions of the run trained, in seconds.
    """

    meta: MetaParams
    optimizer: torch.optim.Optimizer
    step: int = 0
    best: float = -math.inf
    rows: int = 0
    seconds_before: float = 0.0

    def __post_init__(self) -> None:
        self._started = time.perf_counter()

    @property
    def seconds(self) -> float:
        """The training time of all sessions of the run, in seconds."""
        return self.seconds_before + time.perf_counter() - self._started

    @property
    def tensors(self) -> list[Tensor]:
        """All meta-parameters."""
        return [t for group in self.meta.values() for t in group.values()]

    def content(self, config: Config) -> dict[str, Any]:
        """Return the content of a checkpoint of now, with the states of the random number generators."""
        return {
            "meta": {g: {k: t.detach() for k, t in group.items()} for g, group in self.meta.items()},
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "best": self.best,
            "rows": self.rows,
            "seconds": self.seconds,
            "rng": checkpoint.rng_state(),
            "config": OmegaConf.to_container(OmegaConf.structured(config), resolve=True, enum_to_str=True),
            "torch": str(torch.__version__),
        }


def start(run: Setup) -> TrainState:
    """Return the state before the first step."""
    return _state(run, run.learner.init(dict(run.model.named_parameters())))


def resume(run: Setup, saved: dict[str, Any], out: Path) -> TrainState:
    """Return the state of a checkpoint, and set the random number generators to theirs.

    Args:
        run: The run to resume.
        saved: The content of the checkpoint, with at least :data:`ENTRIES`.
        out: The directory in which the run continues. Without a ``best.pt`` there, the next validation counts as the
            best: the directory may be a partial copy.

    Raises:
        CheckpointError: The checkpoint has more steps than the run is to have, or another content than such a run.
    """
    steps = run.config.train.steps
    _checks.check_numbers(saved)
    if saved["step"] > steps:
        at = str(saved["step"])[:60]
        raise CheckpointError(f"the run is at step {at} already; train.steps={steps} would do nothing")
    state = _state(run, restore_meta(run, saved["meta"]))
    state.step = saved["step"]
    state.rows = saved.get("rows", 0)
    state.seconds_before = saved.get("seconds", 0.0)
    if (out / "best.pt").is_file():
        state.best = saved["best"]
    _checks.check_adam(saved["optimizer"], state.optimizer.state_dict(), state.tensors, state.step)
    state.optimizer.load_state_dict(saved["optimizer"])
    checkpoint.set_rng_state(saved["rng"])
    return state


def _state(run: Setup, meta: MetaParams) -> TrainState:
    tensors = [t for group in meta.values() for t in group.values()]
    return TrainState(meta, torch.optim.Adam(tensors, run.config.train.learning_rate))
