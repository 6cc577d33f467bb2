"""Meta-learning by gradients: pure functions of dicts of parameters ``{name: tensor}``.

Entry points: the algorithms (:func:`maml`, :func:`anil`, …), which return a :class:`Learner`; :func:`adapt` and
:func:`trajectory`, the inner loop by itself; :func:`capture`, which compiles a meta-step. The inner loop takes steps of
an :class:`InnerOptimizer`, and a :class:`Gradient` mode determines how an outer derivative passes through them. Any
model works that runs by :func:`torch.func.functional_call`; tasks are vectorised by :func:`torch.func.vmap`.

May import :mod:`metaattn.ops`, :mod:`metaattn.autodiff` and :mod:`metaattn.compile`, and is imported by
:mod:`metaattn.integrations` and the experiments.
"""

from ..compile.capture import Captured, capture
from ..ops import checkpoint
from .algorithms import (
    Cavia,
    GradientBased,
    Learner,
    MAMLPlusPlus,
    Prototypical,
    Reptile,
    anil,
    boil,
    cavia,
    first_order_maml,
    imaml,
    maml,
    maml_plus_plus,
    meta_sgd,
    proto_maml,
    prototypical,
    reptile,
)
from .gradients import FirstOrder, Gradient, Implicit, Mixed, Reverse, Truncated, adapt, trajectory
from .optim import InnerOptimizer, adam, momentum, rate, sgd

__all__ = [
    "Captured",
    "Cavia",
    "FirstOrder",
    "Gradient",
    "GradientBased",
    "Implicit",
    "InnerOptimizer",
    "Learner",
    "MAMLPlusPlus",
    "Mixed",
    "Prototypical",
    "Reptile",
    "Reverse",
    "Truncated",
    "adam",
    "adapt",
    "anil",
    "boil",
    "capture",
    "cavia",
    "checkpoint",
    "first_order_maml",
    "imaml",
    "maml",
    "maml_plus_plus",
    "meta_sgd",
    "momentum",
    "proto_maml",
    "prototypical",
    "rate",
    "reptile",
    "sgd",
    "trajectory",
]
