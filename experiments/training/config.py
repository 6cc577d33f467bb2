"""The schema of ``conf/`` and of the command line.

Every key and value is checked against these classes, and every number against ``LIMITS``, so that a misspelt key or an
impossible value is an error before any work.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from enum import Enum
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf

from ..errors import UserError
from . import directory


class Backend(Enum):
    """The backend that computes attention, see :func:`metaattn.sdpa`."""

    auto = "auto"
    reference = "reference"
    blockwise = "blockwise"
    triton = "triton"
    vendor = "vendor"


class Mode(Enum):
    """Meta-train (and evaluate at the end), or evaluate a checkpoint."""

    train = "train"
    evaluate = "evaluate"


class TaskName(Enum):
    """The families of tasks of :mod:`metaattn.tasks`."""

    glyphs = "glyphs"
    sinusoid = "sinusoid"
    omniglot = "omniglot"


class Precision(Enum):
    """The precision of the network; parameters and their updates, inner and outer, are in float32 or float64.

    ``tf32``: float32, with matrix products in TF32 on a GPU; ``bfloat16``: the whole network in bfloat16; ``autocast``:
    the network under ``torch.autocast`` to bfloat16, where norms and sums stay in float32.
    """

    float32 = "float32"
    tf32 = "tf32"
    float64 = "float64"
    bfloat16 = "bfloat16"
    autocast = "autocast"

    @property
    def parameters(self) -> torch.dtype:
        """The dtype of the parameters."""
        return torch.float64 if self is Precision.float64 else torch.float32

    @property
    def network(self) -> torch.dtype:
        """The dtype in which the attention runs."""
        return torch.bfloat16 if self in (Precision.bfloat16, Precision.autocast) else self.parameters

    @property
    def products(self) -> str:
        """The argument of :func:`torch.set_float32_matmul_precision`."""
        return "high" if self is Precision.tf32 else "highest"


class Schedule(Enum):
    """The schedule of the outer learning rate."""

    constant = "constant"
    cosine = "cosine"


class InnerName(Enum):
    """The inner optimizers of :mod:`metaattn.meta`."""

    sgd = "sgd"
    momentum = "momentum"
    adam = "adam"


class Learns(Enum):
    """The granularity at which inner learning rates are meta-parameters."""

    nothing = "nothing"
    scalar = "scalar"
    tensor = "tensor"
    element = "element"


class Kind(Enum):
    """The class of :mod:`metaattn.meta` behind an algorithm."""

    gradient_based = "gradient_based"
    maml_plus_plus = "maml_plus_plus"
    reptile = "reptile"
    prototypical = "prototypical"
    cavia = "cavia"


class GradientName(Enum):
    """The method that differentiates the inner loop."""

    reverse = "reverse"
    mixed = "mixed"
    first_order = "first_order"
    truncated = "truncated"
    implicit = "implicit"


class Compile(Enum):
    """The execution of the meta-gradient: eager, as a replayed CUDA graph, or compiled by Inductor."""

    none = "none"
    graph = "graph"
    inductor = "inductor"


class Activation(Enum):
    """The activation of the Transformer's MLPs."""

    gelu = "gelu"
    swiglu = "swiglu"


class Norm(Enum):
    """The normalization before the attention and the MLP of a block."""

    layer = "layer"
    rms = "rms"


class Position(Enum):
    """The encoding of token positions."""

    rope = "rope"
    learned = "learned"
    none = "none"


@dataclass
class TaskConfig:
    """The family of tasks and their sizes. ``root`` is Omniglot's folder; regression ignores ``way``."""

    name: TaskName = MISSING
    way: int = 5
    shot: int = 1
    queries: int = 5
    augment: bool = True
    root: str | None = None


@dataclass
class ModelConfig:
    """A :class:`metaattn.Transformer`; its input and output follow from the task."""

    dim: int = 64
    depth: int = 2
    heads: int = 4
    kv_heads: int | None = None
    mlp_ratio: float = 2.0
    activation: Activation = Activation.gelu
    norm: Norm = Norm.layer
    norm_affine: bool = True
    bias: bool = True
    position: Position = Position.learned
    dropout: float = 0.0
    attention_dropout: float = 0.0
    patch_size: int = 7
    feature_tokens: int = 4
    remat: bool = False


