"""Checkpointing (rematerialisation) of functions: less memory for more time, under every transform."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_leaves

from ._captured import CapturedTensorGuard, check_captured, draws_cannot_be_repeated
from ._context import CallContext
from ._derivatives import Pullback, TransformableFunction
from ._executor import FunctionKey, active_executor
from ._functorch import TransformType, active_transforms, in_dual_level
from ._pytree import Tensors, constants_of, split_tensors
from ._recompute import Recompute
from ._torch_internals import is_tracing

P = ParamSpec("P")
R = TypeVar("R")


def checkpoint(function: Callable[P, R], *, preserve_rng_state: bool = True) -> Callable[P, R]:
    """Return the same function, except that its derivatives store only its arguments and recompute the rest.

    :func:`torch.utils.checkpoint.checkpoint` does this for one backward pass; this does it for every order and mode,
    because the vjp and the jvp of the function are checkpointed functions themselves. It transforms a function, as
    :func:`torch.func.grad` does: its options cannot be confused with arguments, and it nests with other transforms.

    Args:
        function: A function or a module. It takes and returns pytrees of tensors, of any shape and dtype, and other
            objects. The tensors in its arguments are differentiated; for a module, its parameters and buffers as well.
            It must return the same for the same arguments, change none of them in place, and draw random numbers
            only from PyTorch's default generators.
        preserve_rng_state: Draw the same random numbers when recomputing. A function that draws any needs this for a
            correct derivative. It takes some microseconds per call, and cannot be done while a CUDA graph is captured.

    Returns:
        A function that is called as ``function`` is. It calls ``function`` itself where no derivative can be requested,
        and under :func:`torch.compile`, which decides itself what it recomputes.

    Raises:
        TypeError: ``function`` is not callable.
        ValueError: When called: the function uses a tensor that is not an argument and whose derivative would be
            lost, or it changes an argument in place.
        NotImplementedError: When called: it draws random numbers under ``make_fx``, which cannot draw them again, or
            under a :func:`torch.func.vmap` with ``randomness="different"`` that maps none of its arguments.

    Source:
        Griewank and Walther 2000 (Algorithm 799: revolve); Chen et al. 2016 (arXiv 1604.06174), section 3.

    Example:
        >>> import torch
        >>> from metaattn.meta import checkpoint
        >>> layer = checkpoint(lambda w, x: torch.tanh(x @ w).square())
        >>> w, x = torch.eye(2), torch.ones(3, 2)
        >>> torch.func.hessian(lambda w: layer(w, x).sum())(w).shape
        torch.Size([2, 2, 2, 2])
    """
    if not callable(function):
        raise TypeError(
            f"checkpoint takes a function or a module, and the function that it returns takes the arguments; "
            f"got {function!r}"
        )

    @functools.wraps(function, updated=())
    def checkpointed(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_compiling() or not _may_be_differentiated():
            return function(*args, **kwargs)
        return _call(function, args, kwargs, preserve_rng_state)

    return checkpointed


def _may_be_differentiated() -> bool:
    """Return whether a derivative of what runs now can be requested."""
    differentiating = any(kind in (TransformType.Grad, TransformType.Jvp) for kind in active_transforms())
    return differentiating or torch.is_grad_enabled() or in_dual_level()


def _call(function: Callable[..., Any], args: Any, kwargs: Any, preserve_rng_state: bool) -> Any:
    module = function if isinstance(function, nn.Module) else None
    state = {} if module is None else _state_of(module)
    leaves = tree_leaves((state, args, kwargs))
    if not any(isinstance(leaf, Tensor) for leaf in leaves):
        return function(*args, **kwargs)
    if active_transforms():
        check_captured(function if module is None else None, [leaf for leaf in leaves if not isinstance(leaf, Tensor)])

    def run(state: Any, args: Any, kwargs: Any) -> Any:
        if module is None:
            return function(*args, **kwargs)
        return functional_call(module, state, args, kwargs, tie_weights=False)

    return recompute(run, state, args, kwargs, preserve_rng_state=preserve_rng_state)


def _state_of(module: nn.Module) -> dict[str, Tensor]:
    """Return parameters and buffers under every name that they have, but those of a shared module under one name.

    ``functional_call`` does not restore what it replaces under two names of one module (PyTorch 2.13).
    """
    state: dict[str, Tensor] = {}
    for prefix, part in module.named_modules():
        options: dict[str, Any] = {"prefix": prefix, "recurse": False, "remove_duplicate": False}
        state |= {**dict(part.named_parameters(**options)), **dict(part.named_buffers(**options))}
    return state


def recompute(
    function: Callable[..., Any],
    *args: Any,
    pullback: Pullback | None = None,
    unsupported_message: str = "",
    preserve_rng_state: bool = True,
    key: FunctionKey | None = None,
) -> Any:
    """Call ``function(*args)``; its derivatives store only the tensors in the arguments and recompute the rest.

    Args:
        function: Takes trees of tensors and constants and returns such a tree, as for :func:`checkpoint`.
        *args: The trees.
        pullback: The rule for reverse mode, on the tensors in the order of the trees' leaves; by default one is derived
            from the function.
        unsupported_message: If the pullback is the only derivative: the message of the error that all others raise.
        preserve_rng_state: As for :func:`checkpoint`; it also holds for the pullback.
        key: Identity of the function and the pullback, if they may run compiled; see :mod:`._executor`.

    Returns:
        What ``function`` returns.

    Raises:
        ValueError: As :func:`checkpoint`, but what the function closes over is not searched for tensors.
        NotImplementedError: As :func:`checkpoint`.
    """
    tensors, restore = split_tensors(args)
    restore_outputs: list[Callable[[Tensors], Any]] = []
    executor = active_executor()
    if executor is not None and key is not None:
        key = key.then(*constants_of(args))
        restore_outputs = executor.structures.setdefault(key.key, restore_outputs)

    def flat(*tensors: Tensor) -> Tensors:
        outputs, restore_these = split_tensors(function(*restore(tensors)))
        restore_outputs[:] = [restore_these]
        return outputs

    def guarded(*tensors: Tensor) -> Tensors:
        with CapturedTensorGuard():
            return flat(*tensors)

    transforms, context = active_transforms(), CallContext(tensors, preserve_rng_state)
    first = guarded if transforms or in_dual_level() else flat
    rule = None if pullback is None else functools.partial(context, pullback)
    again = functools.partial(context, flat)
    recomputed = TransformableFunction(first, again, transforms, rule, unsupported_message, key, executor)
    outputs = Recompute.invoke(recomputed, *tensors)
    if context.settle():
        if is_tracing():
            raise NotImplementedError(
                "the function draws random numbers, which a graph of make_fx cannot draw again; draw them outside "
                "and pass them as arguments"
            )
        if draws_cannot_be_repeated(tensors):
            raise NotImplementedError(
                "the function draws random numbers under a vmap that maps none of its arguments; pass one that is "
                "mapped, or draw one number for all with vmap's randomness='same'"
            )
    return restore_outputs[0](outputs)
