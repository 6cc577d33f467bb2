"""Meta-learning algorithms: what is learned across tasks, and how a task adapts it."""

from ._learner import Batch, Learner, MetaParams
from .anil import anil, boil
from .cavia import Cavia, cavia
from .imaml import imaml
from .maml import GradientBased, first_order_maml, maml
from .maml_plus_plus import MAMLPlusPlus, maml_plus_plus
from .meta_sgd import meta_sgd
from .prototypes import Prototypical, proto_maml, prototypical
from .reptile import Reptile, reptile

__all__ = [
    "Batch",
    "Cavia",
    "GradientBased",
    "Learner",
    "MAMLPlusPlus",
    "MetaParams",
    "Prototypical",
    "Reptile",
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
