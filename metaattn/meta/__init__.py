"""Meta-learning by gradients: pure functions over dicts of parameters."""

from .algorithms import GradientBased, anil, first_order_maml, maml, meta_sgd
from .capture import Captured, capture
from .gradients import adapt, trajectory
from .optim import InnerOptimizer, adam, momentum, rate, sgd

__all__ = [
    "Captured",
    "GradientBased",
    "InnerOptimizer",
    "adam",
    "adapt",
    "anil",
    "capture",
    "first_order_maml",
    "maml",
    "meta_sgd",
    "momentum",
    "rate",
    "sgd",
    "trajectory",
]
