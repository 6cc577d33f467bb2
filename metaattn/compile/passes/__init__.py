"""Passes of the compiler, which make a recorded graph, or a piece of one, compute the same in less time.

:mod:`.matmul_fusion` and :mod:`.qkv_grad_packing` rewrite a whole graph, in this order, before it is split.
:mod:`.rematerialize` then decides, piece by piece, which inputs a piece computes again. A pass reads the ``shapes``,
``result`` and ``spec`` that :mod:`metaattn.compile.recorder` leaves in the ``meta`` of each node, and must leave them
for new nodes. Passes run only on graphs without changes in place.
"""

__all__: list[str] = []
