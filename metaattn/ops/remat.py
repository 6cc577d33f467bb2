"""Rematerialisation: memory for time, under every transform."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.utils._pytree import tree_flatten, tree_unflatten

from ._remat import Program, Remat, Tensors
from ._replay import Replay, tracing
from ._strangers import Watch, check_closure, unmapped

P = ParamSpec("P")
R = TypeVar("R")
_TENSOR = object()  # in the place of a tensor


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
    stack = torch._C._functorch.get_interpreter_stack() or ()
    modes = any(level.key() in (kinds.Grad, kinds.Jvp) for level in stack)
    return modes or torch.is_grad_enabled() or forward_ad._current_level >= 0


class _Flat:
    """A function of arguments as one of the tensors among them, to a tuple of the tensors that it returns.

    ``tensors`` are at hand for the first call alone: what is kept for derivatives must not hold them.
    """

    def __init__(self, function: Callable[..., Any], args: Any, kwargs: Any) -> None:
        self.function = function
        lifted = {}
        if isinstance(function, nn.Module):
            lifted = {**dict(function.named_parameters()), **dict(function.named_buffers())}
        self.leaves, self.tree = tree_flatten((lifted, args, kwargs))
        self.result: tuple[list[Any], Any] | None = None

    def take_tensors(self) -> Tensors:
        """The tensors, of which from then on only the places are held."""
        tensors = tuple(leaf for leaf in self.leaves if isinstance(leaf, Tensor))
        self.leaves = [_TENSOR if isinstance(leaf, Tensor) else leaf for leaf in self.leaves]
        return tensors

    def __call__(self, *tensors: Tensor) -> Tensors:
        """Run the function."""
        lifted, args, kwargs = tree_unflatten(_fill(self.leaves, tensors), self.tree)
        module = self.function if isinstance(self.function, nn.Module) else None
        out = self.function(*args, **kwargs) if module is None else functional_call(module, lifted, args, kwargs)
        leaves, tree = tree_flatten(out)
        if self.result is None:
            self.result = [_TENSOR if isinstance(leaf, Tensor) else leaf for leaf in leaves], tree
        return tuple(leaf for leaf in leaves if isinstance(leaf, Tensor))

    def restore(self, outputs: Tensors) -> Any:
        """What the function returned, with these tensors in it."""
        assert self.result is not None
        leaves, tree = self.result
        return tree_unflatten(_fill(leaves, outputs), tree)


def _fill(leaves: list[Any], tensors: Tensors) -> list[Any]:
    rest = iter(tensors)
    return [next(rest) if leaf is _TENSOR else leaf for leaf in leaves]


def _watched(function: Callable[..., Tensors], *tensors: Tensor) -> Tensors:
    with Watch():
        return function(*tensors)


def _call(function: Callable[..., Any], args: Any, kwargs: Any, preserve_rng_state: bool) -> Any:
    flat = _Flat(function, args, kwargs)
    tensors = flat.take_tensors()
    if not tensors:
        return function(*args, **kwargs)
    kinds = tuple(level.key() for level in torch._C._functorch.get_interpreter_stack() or ())
    first: Callable[..., Tensors] = flat
    if kinds:
        check_closure(
            None if isinstance(function, nn.Module) else function, [leaf for leaf in flat.leaves if leaf is not _TENSOR]
        )
        first = functools.partial(_watched, flat)
    replay = Replay(tensors, preserve_rng_state)
    outputs = Remat.of(Program(first, functools.partial(replay, flat), kinds), *tensors)
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
    return flat.restore(outputs)
