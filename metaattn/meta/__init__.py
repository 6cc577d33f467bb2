"""Meta-learning by gradients: pure functions over dicts of parameters."""

from .algorithms import GradientBased, anil, first_order_maml, maml, meta_sgd
from .gradients import FirstOrder, Gradient, Implicit, Mixed, Reverse, Truncated, adapt, trajectory
from .optim import InnerOptimizer, adam, momentum, rate, sgd

__all__ = [
    "FirstOrder",
    "Gradient",
    "GradientBased",
    "Implicit",
    "InnerOptimizer",
    "Mixed",
    "Reverse",
    "Truncated",
    "adam",
    "adapt",
    "anil",
    "first_order_maml",
    "maml",
    "meta_sgd",
    "momentum",
    "rate",
    "sgd",
    "trajectory",
]
