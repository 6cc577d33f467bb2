"""Piecewise compiler for meta-steps.

The entry point is :func:`capture`, which is public as :func:`metaattn.meta.capture`. A meta-step passes these modules:

1. :mod:`.capture` calls the step with a compiler active, and captures what it then runs as a CUDA graph.
2. :mod:`metaattn.meta` marks the parts of a step by a key (:mod:`.cache_key`): an inner step, an outer loss, and what
   their derivatives are. :mod:`metaattn.autodiff` offers these to :mod:`.compiler`, which looks them up in its cache.
3. :mod:`.recorder` records a new one as a graph of operations.
4. :mod:`.passes` fuse matrix products, pack gradients of attention, and choose values to recompute.
5. :mod:`.piecewise` splits the graph at the attention operators and runs the pieces one after the other.
6. :mod:`.inductor` compiles each piece when it first runs, if the processes of :mod:`.precompile` have not yet.

May import :mod:`metaattn.backends`, :mod:`metaattn.autodiff` and :mod:`metaattn.ops`; only :mod:`metaattn.meta` and the
packages above it import this one. Nothing here imports Dynamo or Inductor before a step is compiled.
"""

from .capture import Captured, capture

__all__ = ["Captured", "capture"]
