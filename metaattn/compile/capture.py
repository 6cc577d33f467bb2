"""A step captured once as a CUDA graph and replayed: no Python, no launches, no ``torch.func`` at run time.

A meta-step is small operations in great number, so that an eager one waits for the CPU: on an H100 863 ms, where the
replay of the same operations takes 45 (float32, mixed mode: ``docs/benchmarks/meta.md``). A graph is of fixed
addresses: what a call brings is copied into buffers, and what it returns is copied out of them.

A replay has as many kernels as the eager step. Fewer of them, and less to read and write, need a compiler: with
``mode="inductor"`` the inner steps, the outer loss and their derivatives are recorded, each as one graph whatever the
number of inner steps, and what is between two calls of attention in them is compiled by Inductor, once for all layers.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch._inductor import config
from torch.utils import _pytree as pytree

from ..autodiff import ambient_settings, is_wrapped, without_draws
from .compiler import MetaStepCompiler

Mode = Literal["graph", "inductor", "none"]
MODES = ("graph", "inductor", "none")
_TOGETHER = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.bool)
WARM_UPS = 2  # lazy initialisations (cuBLAS, compiled kernels) happen before the capture


class CapturedGraph(NamedTuple):
    """A captured graph, the buffers that it reads, and what it returns."""

    graph: torch.cuda.CUDAGraph
    inputs: list[Tensor]
    outputs: list[Any]
    spec: pytree.TreeSpec


class Captured:
    """What :func:`capture` returns: call it as the step; see there.

    Attributes:
        reason: Why the last call was no replay; ``None`` if it was one, and on a CPU with ``mode="inductor"``.
    """

    def __init__(
        self, step: Callable[..., Any], mode: Mode, state: Iterable[Tensor], most: int, options: Mapping[str, Any]
    ) -> None:
        functools.update_wrapper(self, step)
        self.mode, self.state, self.most = mode, list(state), most
        self.pieces = MetaStepCompiler(options) if mode == "inductor" else None
        self.step = step if self.pieces is None else functools.partial(_compiled, self.pieces, step)
        self.reason: str | None = None
        self._replays: OrderedDict[Any, CapturedGraph | str] = OrderedDict()
        self._said: set[str] = set()

    def __call__(self, *args: Any) -> Any:
        """One step: a replay if there is a graph for arguments of these shapes, which is captured at the first call."""
        leaves, spec = pytree.tree_flatten(args)
        if self.pieces is not None and not self._on_gpu(leaves):
            return self.step(*args)  # compiled: on a CPU there is no graph besides
        self.reason = self._refusal(leaves)
        if self.reason is None:
            key = (spec, tuple(map(_described, leaves)), ambient_settings())
            if key not in self._replays:
                self._make_room()
                self._replays[key] = self._capture(leaves, spec)
            self._replays.move_to_end(key)
            replay = self._replays[key]
            if isinstance(replay, CapturedGraph):
                return _run(replay, leaves)
            self.reason = replay
        if self.mode != "none" and self.reason not in self._said:
            self._said.add(self.reason)
            how = "eagerly" if self.pieces is None else "without a graph"
            warnings.warn(f"the step runs {how}: {self.reason}", stacklevel=2)
        return self.step(*args)

    def _refusal(self, leaves: list[Any]) -> str | None:
        """Why such a call is not captured."""
        if self.mode == "none":
            return "mode='none'"
        if not self._on_gpu(leaves):
            return "a CUDA graph needs tensors on a GPU, and none of the arguments is"
        if any(is_wrapped(t) for t in leaves if isinstance(t, Tensor)):
            return "it was called inside a transform of torch.func, which a replay does not see"
        if any(t.requires_grad for t in leaves if isinstance(t, Tensor)) and torch.is_grad_enabled():
            return "an argument requires a gradient, which a replay does not record; detach it, or use torch.no_grad()"
        return None

    def _on_gpu(self, leaves: list[Any]) -> bool:
        return any(isinstance(t, Tensor) and t.is_cuda for t in (*leaves, *self.state))

    def _make_room(self) -> None:
        while len(self._replays) >= self.most:
            self._replays.popitem(last=False)

    def _capture(self, leaves: list[Any], spec: pytree.TreeSpec) -> CapturedGraph | str:
        """The graph for such arguments, or why there is none. The state is as it was before."""
        inputs = [t.clone() if isinstance(t, Tensor) else t for t in leaves]
        device = next(t.device for t in (*leaves, *self.state) if isinstance(t, Tensor) and t.is_cuda)
        saved = [t.detach().clone() for t in self.state]
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream(device)
        try:
            with torch.cuda.device(device):
                stream.wait_stream(torch.cuda.current_stream())
                # The backward runs on the stream of its forward: all of it on that of the capture.
                with torch.cuda.stream(stream):
                    before = torch.cuda.get_rng_state(device)
                    for _ in range(WARM_UPS):
                        self.step(*pytree.tree_unflatten(inputs, spec))
                    draws = not torch.equal(before, torch.cuda.get_rng_state(device))
                    quiet = contextlib.nullcontext() if draws else without_draws()
                    with quiet, torch.cuda.graph(graph, stream=stream):
                        returned = self.step(*pytree.tree_unflatten(inputs, spec))
                torch.cuda.current_stream().wait_stream(stream)
        except Exception as error:
            _let_draw_again(device)
            return f"its capture failed ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})"
        finally:
            with torch.no_grad():
                for t, was in zip(self.state, saved, strict=True):
                    t.copy_(was)
        outputs, out_spec = pytree.tree_flatten(returned)
        return CapturedGraph(graph, inputs, outputs, out_spec)


def _compiled(pieces: MetaStepCompiler, step: Callable[..., Any], *args: Any) -> Any:
    with pieces.at_work():
        return step(*args)


def _let_draw_again(device: torch.device) -> None:
    """After a capture that failed: the generator goes on as if in it (PyTorch 2.11), until one that succeeds ends.

    Else nothing draws random numbers on the device any more, and no graph is replayed.
    """
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream(device)  # the default stream may be another device's
    with contextlib.suppress(RuntimeError), torch.cuda.device(device), torch.cuda.graph(graph, stream=stream):
        torch.zeros((), device=device)


def _described(leaf: Any) -> Any:
    """What a graph depends on in an argument: of a tensor all but its numbers, of anything else itself."""
    if isinstance(leaf, Tensor):
        return leaf.shape, leaf.stride(), leaf.dtype, leaf.device
    return leaf


def _run(replay: CapturedGraph, leaves: list[Any]) -> Any:
    buffers = [buffer for buffer in replay.inputs if isinstance(buffer, Tensor)]
    _copy(buffers, [leaf for leaf in leaves if isinstance(leaf, Tensor)])
    replay.graph.replay()
    # Copies: the next replay writes where these lie.
    found = [t.detach() for t in replay.outputs if isinstance(t, Tensor)]
    copies = [torch.empty_like(t) for t in found]
    _copy(copies, found)
    rest = iter(copies)
    outputs = [next(rest) if isinstance(t, Tensor) else t for t in replay.outputs]
    return pytree.tree_unflatten(outputs, replay.spec)


def _copy(to: list[Tensor], of: list[Tensor]) -> None:
    """All of a dtype and device at once: a kernel for each would take as long to launch as a small step itself."""
    groups: dict[tuple[torch.dtype, torch.device], tuple[list[Tensor], list[Tensor]]] = {}
    with torch.no_grad():
        for a, b in zip(to, of, strict=True):
            if a.dtype not in _TOGETHER or a.stride() != b.stride():
                a.copy_(b)  # one that is not as it must be would take all of its group with it
                continue
            alike = groups.setdefault((a.dtype, a.device), ([], []))
            alike[0].append(a)
            alike[1].append(b)
        for a_s, b_s in groups.values():
            torch._foreach_copy_(a_s, b_s)


def capture(
    step: Callable[..., Any],
    *,
    mode: Mode = "graph",
    state: Iterable[Tensor] = (),
    most: int = 8,
    options: Mapping[str, Any] | None = None,
) -> Captured:
    """A step that is captured as a CUDA graph at its first call, and replayed from then on.

    A call whose arguments differ in structure, shape, strides, dtype or device, or in what is no tensor, is captured
    anew. Where there can be no graph (on a CPU, say) the step runs eagerly, and a warning says once why.

    Args:
        step: A function of tensors in any nesting of tuples, lists and dicts, which returns the same. It may take
            gradients of its own inside (:func:`torch.autograd.grad`, :mod:`torch.func`). It must do the same work in
            each call, without waiting for the GPU (``.item()``, a branch on a number): what it does besides, such as
            printing, a replay does not.
        mode: ``"graph"``; ``"inductor"`` to have what :mod:`metaattn.meta` does in the step (inner steps, outer
            losses, and their derivatives) compiled besides, on a CPU too, where there is no graph; or ``"none"`` to
            run eagerly throughout. A loss that cannot be compiled runs as it is, and a warning says once why: one
            that draws random numbers, branches on numbers, changes in place what it did not make, or closes over a
            tensor that is differentiated. Tensors and numbers that it closes over may change between calls, but for
            settings deep in objects and modules. Compiled, ``"reverse"`` recomputes activations as ``"mixed"`` does.
            Where this process may use four cores or more, half of them (at most eight, or as the environment variable
            ``METAATTN_COMPILE_PROCESSES`` says, 0 for none) compile for it at first, in processes of their own.
        state: Tensors, besides the arguments, that the step changes in place (parameters and what an optimizer made
            with ``capturable=True`` keeps): the trial runs before a capture leave them as they were.
        most: How many graphs are kept, each with memory of its own; the least recently used goes first.
        options: Inductor's, by name, as those of :func:`torch.compile`.

    Returns:
        A function called as the step. Its results require no gradients.

    Raises:
        ValueError: Another mode, ``most`` below 1, options where nothing is compiled, or that Inductor does not have.
        TypeError: A step that cannot be called; state that is no tensors.

    Example:
        >>> import torch
        >>> from metaattn.meta import capture
        >>> def step(params, x):
        ...     return {"loss": (params["w"] * x).square().mean()}
        >>> fast = capture(step, mode="graph" if torch.cuda.is_available() else "none")
        >>> fast({"w": torch.ones(3)}, 2 * torch.ones(3))["loss"].item()
        4.0
    """
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(map(repr, MODES))}; got {mode!r}")
    if not callable(step):
        raise TypeError(f"step must be a function; got {step!r}")
    state = list(state)
    if not all(isinstance(t, Tensor) for t in state):
        raise TypeError("state must be tensors that the step changes in place, such as module.parameters()")
    if most < 1:
        raise ValueError(f"most must be at least 1; got {most}")
    if options and mode != "inductor":
        raise ValueError(f"options are Inductor's, for mode='inductor'; got them with mode={mode!r}")
    for name in options or ():
        if not hasattr(config, name):
            raise ValueError(f"Inductor has no option {name!r}; torch._inductor.list_options() names most of them")
    return Captured(step, mode, state, most, options or {})
