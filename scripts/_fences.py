"""Whether a kernel's tensor cores may read shared memory before what was written there can be seen, by its PTX.

A thread's writes are seen by the matrix products of Hopper (wgmma) once it has passed ``fence.proxy.async``, and
others' once these have done so before a common barrier. Triton (3.6, 3.7) puts the fence before the product, and the
barrier where it first needs one: if that is earlier, as at a read of another operand, no barrier follows the fence, and
a product of two groups of four warps may read what was there before. On an H100 that made gradients wrong by a tenth
(float32 as tf32, causal, head size 128).
"""

from __future__ import annotations

import re

_EVENTS = {
    "write": r"\b(st\.shared|stmatrix)",
    "barrier": r"\b(bar|barrier)\.sync",
    "fence": r"\bfence\.proxy\.async",
    "product": r"\bwgmma\.fence",
}
_EVENT = re.compile("|".join(f"(?P<{name}>{pattern})" for name, pattern in _EVENTS.items()))


def unfenced(ptx: str) -> int:
    """How many groups of products follow a write, a barrier and only then a fence, with no further barrier."""
    events = [str(found.lastgroup) for found in _EVENT.finditer(ptx)]
    # Between two products: what was done since the barrier that is the last one before a product.
    text = "".join({"write": "w", "barrier": "b", "fence": "f", "product": "p"}[event] for event in events)
    return len(re.findall("wb+f+(?=p)", text))