@dataclass
class AlgorithmConfig:
    """A :class:`metaattn.meta.GradientBased` learner, or a subclass of it by ``kind``.

    ``segments`` belongs to the mixed gradient, ``last_steps`` (``null``: all steps) to the truncated one,
    ``proximal``, ``damping``, ``iterations`` and ``tolerance`` to the implicit one; ``multi_step_until`` and
    ``first_order_until`` belong to MAML++, ``context`` and ``context_into`` to CAVIA.
    """

    name: str = MISSING
    kind: Kind = Kind.gradient_based
    steps: int = 3
    learning_rate: float = 0.2
    optimizer: InnerName = InnerName.sgd
    gradient: GradientName = GradientName.reverse
    segments: int | None = None
    last_steps: int | None = None
    proximal: float = 1.0
    damping: float = 0.0
    iterations: int = 10
    tolerance: float = 1e-6
    adapts: list[str] = field(default_factory=lambda: ["*"])
    learns: Learns = Learns.nothing
    per_step: bool = False
    multi_step_until: float = 0.1
    first_order_until: float = 0.3
    context: int = 4
    context_into: str = "embed.bias"


@dataclass
class TrainConfig:
    """The outer loop. ``chunk_size``: how many tasks are differentiated at once, which bounds the memory."""

    steps: int = 500
    tasks: int = 16
    chunk_size: int | None = None
    learning_rate: float = 3e-3
    schedule: Schedule = Schedule.cosine
    warmup: int = 0
    clip: float | None = 10.0
    log_every: int = 10
    validate_every: int = 100
    validation_tasks: int = 100
    checkpoint_every: int = 50


@dataclass
class TestConfig:
    """The evaluation on held-out tasks; ``steps`` inner steps are plotted, by default ten or all that are trained."""

    tasks: int = 600
    chunk_size: int = 25
    steps: int | None = None


