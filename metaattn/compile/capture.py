"""Steps captured once as a CUDA graph and replayed, without Python, kernel launches or ``torch.func`` at run time.

A meta-step is a large number of small operations, so that an eager one waits for the CPU: on an H100 it took 863 ms,
where a replay of the same operations takes 45 (float32, mixed mode: ``docs/benchmarks/meta.md``). A CUDA graph reads
and writes fixed addresses: the arguments of a call are copied into buffers, and its results are copied out of them.

A replay has as many kernels as the eager step. Fewer kernels, which read and write less, need a compiler: with
``mode="inductor"`` the inner steps, the outer loss and their derivatives are recorded, each as one graph whatever the
number of inner steps. What lies between two calls of attention in them is compiled by Inductor, once for all layers.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..autodiff import ambient_settings, is_wrapped, tensor_spec, without_draws
from .compiler import MetaStepCompiler
from .inductor import has_option

Mode = Literal["graph", "inductor", "none"]
MODES = ("graph", "inductor", "none")
# Types of which one kernel copies many tensors at once.
_GROUPED = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.bool)
WARM_UPS = 2  # runs before the capture, in which cuBLAS and compiled kernels are initialised
_capturing = threading.RLock()  # one graph at a time, in this process


class CapturedGraph:
    """A CUDA graph of a step.

    Args:
        graph: Reads ``inputs`` and writes ``outputs``.
        inputs: The leaves of the arguments; its tensors are buffers.
        outputs: The leaves of what the step returned; its tensors are buffers.
        spec: The structure of what the step returned.
        device: Of the graph.
    """

    def __init__(
        self,
        graph: torch.cuda.CUDAGraph,
        inputs: list[Any],
        outputs: list[Any],
        spec: pytree.TreeSpec,
        device: torch.device,
    ) -> None:
        self._graph, self._outputs, self._spec, self._device = graph, outputs, spec, device
        self._buffers = [t for t in inputs if isinstance(t, Tensor)]
        self._results = [t.detach() for t in outputs if isinstance(t, Tensor)]
        # The buffers are shared by all calls: one at a time uses them, in Python and on the GPU.
        self._lock = threading.Lock()
        self._stream = torch.cuda.current_stream(device)

    def replay(self, leaves: list[Any]) -> Any:
        """Run the graph on the leaves of other arguments, and return copies: the next replay writes the buffers."""
        with self._lock:
            stream = torch.cuda.current_stream(self._device)
            if stream != self._stream:
                stream.wait_stream(self._stream)
                self._stream = stream
            _copy(self._buffers, [leaf for leaf in leaves if isinstance(leaf, Tensor)])
            self._graph.replay()
            copies = [torch.empty_like(t) for t in self._results]
            _copy(copies, self._results)
        tensors = iter(copies)
        outputs = [next(tensors) if isinstance(t, Tensor) else t for t in self._outputs]
        return pytree.tree_unflatten(outputs, self._spec)


class Captured:
    """A step as :func:`capture` returns it: called as the step, and replayed where that is possible.

    Two threads may call it at once, except where the step changes state.

    Attributes:
        reason: Why the last call was not a replay. ``None`` if it was, and with ``mode="inductor"`` on a CPU.
        compiler: What compiles parts of the step, with ``mode="inductor"``; else ``None``. Its ``reasons`` say which
            parts run eagerly.
    """

    def __init__(
        self, step: Callable[..., Any], mode: Mode, state: Iterable[Tensor], max_graphs: int, options: Mapping[str, Any]
    ) -> None:
        functools.update_wrapper(self, step)
        self.mode, self.state, self.max_graphs = mode, list(state), max_graphs
        self.compiler = MetaStepCompiler(options) if mode == "inductor" else None
        self.step = step if self.compiler is None else functools.partial(_run_compiled, self.compiler, step)
        self.reason: str | None = None
        self._graphs: OrderedDict[Any, CapturedGraph | str] = OrderedDict()  # a string says why there is no graph
        self._lock = threading.Lock()
        self._warned: set[str] = set()

    def __call__(self, *args: Any) -> Any:
        """Run the step: by a replay if it was captured for arguments of these shapes, which the first call does."""
        leaves, spec = pytree.tree_flatten(args)
        if self.compiler is not None and not self._on_gpu(leaves):
            return self.step(*args)  # compiled, without a graph
        self.reason = reason = self._why_not_captured(leaves)
        if reason is None:
            key = (spec, tuple(map(_key, leaves)), ambient_settings())
            graph = self._find(key)
            if graph is None:
                with _capturing:
                    graph = self._find(key)  # another thread may have captured it meanwhile
                    if graph is None:
                        self._make_room()
                        graph = self._graphs[key] = self._capture(leaves, spec)
            if isinstance(graph, CapturedGraph):
                return graph.replay(leaves)
            self.reason = reason = graph
        if self.mode != "none" and reason not in self._warned:
            self._warned.add(reason)
            how = "eagerly" if self.compiler is None else "without a graph"
            warnings.warn(f"the step runs {how}: {reason}", stacklevel=2)
        return self.step(*args)

    def _find(self, key: Any) -> CapturedGraph | str | None:
        with self._lock:
            if key in self._graphs:
                self._graphs.move_to_end(key)
            return self._graphs.get(key)

    def _make_room(self) -> None:
        with self._lock:
            while len(self._graphs) >= self.max_graphs:
                self._graphs.popitem(last=False)

    def _why_not_captured(self, leaves: list[Any]) -> str | None:
        """Return why a call with these leaves is not captured; ``None`` if it is."""
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

    def _capture(self, leaves: list[Any], spec: pytree.TreeSpec) -> CapturedGraph | str:
        """Return the graph for such arguments, or why there is none. The state is left as it was."""
        inputs = [t.clone() if isinstance(t, Tensor) else t for t in leaves]
        device = next(t.device for t in (*leaves, *self.state) if isinstance(t, Tensor) and t.is_cuda)
        saved = [t.detach().clone() for t in self.state]
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream(device)
        try:
            with torch.cuda.device(device):
                stream.wait_stream(torch.cuda.current_stream())
                # A backward runs on the stream of its forward: the whole step runs on the stream of the capture.
                with torch.cuda.stream(stream):
                    before = torch.cuda.get_rng_state(device)
                    for _ in range(WARM_UPS):
                        self.step(*pytree.tree_unflatten(inputs, spec))
                    draws = not torch.equal(before, torch.cuda.get_rng_state(device))
                    draws_nothing = contextlib.nullcontext() if draws else without_draws()
                    # Other threads may allocate memory meanwhile, which the default mode forbids all threads.
                    with draws_nothing, torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                        returned = self.step(*pytree.tree_unflatten(inputs, spec))
                torch.cuda.current_stream().wait_stream(stream)
        except Exception as error:
            _reset_generator(device)
            return f"its capture failed ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})"
        finally:
            with torch.no_grad():
                for t, value in zip(self.state, saved, strict=True):
                    t.copy_(value)
        outputs, out_spec = pytree.tree_flatten(returned)
        return CapturedGraph(graph, inputs, outputs, out_spec, device)


def _run_compiled(compiler: MetaStepCompiler, step: Callable[..., Any], *args: Any) -> Any:
    with compiler.activate():
        return step(*args)


def _reset_generator(device: torch.device) -> None:
    """End the capturing state in which a capture that failed leaves the device's generator, by one that succeeds.

    In that state (PyTorch 2.11) nothing draws random numbers on the device any more, and no graph is replayed.
    """
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream(device)  # the default stream may be another device's
    with contextlib.suppress(RuntimeError), torch.cuda.device(device), torch.cuda.graph(graph, stream=stream):
        torch.zeros((), device=device)


def _key(leaf: Any) -> Any:
    """Return what a graph depends on in an argument: all of a tensor except its numbers, or anything else itself."""
    return tensor_spec(leaf) if isinstance(leaf, Tensor) else leaf


def _copy(targets: list[Tensor], sources: list[Tensor]) -> None:
    """Copy tensors, by one kernel for each dtype and device: one kernel per tensor would launch longer than a step."""
    groups: dict[tuple[torch.dtype, torch.device], tuple[list[Tensor], list[Tensor]]] = {}
    with torch.no_grad():
        for target, source in zip(targets, sources, strict=True):
            if target.dtype not in _GROUPED or target.stride() != source.stride():
                target.copy_(source)  # in a group it would make the whole group fall back to one kernel per tensor
                continue
            group = groups.setdefault((target.dtype, target.device), ([], []))
            group[0].append(target)
            group[1].append(source)
        for group_targets, group_sources in groups.values():
            torch._foreach_copy_(group_targets, group_sources)


def capture(
    step: Callable[..., Any],
    *,
    mode: Mode = "graph",
    state: Iterable[Tensor] = (),
    max_graphs: int = 8,
    options: Mapping[str, Any] | None = None,
    most: int | None = None,
) -> Captured:
    """Return a step that is captured as a CUDA graph when it is first called, and replayed from then on.

    A call is captured again if its arguments have another structure, its tensors another shape, stride, dtype or
    device, or its other arguments another value. Where no graph is possible (on a CPU, for example) the step runs
    eagerly, and a warning says once why.

    Args:
        step: A function of tensors in any nesting of tuples, lists and dicts, which returns such a nesting. It may take
            gradients inside (:func:`torch.autograd.grad`, :mod:`torch.func`). It must do the same work in each call,
            without waiting for the GPU (``.item()``, a branch on a number). A replay repeats only the work on the GPU:
            it does not print, for example.
        mode: ``"graph"`` captures the step. ``"none"`` always runs it eagerly. ``"inductor"`` captures it, and compiles
            what :mod:`metaattn.meta` does in it: inner steps, outer losses and their derivatives. On a CPU, where there
            is no graph, these are compiled too.

            A loss that cannot be compiled runs eagerly, and a warning says once why: one that draws random numbers,
            branches on numbers, changes in place a tensor that it did not make, or closes over a tensor that is
            differentiated. Tensors and numbers that it closes over may change between calls, except for settings deep
            in objects and modules. Compiled, ``"reverse"`` recomputes activations as ``"mixed"`` does.

            Where this process may use four cores or more, half of them, at most eight, compile for it at first, in
            separate processes. The environment variable ``METAATTN_COMPILE_PROCESSES`` sets another limit, 0 for none.
        state: Tensors that the step changes in place and that are not among its arguments: parameters, and what an
            optimizer made with ``capturable=True`` keeps. The trial runs before a capture leave them unchanged.
        max_graphs: How many graphs are kept, at least 1; each takes memory. The least recently used is dropped first.
        options: Options of Inductor by their names, like those of :func:`torch.compile`.
        most: Deprecated name of ``max_graphs``.

    Returns:
        A function that is called as the step. Its results require no gradients.

    Raises:
        ValueError: Another mode, ``max_graphs`` below 1, or options without ``mode="inductor"`` or that Inductor does
            not have.
        TypeError: A step that is not callable, or state that is not tensors.

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
    if most is not None:
        warnings.warn("capture(most=…) is deprecated; use max_graphs=…", DeprecationWarning, stacklevel=2)
        max_graphs = most
    if max_graphs < 1:
        raise ValueError(f"max_graphs must be at least 1; got {max_graphs}")
    if options and mode != "inductor":
        raise ValueError(f"options are Inductor's and need mode='inductor'; got mode={mode!r}")
    for name in options or ():
        if not has_option(name):
            raise ValueError(f"Inductor has no option {name!r}; torch._inductor.list_options() names most of them")
    return Captured(step, mode, state, max_graphs, options or {})
