"""Every private function of Inductor, Dynamo and FX that the compiler uses, under a plain name.

PyTorch promises none of these names, so that they stand in this file only. Nothing of it is imported before it is
needed: ``import metaattn`` must not load Dynamo and Inductor, which takes seconds and most programs never use them.
"""

from __future__ import annotations

import contextlib
import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx

# A compiled piece takes its tensors in a list and may empty it, so that a tensor that nothing else holds is freed as
# soon as it was used.
CompiledPiece = Callable[[list[Tensor]], Sequence[Any]]
PieceCompiler = Callable[[fx.GraphModule, Sequence[Tensor]], CompiledPiece]

# Inductor merges kernels that do not depend on each other ("combo kernels"): on an H100 a small meta-step took a tenth
# less time, and its first call a fifth less. Inductor has none for CPUs.
_GPU_OPTIONS = {"combo_kernels": True}


def inductor_compiler(options: Mapping[str, Any]) -> PieceCompiler:
    """Return a function that compiles a graph module for given inputs with Inductor.

    Args:
        options: Settings of Inductor, by the names of ``torch._inductor.list_options()``.
    """

    def compile_piece(module: fx.GraphModule, inputs: Sequence[Tensor]) -> CompiledPiece:
        from torch._dynamo.convert_frame import compile_lock
        from torch._guards import TracingContext, tracing
        from torch._inductor.compile_fx import compile_fx
        from torch.compiler import config

        # Inductor's cache on disk is skipped unless there is an environment of symbols for shapes; we use no symbols.
        context = TracingContext(_fake_tensor_mode(symbolic_shapes=True))
        # PyTorch 2.11 leaves this dtype out of its keys. The words before it keep apart what earlier versions of this
        # library left in the cache, which refers to a class that is gone and cannot be loaded.
        tag = f"{config.cache_key_tag} default dtype {torch.get_default_dtype()}"
        patches = {**(_GPU_OPTIONS if any(t.is_cuda for t in inputs) else {}), **options}
        # The lock of torch.compile: Inductor compiles in one thread at a time.
        with compile_lock, warnings.catch_warnings(), tracing(context), config.patch(cache_key_tag=tag):  # type: ignore[attr-defined]
            warnings.simplefilter("ignore")  # Inductor's hints are about settings that are not the user's
            return _boxed(compile_fx(module, list(inputs), config_patches=patches, ignore_shape_env=True))

    return compile_piece


def _boxed(compiled: Any) -> CompiledPiece:
    """Return the function inside of what Inductor returns that takes a list and empties it.

    The outer functions hold their arguments until they return.
    """
    inner = compiled
    while inner is not None:
        code = getattr(inner, "__code__", None)
        takes_one = code is not None and code.co_argcount == 1 and not code.co_flags & inspect.CO_VARARGS
        if takes_one and getattr(inner, "_boxed_call", False):
            return cast(CompiledPiece, inner)
        inner = getattr(inner, "__wrapped__", None)
    return lambda tensors: cast(Sequence[Any], compiled(*tensors))


def has_option(name: str) -> bool:
    """Return whether Inductor has a setting of this name; ``list_options()`` leaves some out."""
    from torch._inductor import config

    return hasattr(config, name)


def uses_disk_cache(options: Mapping[str, Any]) -> bool:
    """Return whether Inductor looks for compiled graphs on disk, under these options."""
    from torch._inductor import config

    def setting(name: str) -> bool:
        return bool(options.get(name, getattr(config, name)))

    return setting("fx_graph_cache") and not setting("force_disable_caches")


def disk_cache_hits() -> int:
    """Return how many graphs this process has found in Inductor's cache on disk."""
    from torch._dynamo.utils import counters

    return int(counters["inductor"]["fxgraph_cache_hit"])


def fake_tensor_mode() -> Any:
    """Return a mode in which operations compute shapes and dtypes but no numbers; plain tensors may take part."""
    return _fake_tensor_mode(allow_non_fake_inputs=True)


def _fake_tensor_mode(*, symbolic_shapes: bool = False, **settings: Any) -> Any:
    from torch._subclasses import FakeTensorMode

    if symbolic_shapes:
        from torch.fx.experimental.symbolic_shapes import ShapeEnv

        settings["shape_env"] = ShapeEnv()
    return FakeTensorMode(**settings)


def merge_common_subexpressions(graph: fx.Graph) -> fx.Graph:
    """Return the graph with equal operations on equal inputs merged into one."""
    from torch._functorch.compile_utils import fx_graph_cse

    merged: fx.Graph = fx_graph_cse(graph)
    return merged


def decompose(operator: Any, *args: Any) -> Tensor:
    """Run an operator as PyTorch defines it in terms of simpler ones."""
    from torch._decomp import get_decompositions

    return cast(Tensor, get_decompositions([operator])[operator](*args))


def serialize(module: fx.GraphModule) -> bytes:
    """Return a graph module as bytes, whatever operators it has."""
    from torch.fx._graph_pickler import GraphPickler, Options

    return GraphPickler.dumps(module, Options(ops_filter=None))


def deserialize(data: bytes) -> fx.GraphModule:
    """Return the graph module of :func:`serialize`."""
    from torch.fx._graph_pickler import GraphPickler

    return cast(fx.GraphModule, GraphPickler.loads(data, _fake_tensor_mode(symbolic_shapes=True)))


def preload() -> None:
    """Import all that compiling a piece needs, which takes seconds: once, before a process forks others."""
    from torch._dynamo import convert_frame  # noqa: F401
    from torch._inductor import async_compile, compile_fx  # noqa: F401
    from torch.fx import _graph_pickler  # noqa: F401
    from torch.fx.experimental import symbolic_shapes  # noqa: F401


@contextlib.contextmanager
def kernel_compilers(count: int) -> Iterator[None]:
    """Compile the kernels of a piece in ``count`` forked processes inside the block, and end these after it."""
    from torch._inductor import async_compile, config

    config.compile_threads, config.worker_start_method = count, "fork"
    try:
        yield
    finally:
        async_compile.shutdown_compile_workers()
