"""Numbers that belong to rows: the lse, and delta and its tangent."""

import triton
import triton.language as tl

from ._scores import LOG2E


@triton.jit
def load_stat(at, flat, i, NQ, OTHER: tl.constexpr):
    """One number for each row, from a contiguous ``[L, NQ]``; OTHER past the last row."""
    return tl.load(at + flat * NQ + i, mask=i < NQ, other=OTHER)


@triton.jit
def load_lse(at, flat, i, NQ):
    """The lse to subtract, base 2: 0 for a row without keys, and +inf past the last row, whose P are then 0."""
    lse = load_stat(at, flat, i, NQ, float("inf")) * LOG2E
    return tl.where(lse == float("-inf"), 0.0, lse)


@triton.jit
def minus_lse_bar(at, lse_at, flat, i, NQ):
    """What a cotangent of lse adds to the deltas. The lse of a row without keys is constant."""
    delta = tl.zeros(i.shape, tl.float32)
    if at is not None:
        lse = load_stat(lse_at, flat, i, NQ, 0.0)
        delta = tl.where(lse == float("-inf"), 0.0, -load_stat(at, flat, i, NQ, 0.0))
    return delta


@triton.jit
def deltas(e, e_t, o, o_t, SECOND: tl.constexpr):
    """``rowsum(out_bar * out)`` and its tangent."""
    e = e.to(tl.float32)
    delta = tl.sum(e * o.to(tl.float32), 1)
    delta_t = delta
    if SECOND:
        delta_t = tl.sum(e * o_t.to(tl.float32), 1)
        if e_t is not None:
            delta_t += tl.sum(e_t.to(tl.float32) * o.to(tl.float32), 1)
    return delta, delta_t
