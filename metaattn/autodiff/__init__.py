"""Function transforms that torch.func lacks, for any function of tensors; nothing here knows attention.

``checkpoint`` and ``recompute`` save arguments alone and differentiate by running the function again, to any order;
``CustomFunction`` is an ``autograd.Function`` with rules for both modes, applied level by level. May import
:mod:`metaattn.backends` only (for the backend that a call ran with).
"""

from ._captured import check_outputs, closure, followed, levels, transformed
from ._context import CallContext, ambient_settings, without_draws
from ._custom_function import (
    CustomFunction,
    PrecomputedResult,
    PresenceMask,
    current_tangents,
    reverse_over_forward,
    total,
)
from ._derivatives import Pullback, differentiable, pushforward
from ._executor import Executor, FunctionKey, active_executor, use_executor
from ._function_mode import BACKWARD, Replacement, called_as, unshown
from ._pytree import Tensors, TensorSpec, put, split_tensors, tensor_spec
from .checkpoint import checkpoint, recompute, transforms

__all__ = [
    "BACKWARD",
    "CallContext",
    "CustomFunction",
    "Executor",
    "FunctionKey",
    "PrecomputedResult",
    "PresenceMask",
    "Pullback",
    "Replacement",
    "TensorSpec",
    "Tensors",
    "active_executor",
    "ambient_settings",
    "called_as",
    "check_outputs",
    "checkpoint",
    "closure",
    "current_tangents",
    "differentiable",
    "followed",
    "levels",
    "pushforward",
    "put",
    "recompute",
    "reverse_over_forward",
    "split_tensors",
    "tensor_spec",
    "total",
    "transformed",
    "transforms",
    "unshown",
    "use_executor",
    "without_draws",
]
