"""A rule's function under :mod:`torch.func`, level by level.

What :meth:`torch.autograd.Function.apply` does there, for functions of one constant and tensors that return a tuple.
It takes trees apart, makes a class and dispatches an operator at every level, which in a small problem takes longer
than all else: without, Hessian products take about half of the CPU's time (``scripts/bench_overhead.py``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import TransformType, _add_batch_dim, _unwrap_batched, _unwrap_for_grad, _wrap_for_grad
from torch._functorch.autograd_function import VmapInfo
from torch._functorch.pyfunctorch import FuncTorchInterpreter, retrieve_current_functorch_interpreter
from torch._functorch.utils import enable_single_level_autograd_function, unwrap_dead_wrappers
from torch.autograd.forward_ad import _set_fwd_grad_enabled
from torch.autograd.function import Function, _SingleLevelFunction


def apply(rule: Any, constant: Any, *tensors: Tensor) -> Any:
    """What a rule's function returns at the innermost level, and with it at those below."""
    tensors = unwrap_dead_wrappers(tensors)  # a backward pass may run after its level has ended
    top = torch._C._functorch.peek_interpreter_stack()
    if top is None:
        return super(Function, rule).apply(constant, *tensors)
    if (at_level := _AT_LEVEL.get(top.key())) is None:
        raise NotImplementedError(f"attention has no rule for torch.func's transform {top.key().name}")
    return at_level(retrieve_current_functorch_interpreter(), rule, constant, tensors)


def single_level(rule: Any) -> type[_SingleLevelFunction]:
    """A rule as a node of one level of reverse or forward mode. Its constant: the level, and that of the rule."""

    def forward(of: tuple[Any, Any], *tensors: Tensor) -> Any:
        level, constant = of
        number = level.level()
        # The node has turned both modes off, for the levels below as well.
        with torch.enable_grad(), _set_fwd_grad_enabled(True), level.lower():
            out = rule.apply(constant, *(_unwrap_for_grad(t, number) for t in tensors))
        return tuple(_wrap_for_grad(t, number) for t in out)

    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        (_, constant), *tensors = inputs
        rule.setup_context(ctx, (constant, *tensors), output)

    # Not the rule's functions themselves: tests, and whoever else, may put others in their place.
    methods: dict[str, Callable[..., Any]] = {
        "forward": forward,
        "setup_context": setup_context,
        "backward": lambda ctx, *w: rule.backward(ctx, *w),
        "jvp": lambda ctx, *t: rule.jvp(ctx, *t),
    }
    return type(rule.__name__, (_SingleLevelFunction,), {name: staticmethod(m) for name, m in methods.items()})


def _differentiated(level: FuncTorchInterpreter, rule: Any, constant: Any, tensors: tuple[Tensor, ...]) -> Any:
    lift = level._cptr.lift
    with enable_single_level_autograd_function():
        return rule.single_level.apply((level, constant), *map(lift, tensors))


def _mapped(level: FuncTorchInterpreter, rule: Any, constant: Any, tensors: tuple[Tensor, ...]) -> Any:
    number = level.level()
    parts = [_unwrap_batched(t, number) for t in tensors]
    if all(dim is None for _, dim in parts):
        with level.lower():
            return rule.apply(constant, *tensors)
    info = VmapInfo(level.batch_size(), level.randomness())  # type: ignore[attr-defined]
    with level.lower():
        out, dims = rule.vmap(info, (None, *(dim for _, dim in parts)), constant, *(t for t, _ in parts))
    return tuple(_add_batch_dim(t, dim, number) for t, dim in zip(out, dims, strict=True))


_AT_LEVEL = {
    TransformType.Grad: _differentiated,
    TransformType.Jvp: _differentiated,
    TransformType.Vmap: _mapped,
}
