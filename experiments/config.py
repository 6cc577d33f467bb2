"""What a run is: the schema behind ``conf/`` and the command line.

Every key and every value is checked against these classes, so that a misspelt one is an error.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from enum import Enum
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, OmegaConf


class Backend(Enum):
    """Who computes attention, see :func:`metaattn.sdpa`."""

    auto = "auto"
    reference = "reference"
    blockwise = "blockwise"
    triton = "triton"


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
    """The dtype of parameters and data."""

    float32 = "float32"
    float64 = "float64"
    bfloat16 = "bfloat16"


class Schedule(Enum):
    """The learning rate over training."""

    constant = "constant"
    cosine = "cosine"


class InnerName(Enum):
    """The inner optimizers of :mod:`metaattn.meta`."""

    sgd = "sgd"
    momentum = "momentum"
    adam = "adam"


class Learns(Enum):
    """Which inner learning rates are meta-parameters."""

    nothing = "nothing"
    scalar = "scalar"
    tensor = "tensor"
    element = "element"


class GradientName(Enum):
    """How the inner loop is differentiated."""

    reverse = "reverse"
    first_order = "first_order"


class Activation(Enum):
    """Of the Transformer's perceptrons."""

    gelu = "gelu"
    swiglu = "swiglu"


class Norm(Enum):
    """Before each part of a block."""

    layer = "layer"
    rms = "rms"


class Position(Enum):
    """How a token knows its place."""

    rope = "rope"
    learned = "learned"
    none = "none"


@dataclass
class TaskConfig:
    """Which tasks. ``root`` is Omniglot's folder; ``way`` is not for regression."""

    name: TaskName = MISSING
    way: int = 5
    shot: int = 1
    queries: int = 5
    augment: bool = True
    root: str | None = None


@dataclass
class ModelConfig:
    """A :class:`metaattn.Transformer`; what it takes and gives follows from the task."""

    dim: int = 64
    depth: int = 2
    heads: int = 4
    kv_heads: int | None = None
    mlp_ratio: float = 2.0
    activation: Activation = Activation.gelu
    norm: Norm = Norm.layer
    position: Position = Position.learned
    dropout: float = 0.0
    attention_dropout: float = 0.0
    patch_size: int = 7
    feature_tokens: int = 4


@dataclass
class AlgorithmConfig:
    """A :class:`metaattn.meta.GradientBased`."""

    name: str = MISSING
    steps: int = 3
    learning_rate: float = 0.2
    optimizer: InnerName = InnerName.sgd
    gradient: GradientName = GradientName.reverse
    adapts: list[str] = field(default_factory=lambda: ["*"])
    learns: Learns = Learns.nothing
    per_step: bool = False


@dataclass
class TrainConfig:
    """The outer loop. ``chunk_size`` is how many tasks are differentiated at once (memory)."""

    steps: int = 1000
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
    """The evaluation on held-out tasks; ``steps`` inner steps are plotted, at least as many as trained."""

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
    mode: Mode = Mode.train
    device: str = "auto"
    precision: Precision = Precision.float32
    seed: int = 0
    threads: int | None = None
    resume: str | None = None
    checkpoint: str | None = None


def run_dir(resume: str | None, task: TaskName) -> str:
    """Where a run writes: the directory of the run that it resumes, else a new one by date and time."""
    if resume:
        path = Path(resume)
        return str(path if path.is_dir() else path.parent)
    return f"outputs/{task.value}/{datetime.now():%Y-%m-%d_%H-%M-%S}"


def register() -> None:
    """Make the schema known to Hydra."""
    store: Any = ConfigStore.instance()
    store.store(name="schema", node=Config)
    store.store(group="task", name="schema", node=TaskConfig)
    store.store(group="model", name="schema", node=ModelConfig)
    store.store(group="algorithm", name="schema", node=AlgorithmConfig)
    OmegaConf.register_new_resolver("run_dir", run_dir, replace=True)
