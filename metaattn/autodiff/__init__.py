"""Function transforms that :mod:`torch.func` lacks, for any function of tensors; nothing here knows attention.

Entry points:

* :func:`checkpoint`, and :func:`recompute` below it, store only the arguments of a function and differentiate it by
  running it again, to any order and in any mode.
* :class:`CustomFunction` is an ``autograd.Function`` with rules for reverse and forward mode, for functions with
  optional tensors. The attention rules of :mod:`metaattn.ops` are of this class.
* :class:`Replacement` replaces functions of PyTorch inside a block, as the integrations do.
* :func:`use_executor` is the hook by which :mod:`metaattn.compile` runs recomputed functions compiled.

Mechanism: a custom function is applied level by level of the active transforms (``_dispatch``). What is recomputed is
itself a custom function whose vjp and jvp are recomputed functions (``_recompute``), run in the context of its first
call (``_context``), after a check for captured tensors whose derivative would be lost (``_captured``). Every private
name of PyTorch is in ``_functorch`` and ``_torch_internals``; the other packages take what they need from here.

Every package above may import this one; it imports :mod:`metaattn.backends` only, to run a function again with the
backend of its first run.
"""

from ._captured import (
    Visited,
    check_outputs,
    is_differentiated,
    is_plain,
    transformed_tensors,
    visit,
)
from ._context import CallContext, ambient_settings, without_draws
from ._custom_function import (
    CustomFunction,
    PrecomputedResult,
    PresenceMask,
    add_terms,
    current_tangents,
    reverse_over_forward,
)
from ._derivatives import Pullback, differentiable, pushforward
from ._executor import Executor, FunctionKey, active_executor, use_executor
from ._function_mode import BACKWARD_FUNCTIONS, Replacement, callables_of
from ._functorch import (
    SingleLevelFunction,
    TransformType,
    active_transforms,
    apply_at_one_level,
    in_dual_level,
    in_transform,
    is_legacy_batched,
    is_wrapped,
    unwrap_dead_wrappers,
    wrapper_levels,
)
from ._pytree import Tensors, TensorSpec, replace_at, split_tensors, tensor_spec
from ._torch_internals import (
    after_import,
    allow_in_graph,
    innermost_dispatch_mode,
    redispatch_below_autograd,
    skip_torch_function,
    without_autocast,
)
from .checkpoint import checkpoint, recompute

__all__ = [
    "BACKWARD_FUNCTIONS",
    "CallContext",
    "CustomFunction",
    "Executor",
    "FunctionKey",
    "PrecomputedResult",
    "PresenceMask",
    "Pullback",
    "Replacement",
    "SingleLevelFunction",
    "TensorSpec",
    "Tensors",
    "TransformType",
    "Visited",
    "active_executor",
    "active_transforms",
    "add_terms",
    "after_import",
    "allow_in_graph",
    "ambient_settings",
    "apply_at_one_level",
    "callables_of",
    "check_outputs",
    "checkpoint",
    "current_tangents",
    "differentiable",
    "in_dual_level",
    "in_transform",
    "innermost_dispatch_mode",
    "is_differentiated",
    "is_legacy_batched",
    "is_plain",
    "is_wrapped",
    "pushforward",
    "recompute",
    "redispatch_below_autograd",
    "replace_at",
    "reverse_over_forward",
    "skip_torch_function",
    "split_tensors",
    "tensor_spec",
    "transformed_tensors",
    "unwrap_dead_wrappers",
    "use_executor",
    "visit",
    "without_autocast",
    "without_draws",
    "wrapper_levels",
]