@dataclass
class Config:
    """A run of ``train_maml.py``."""

    task: TaskConfig = field(default_factory=TaskConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    test: TestConfig = field(default_factory=TestConfig)
    backend: Backend = Backend.auto
    compile: Compile = Compile.none
    mode: Mode = Mode.train
    device: str = "auto"
    precision: Precision = Precision.float32
    seed: int = 0
    threads: int | None = None
    resume: str | None = None
    checkpoint: str | None = None


Limit = tuple[Callable[[Any], bool], str]  # a predicate of allowed values, and its description
ONE: Limit = (lambda x: x >= 1, "at least 1")
TWO: Limit = (lambda x: x >= 2, "at least 2")
ZERO: Limit = (lambda x: x >= 0, "at least 0")
SEED: Limit = (lambda x: 0 <= x < 2**63, "at least 0 and below 2**63")
POSITIVE: Limit = (lambda x: 0 < x < math.inf, "positive and finite")
FINITE: Limit = (lambda x: 0 <= x < math.inf, "at least 0 and finite")
FRACTION: Limit = (lambda x: 0 <= x <= 1, "from 0 to 1")
PROBABILITY: Limit = (lambda x: 0 <= x < 1, "at least 0 and below 1")


def _or_null(limit: Limit) -> Limit:
    allowed, text = limit
    return lambda x: x is None or allowed(x), f"{text}, or null"


def _at_most(most: int) -> Limit:
    return lambda x: x is None or x <= most, f"at most {most}"


# One for each number of the schema. Relations between values (heads divide dim) are checked where they are used.
LIMITS: dict[str, Limit] = {
    "task.way": TWO,
    "task.shot": ONE,
    "task.queries": ONE,
    "model.dim": ONE,
    "model.depth": ONE,
    "model.heads": ONE,
    "model.kv_heads": _or_null(ONE),
    "model.mlp_ratio": POSITIVE,
    "model.dropout": PROBABILITY,
    "model.attention_dropout": PROBABILITY,
    "model.patch_size": ONE,
    "model.feature_tokens": ONE,
    "algorithm.steps": ZERO,  # 0 for prototypical networks; other algorithms reject it
    "algorithm.learning_rate": POSITIVE,
    "algorithm.segments": _or_null(ONE),
    "algorithm.last_steps": _or_null(ONE),
    "algorithm.proximal": POSITIVE,
    "algorithm.damping": FINITE,
    "algorithm.iterations": ONE,
    "algorithm.tolerance": FINITE,
    "algorithm.multi_step_until": FRACTION,
    "algorithm.first_order_until": FRACTION,
    "algorithm.context": ONE,
    "train.steps": ONE,
    "train.tasks": ONE,
    "train.chunk_size": _or_null(ONE),
    "train.learning_rate": POSITIVE,
    "train.warmup": ZERO,
    "train.clip": _or_null(POSITIVE),
    "train.log_every": ONE,
    "train.validate_every": ONE,
    "train.validation_tasks": ONE,
    "train.checkpoint_every": ONE,
    "test.tasks": TWO,  # one task has no confidence interval
    "test.chunk_size": ONE,
    "test.steps": _or_null(ONE),
    "seed": SEED,
    "threads": _or_null(ONE),
}


# The largest value of each number by which memory and time grow before the first step, so that an absurd one is an
# error, and not a machine that hangs.
MOST: dict[str, int] = {
    "task.way": 2**16,
    "task.shot": 2**16,
    "task.queries": 2**16,
    "model.dim": 2**16,
    "model.depth": 2**10,
    "model.mlp_ratio": 2**10,
    "model.feature_tokens": 2**16,
    "algorithm.context": 2**20,
    "train.tasks": 2**20,
    "threads": 2**10,
}


def checked(raw: DictConfig) -> Config:
    """Return the config of a run as an object, after a check of every key and every number.

    Raises:
        OmegaConfBaseException: The schema lacks a key (``+key=value`` can add any), or a value has the wrong type.
        UserError: A number is out of range; the message names its key.
    """
    # As a plain dict: a merge with a DictConfig to which keys were added would accept them.
    config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), OmegaConf.to_container(raw)))
    assert isinstance(config, Config)
    check_limits(config, LIMITS)
    check_limits(config, {key: _at_most(most) for key, most in MOST.items()})
    return config


def check_limits(settings: Any, limits: dict[str, Limit]) -> None:
    """Check that every number is in range.

    Args:
        settings: An object with the numbers as attributes; a key ``a.b`` is the attribute ``b`` of ``a``.
        limits: The range of each key.

    Raises:
        UserError: A number is out of range; the message names its key.
    """
    for key, (allowed, text) in limits.items():
        if not allowed(value := attrgetter(key)(settings)):
            raise UserError(f"{key} must be {text}; got {'null' if value is None else value}")


def run_dir(resume: str | None, checkpoint: str | None, task: TaskName, started: str) -> str:
    """Return the directory that a run writes to: that of the run that it resumes, or a new one named by its start."""
    if resume and (path := Path(resume)).exists():
        return str(path if path.is_dir() else path.parent)
    # The task of a checkpoint is unknown until the checkpoint is read.
    return directory.new(f"outputs/{'evaluate' if checkpoint else task.value}/{started}")


def register(started: datetime) -> None:
    """Register the schema with Hydra, and resolvers for the output directory.

    Args:
        started: When the command started; new directories are named by it.
    """
    store: Any = ConfigStore.instance()
    store.store(name="schema", node=Config)
    store.store(group="task", name="schema", node=TaskConfig)
    store.store(group="model", name="schema", node=ModelConfig)
    store.store(group="algorithm", name="schema", node=AlgorithmConfig)
    directory.forget()
    OmegaConf.register_new_resolver("run_dir", run_dir, replace=True)
    OmegaConf.register_new_resolver(
        "sweep_dir", lambda started: directory.new(f"outputs/sweep/{started}"), replace=True
    )
    OmegaConf.register_new_resolver("started", lambda: f"{started:%Y-%m-%d_%H-%M-%S}", replace=True)
