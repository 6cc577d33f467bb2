"""Meta-learning algorithms: what is learned across tasks, and how it is adapted to one task.

Entry point: a function per algorithm (:func:`maml`, :func:`anil`, :func:`reptile`, …), which takes a loss and options
and returns a :class:`Learner`. A learner makes the meta-parameters (``init``), adapts them to a task (``adapt``), and
returns losses and meta-gradients of a batch of tasks (``value_and_grad``); an ordinary :mod:`torch.optim` optimizer
applies the meta-gradients. Learners build on :mod:`metaattn.meta.gradients`, which does not know them.
"""

from __future__ import annotations

import warnings
from typing import Any

from ._learner import Learner, MetaParams, Samples
from .anil import anil, boil
from .cavia import Cavia, cavia
from .imaml import imaml
from .maml import GradientBased, first_order_maml, maml
from .maml_plus_plus import MAMLPlusPlus, maml_plus_plus
from .meta_sgd import meta_sgd
from .prototypes import Prototypical, proto_maml, prototypical
from .reptile import Reptile, reptile

__all__ = [
    "Cavia",
    "GradientBased",
    "Learner",
    "MAMLPlusPlus",
    "MetaParams",
    "Prototypical",
    "Reptile",
    "Samples",
    "anil",
    "boil",
    "cavia",
    "first_order_maml",
    "imaml",
    "maml",
    "maml_plus_plus",
    "meta_sgd",
    "proto_maml",
    "prototypical",
    "reptile",
]


def __getattr__(name: str) -> Any:
    if name == "Batch":  # renamed, because metaattn.tasks.Batch is another thing; the old name works for one release
        warnings.warn("metaattn.meta.algorithms.Batch is now Samples", DeprecationWarning, stacklevel=2)
        return Samples
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
