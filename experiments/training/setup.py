"""Build the device, the tasks, the model and the learner of a run from its config."""

from __future__ import annotations

import math
import os
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import metaattn
from metaattn.meta import GradientBased
from metaattn.meta.algorithms import MetaParams
from metaattn.tasks import Batch, Episode, Sinusoids, glyphs, omniglot, stack

from ..errors import UserError
from . import distributed
from ._checks import check_meta
from .checkpoint import seed_everything
from .config import Config, TaskConfig, TaskName
from .learner import build_learner

# Multiplications of a product of matrices for each thread. With 2.6e9 of them (model.dim=512) two threads took as long
# as one on two cores; with 5e7 (the default) they took half as long again.
WORK_OF_A_THREAD = 2**31
OWN_THREADS = torch.get_num_threads()  # PyTorch's choice
SPLITS = ("train", "validation", "test")


@dataclass
class Setup:
    """The objects of a run; ``chance`` is the accuracy of guessing, ``None`` for regression."""

    config: Config
    device: torch.device
    dtype: torch.dtype
    model: metaattn.Transformer
    learner: GradientBased
    chance: float | None
    _episodes: dict[str, Any] = field(default_factory=dict)

    @property
    def metric(self) -> str:
        """The metric that is reported and by which checkpoints are compared: accuracy, or the loss for regression."""
        return "loss" if self.chance is None else "accuracy"

    def tasks(self, split: str, start: int, count: int) -> Episode:
        """Return a batch of tasks on the device. It depends only on the seed, the split and the indices."""
        return self.move(self.draw(split, start, count))

    def draw(self, split: str, start: int, count: int) -> Episode:
        """Return a batch of tasks on the CPU, see :meth:`tasks`."""
        if split not in self._episodes:
            self._episodes[split] = _episodes(self.config.task, split, self.config.seed)
        return stack(self._episodes[split], start, count)

    def move(self, tasks: Episode) -> Episode:
        """Return tasks on the run's device and in its dtype."""
        return Episode(*(Batch(*(self._moved(t) for t in part)) for part in tasks))

    def _moved(self, t: Tensor) -> Tensor:
        return t.to(self.device, self.dtype if t.is_floating_point() else None)


def setup(config: Config, saved: MetaParams | None = None) -> Setup:
    """Build the objects of a run.

    Args:
        config: The config of the run.
        saved: The meta-parameters of its checkpoint. They are compared with the config before memory is allocated.

    Raises:
        UserError: The config contradicts itself, the backend does not support it, or the device does not exist.
        CheckpointError: ``saved`` does not fit the config.
    """
    device = find_device(distributed.device(config.device))
    if threads := config.threads or (device.type == "cpu" and _useful_threads(config)):
        torch.set_num_threads(threads)
    dtype = config.precision.parameters
    torch.set_float32_matmul_precision(config.precision.products)
    try:
        with torch.device("meta"):  # allocates nothing
            described = _model(config).to(dtype)
        _check_memory(described)
        if saved is not None:
            check_meta(saved, build_learner(config, described).init(dict(described.named_parameters())))
        seed_everything(config.seed)
        model = _model(config).to(device, dtype)
        learner = build_learner(config, model)
        learner.init(dict(model.named_parameters()))
        _probe(model, config.precision.network)
    except (ValueError, TypeError, NotImplementedError) as error:
        raise UserError(str(error)) from error
    chance = None if config.task.name is TaskName.sinusoid else 1 / config.task.way
    run = Setup(config, device, dtype, model, learner, chance)
    try:
        with distributed.first_then_rest():
            for split in SPLITS:
                run.tasks(split, 0, 1)
    except (ValueError, OSError) as error:
        raise UserError(str(error)) from error
    return run


def _useful_threads(config: Config) -> int:
    """Return how many threads the largest product of matrices keeps busy on a CPU, at most PyTorch's own number.

    With less work, threads wait for each other: on small models they are never faster than one.
    """
    m, task = config.model, config.task
    images = task.name is not TaskName.sinusoid
    tokens = (28 // m.patch_size) ** 2 if images else m.feature_tokens
    samples = max(task.shot, task.queries) * (task.way if images else 1)
    tasks = min(config.train.tasks, config.train.chunk_size or config.train.tasks)
    work = tasks * samples * tokens * m.dim * m.dim * m.mlp_ratio
    return max(1, min(OWN_THREADS, int(work / WORK_OF_A_THREAD)))


def find_device(name: str) -> torch.device:
    """Return the device of a name; ``auto`` is a GPU if there is one.

    Raises:
        UserError: The device cannot be used.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"device={name} cannot be used here ({reason}); try device=auto") from error
    return device


def _episodes(task: TaskConfig, split: str, seed: int) -> Any:
    # Each split has a separate seed, so that no sequence of episodes repeats in another split.
    seed = 3 * seed + SPLITS.index(split)
    if task.name is TaskName.sinusoid:
        return Sinusoids(shot=task.shot, queries=task.queries, seed=seed)
    shape = {"way": task.way, "shot": task.shot, "queries": task.queries, "seed": seed}
    if task.name is TaskName.omniglot:
        if task.root is None:
            raise ValueError("task=omniglot needs task.root=PATH, the folder that contains omniglot-py")
        return omniglot(split, task.root, **shape)  # type: ignore[arg-type]
    return glyphs(split, augment=task.augment, **shape)  # type: ignore[arg-type]


def _model(config: Config) -> metaattn.Transformer:
    m, task = config.model, config.task
    shapes: dict[str, Any] = {"input": "patch", "image_size": 28, "patch_size": m.patch_size, "out_features": task.way}
    if task.name is TaskName.sinusoid:
        shapes = {"input": "features", "in_features": 1, "feature_tokens": m.feature_tokens, "out_features": 1}
    return metaattn.Transformer(
        **shapes,
        output="pooled",
        dim=m.dim,
        depth=m.depth,
        heads=m.heads,
        kv_heads=m.kv_heads,
        mlp_ratio=m.mlp_ratio,
        activation=m.activation.value,
        norm=m.norm.value,
        norm_affine=m.norm_affine,
        bias=m.bias,
        position=m.position.value,
        dropout=m.dropout,
        attention_dropout=m.attention_dropout,
        backend=config.backend.value,
        remat=m.remat,
    )


def _check_memory(model: metaattn.Transformer) -> None:
    """Raise a ``ValueError`` if the parameters alone are larger than the machine's memory."""
    size, memory = sum(p.nbytes for p in model.parameters()), math.inf
    with suppress(ValueError, OSError, AttributeError):  # Windows
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if size > memory:
        raise ValueError(
            f"the model's parameters need {size / 2**30:.0f} GiB, and this machine has {memory / 2**30:.0f} GiB; "
            "reduce model.dim or model.depth"
        )


def _probe(model: metaattn.Transformer, dtype: torch.dtype) -> None:
    """Call the operator on an empty batch: an unsupported backend raises here, before any work."""
    p = next(model.parameters())
    c = model.config
    x = torch.empty(0, c.heads, 1, c.dim // c.heads, device=p.device, dtype=dtype)
    metaattn.sdpa(x, x, x, backend=c.backend)
