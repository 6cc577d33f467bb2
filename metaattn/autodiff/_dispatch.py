"""Apply a custom function under :mod:`torch.func`, level by level.

This does what :meth:`torch.autograd.Function.apply` does under transforms, for functions of one constant and some
tensors that return a tuple of tensors. PyTorch's version flattens pytrees, creates a class and dispatches an operator
at every level. In a small problem that takes longer than everything else: without it, Hessian-vector products take
about half of the CPU time (``scripts/bench_overhead.py``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import Function

from ._functorch import (
    Interpreter,
    SingleLevelFunction,
    TransformType,
    VmapInfo,
    apply_at_one_level,
    innermost_interpreter,
    innermost_transform,
    set_forward_mode_enabled,
    unwrap_batched,
    unwrap_dead_wrappers,
    unwrap_for_grad,
    wrap_batched,
    wrap_for_grad,
)


def apply(function: Any, constant: Any, *tensors: Tensor) -> Any:
    """Apply a :class:`CustomFunction` at the innermost level, which applies it at the levels below in the same way."""
    tensors = unwrap_dead_wrappers(tensors)  # a backward pass may run after its level has ended
    transform = innermost_transform()
    if transform is None:
        return super(Function, function).apply(constant, *tensors)
    if (apply_at := _APPLY_AT.get(transform.key())) is None:
        name = function.__name__.lstrip("_")
        raise NotImplementedError(
            f"the custom function {name} has no rule for the transform {transform.key().name} of torch.func; expected "
            "one made of grad, jvp and vmap"
        )
    return apply_at(innermost_interpreter(), function, constant, tensors)


def single_level(function: Any) -> type[SingleLevelFunction]:
    """Return a custom function as a node in the graph of one level of reverse or forward mode.

    The constant of the node is a pair: the interpreter of the level, and the constant of the function.
    """

    def forward(level_and_constant: tuple[Any, Any], *tensors: Tensor) -> Any:
        level, constant = level_and_constant
        number = level.level()
        # The node has turned both modes off, for the levels below as well.
        with torch.enable_grad(), set_forward_mode_enabled(True), level.lower():
            out = function.apply(constant, *(unwrap_for_grad(t, number) for t in tensors))
        return tuple(wrap_for_grad(t, number) for t in out)

    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        (_, constant), *tensors = inputs
        function.setup_context(ctx, (constant, *tensors), output)

    # The attributes are looked up at each call: tests, and others, may replace them.
    methods: dict[str, Callable[..., Any]] = {
        "forward": forward,
        "setup_context": setup_context,
        "backward": lambda ctx, *cotangents: function.backward(ctx, *cotangents),
        "jvp": lambda ctx, *tangents: function.jvp(ctx, *tangents),
    }
    return type(function.__name__, (SingleLevelFunction,), {name: staticmethod(m) for name, m in methods.items()})


def _apply_at_grad_or_jvp(level: Interpreter, function: Any, constant: Any, tensors: tuple[Tensor, ...]) -> Any:
    lift = level._cptr.lift
    return apply_at_one_level(function.single_level, (level, constant), *map(lift, tensors))


def _apply_at_vmap(level: Interpreter, function: Any, constant: Any, tensors: tuple[Tensor, ...]) -> Any:
    number = level.level()
    unwrapped = [unwrap_batched(t, number) for t in tensors]
    if all(dim is None for _, dim in unwrapped):
        with level.lower():
            return function.apply(constant, *tensors)
    info = VmapInfo(level.batch_size(), level.randomness())  # type: ignore[attr-defined]
    with level.lower():
        in_dims = (None, *(dim for _, dim in unwrapped))
        out, out_dims = function.vmap(info, in_dims, constant, *(t for t, _ in unwrapped))
    return tuple(wrap_batched(t, dim, number) for t, dim in zip(out, out_dims, strict=True))


_APPLY_AT = {
    TransformType.Grad: _apply_at_grad_or_jvp,
    TransformType.Jvp: _apply_at_grad_or_jvp,
    TransformType.Vmap: _apply_at_vmap,
}
