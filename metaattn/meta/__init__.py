"""Meta-learning by gradients: pure functions over dicts of parameters."""

from ..ops import checkpoint
from .algorithms import GradientBased, anil, first_order_maml, maml, meta_sgd
from .gradients import adapt, trajectory
from .optim import InnerOptimizer, adam, momentum, rate, sgd

__all__ = [
    "GradientBased",
    "InnerOptimizer",
    "adam",
    "adapt",
    "anil",
    "checkpoint",
    "first_order_maml",
    "maml",
    "meta_sgd",
    "momentum",
    "rate",
    "sgd",
    "trajectory",
]
