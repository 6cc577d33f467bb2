"""Rematerialisation: memory for time, under every transform."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.utils._pytree import tree_leaves

from ._captured import Watch, check_captured, unmapped
from ._context import CallContext, tracing
from ._derivatives import Derivable, Pullback
from ._executor import FunctionKey, active_executor
from ._pytree import Tensors, constants_of, split_tensors
from ._recompute import Recompute

P = ParamSpec("P")
R = TypeVar("R")


def checkpoint(function: Callable[P, R], *, preserve_rng_state: bool = True) -> Callable[P, R]:
    """The same function, whose derivatives keep its arguments alone and compute all between anew.

    What :func:`torch.utils.checkpoint.checkpoint` is to one backward pass, for every order and mode: the vjp and
    the jvp of the function are checkpointed functions themselves. As a transform of a function, like
    :func:`torch.func.grad`: its options cannot be taken for arguments, and it nests with the others.

    Args:
        function: Takes and returns containers of tensors and anything else; of its tensors, those in pytrees of
            its arguments are differentiated. Of a module, so are its parameters and buffers. It gives the same
            again for the same arguments, changes none of them, and draws random numbers from PyTorch's default
            generators alone.
        preserve_rng_state: Whether it draws the same random numbers again, as it must for a correct derivative if
            it draws any. Takes some microseconds a call, and cannot be while a CUDA graph is captured.

    Returns:
        A function called as ``function`` is. Where no derivative can be asked for, and under
        :func:`torch.compile`, which rematerialises by a plan of its own, it is ``function`` itself that runs.

    Raises:
        TypeError: ``function`` cannot be called.
        ValueError: When called: the function uses a tensor that it is not given and whose derivative would be
            lost, or changes an argument in place.
        NotImplementedError: When called: it draws random numbers under ``make_fx``, which cannot draw them again;
            or under a :func:`torch.func.vmap` with other numbers for each entry that maps none of its arguments.

    FunctionKey:
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
        raise TypeError(f"checkpoint takes a function or a module, and its result the arguments; got {function!r}")

    @functools.wraps(function, updated=())
    def checkpointed(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_compiling() or not _differentiating():
            return function(*args, **kwargs)
        return _call(function, args, kwargs, preserve_rng_state)

    return checkpointed


def _differentiating() -> bool:
    """Whether a derivative of what runs now can be asked for."""
    kinds = torch._C._functorch.TransformType
    modes = any(kind in (kinds.Grad, kinds.Jvp) for kind in transforms())
    return modes or torch.is_grad_enabled() or forward_ad._current_level >= 0


def _call(function: Callable[..., Any], args: Any, kwargs: Any, preserve_rng_state: bool) -> Any:
    module = function if isinstance(function, nn.Module) else None
    state = {} if module is None else _state(module)
    leaves = tree_leaves((state, args, kwargs))
    if not any(isinstance(leaf, Tensor) for leaf in leaves):
        return function(*args, **kwargs)
    if transforms():
        check_captured(function if module is None else None, [leaf for leaf in leaves if not isinstance(leaf, Tensor)])

    def run(state: Any, args: Any, kwargs: Any) -> Any:
        if module is None:
            return function(*args, **kwargs)
        return functional_call(module, state, args, kwargs, tie_weights=False)

    return recompute(run, state, args, kwargs, preserve_rng_state=preserve_rng_state)


def _state(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by every place that holds them, but of a module in two places once.

    What ``functional_call`` finds at two names of one module it does not put back (PyTorch 2.13).
    """
    state: dict[str, Tensor] = {}
    for prefix, part in module.named_modules():
        options: dict[str, Any] = {"prefix": prefix, "recurse": False, "remove_duplicate": False}
        state |= {**dict(part.named_parameters(**options)), **dict(part.named_buffers(**options))}
    return state


def transforms() -> tuple[Any, ...]:
    """The transforms at work, outermost first."""
    return tuple(level.key() for level in torch._C._functorch.get_interpreter_stack() or ())


def recompute(
    function: Callable[..., Any],
    *args: Any,
    pullback: Pullback | None = None,
    refusal: str = "",
    preserve_rng_state: bool = True,
    key: FunctionKey | None = None,
) -> Any:
    """``function(*args)``, of which derivatives keep the arguments' tensors alone.

    Args:
        function: Of trees of tensors and constants, to such a tree, as in :func:`checkpoint`.
        *args: The trees.
        pullback: Its rule in reverse mode, on the tensors in the order of the trees' leaves; else of the function.
        refusal: If that rule is the only derivative: what all others raise.
        preserve_rng_state: As for :func:`checkpoint`; for the pullback too.
        key: Identity of the function and the pullback, if they may run compiled; see :mod:`._executor`.

    Raises:
        ValueError: As :func:`checkpoint`, of which what a function closes over is not looked through here.
        NotImplementedError: As :func:`checkpoint`.
    """
    tensors, restore = split_tensors(args)
    returned: list[Callable[[Tensors], Any]] = []
    executor = active_executor()
    if executor is not None and key is not None:
        key = key.then(*constants_of(args))
        returned = executor.structures.setdefault(key.key, returned)

    def flat(*tensors: Tensor) -> Tensors:
        outputs, restore_outputs = split_tensors(function(*restore(tensors)))
        returned[:] = [restore_outputs]
        return outputs

    def watched(*tensors: Tensor) -> Tensors:
        with Watch():
            return flat(*tensors)

    kinds, replay = transforms(), CallContext(tensors, preserve_rng_state)
    first = watched if kinds or forward_ad._current_level >= 0 else flat
    rule = None if pullback is None else functools.partial(replay, pullback)
    again = functools.partial(replay, flat)
    outputs = Recompute.of(Derivable(first, again, kinds, rule, refusal, key, executor), *tensors)
    if replay.settle():
        if tracing():
            raise NotImplementedError(
                "the function draws random numbers, which a graph of make_fx cannot draw again; draw them outside "
                "and pass them as arguments"
            )
        if unmapped(tensors):
            raise NotImplementedError(
                "the function draws random numbers under a vmap that maps none of its arguments; pass one that is "
                "mapped, or draw one number for all with vmap's randomness='same'"
            )
    return returned[0](outputs)
