"""Operations on one tile, on the device: loads and stores, products, scores, mask, window, bias and dropout.

All kernels share these. A tile is ``[rows, keys]`` in the kernels that loop over keys, and ``[keys, rows]`` in those
that loop over rows. Everything here works for both: the caller shapes the row numbers ``i`` and the key numbers ``j``
to broadcast to its tile. Scores are in base 2: the probabilities are ``exp2(s * c - lse * LOG2E)``.

Compile-time arguments are in capitals. Four of them are measures against rounding and against slow code:

* FEW_KEYS: some rows see few keys. What a kernel computes for such rows from rounded sums is too inaccurate; a first
  loop over the keys computes it exactly.
* COMPENSATE: there are few rows. Each product is computed twice, for its rounded factor and for what rounding lost.
* SINGLE_KEY_BLOCK: one block holds all keys, so that one kernel computes all gradients.
* KEEP_IN_REGISTERS: see :func:`keep_in_registers`.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
IMPRECISE_LSE = tl.constexpr(64.0)  # from here on an lse is rounded by 4e-6 or more
MAX_FEW_KEYS = tl.constexpr(64)  # in rows that see more keys, the effect of rounding averages out


class HeadTerms(NamedTuple):
    """Addresses of one head's bias, bias tangent and mask; and its dropout seed. ``None`` is absent."""

    bias: Any
    bias_t: Any
    mask: Any
    seed: Any


@triton.jit
def round_to_tf32(x):
    """Round float32 to tf32 as cuBLAS does. The tensor cores would truncate, with three times the error."""
    if INTERPRETED:
        bits = x.to(tl.int32, bitcast=True)
        rounded = ((bits + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
        return tl.where(x == x, rounded, x)  # the carry could reach the sign of a NaN
    else:
        # One instruction. With integer operations there are four, and a predicate for each element; ptxas generated
        # wrong code for a thread that held 128 of these (docs/benchmarks).
        asm: tl.constexpr = "cvt.rna.tf32.f32 $0, $1;"
        bits = tl.inline_asm_elementwise(asm, "=r,f", [x], dtype=tl.int32, is_pure=True, pack=1)
        return bits.to(tl.float32, bitcast=True)


@triton.jit
def product(a, b, acc, PRECISION: tl.constexpr):
    """Compute ``a b + acc`` on the tensor cores, in float32; ``acc`` may be ``None``."""
    if PRECISION == "tf32" and a.dtype == tl.float32:
        # Rounding here is faster by a tenth than rounding once after the load (T, F with T, S at head size 128).
        a = round_to_tf32(a)
        b = round_to_tf32(b)
    if acc is None:
        return tl.dot(a, b, input_precision=PRECISION)
    else:
        return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def round_with_rest(p, dtype: tl.constexpr, COMPENSATE: tl.constexpr):
    """Round a float32 factor of products to ``dtype``; with COMPENSATE return also what rounding lost, rounded.

    Only 16-bit dtypes have a rest. It matters in sums over few rows, where the rounding errors do not average out.
    """
    high = p.to(dtype)
    low = high
    if COMPENSATE and dtype != tl.float32:
        low = (p - high.to(tl.float32)).to(dtype)
    return high, low


@triton.jit
def product_with_rest(p, b, acc, COMPENSATE: tl.constexpr, PRECISION: tl.constexpr):
    """Compute ``p b + acc`` for a factor ``p`` from :func:`round_with_rest`."""
    high, low = p
    acc = product(high, b, acc, PRECISION)
    if COMPENSATE and b.dtype != tl.float32:
        acc = product(low, b, acc, PRECISION)
    return acc


@triton.jit
def transpose_with_rest(p):
    """Transpose a factor from :func:`round_with_rest`."""
    high, low = p
    return tl.trans(high), tl.trans(low)


@triton.jit
def keep_in_registers(x, KEEP_IN_REGISTERS: tl.constexpr):
    """Multiply ``x`` by the identity, which is exact in 16 bits, so that the compiler keeps it in registers.

    The result of a product is in registers, and the next product can read it there. Otherwise each product reads it
    from shared memory: on an H100 that keeps the shared memory 70% busy, and the tensor cores only 43 to 52%.
    """
    if x is None:
        return  # noqa: RET502
    elif KEEP_IN_REGISTERS:
        c = tl.arange(0, x.shape[1])
        return tl.dot(x, (c[:, None] == c[None, :]).to(x.dtype)).to(x.dtype)
    else:
        return x


@triton.jit
def locate(x, where):
    """Return the address of the matrix of a view for ``where = (b0, b1, head)``."""
    return locate_like(x.ptr, x, where)


@triton.jit
def locate_like(at, x, where):
    """Return the same address in a tensor that begins at ``at`` and has the strides of a view."""
    b0, b1, head = where
    return at + b0 * x.batch0 + b1 * x.batch1 + head * x.head


@triton.jit
def row_stride(x, problem):
    """Return the row stride of a view: its own, or the common one, for which all offsets are computed once."""
    if x.row is None:
        return problem.ROW_STRIDE
    else:
        return x.row


@triton.jit
def split_head_index(head_index, BATCH1, HEADS):
    """Return ``(b0, b1, head)`` of a flat head index, in int64: offsets exceed 2^31."""
    head_index = head_index.to(tl.int64)
    head = head_index % HEADS
    b = head_index // HEADS
    return b // BATCH1, b % BATCH1, head


@triton.jit
def key_head(where, problem):
    """Return ``where`` of the key head that a query head shares. Called once, to keep the division out of loops."""
    b0, b1, head = where
    return b0, b1, head // problem.GROUP


@triton.jit
def locate_optional(x, where):
    """Return :func:`locate`, or ``None`` if the tensor is absent."""
    if x.ptr is None:
        return  # noqa: RET502 (Triton 3.6 turns `return None` into a tensor, and cannot return tuples with None)
    else:
        return locate(x, where)


@triton.jit
def load_seed(problem, head_index):
    """Load the dropout seed of a head; return ``None`` without dropout."""
    if problem.seeds is None:
        return  # noqa: RET502
    else:
        return tl.load(problem.seeds + head_index)


@triton.jit
def schedule(BLOCKS, TOTAL_HEADS, L2_GROUP):
    """Return which block of which head a program computes.

    Heads are taken in groups of L2_GROUP; in a group all first blocks come before all second ones. With the heaviest
    blocks first no multiprocessor is left with a long one at the end. The heads of a group are so few that their keys
    stay in the L2 cache.
    """
    pid = tl.program_id(0)
    first = pid // (L2_GROUP * BLOCKS) * L2_GROUP
    heads = tl.minimum(L2_GROUP, TOTAL_HEADS - first)
    rest = pid % (L2_GROUP * BLOCKS)
    return rest // heads, (first + rest % heads).to(tl.int64)


@triton.jit
def reversed_row_block(block, blocks, FEW_KEYS: tl.constexpr):
    """Return which block of rows comes at a place of the schedule.

    Under a causal mask the last rows see the most keys, and come first. With FEW_KEYS the first block of rows comes
    before them: it sees few keys, but loops over them twice, and would otherwise end last.
    """
    if FEW_KEYS:
        return (blocks - block) % blocks
    else:
        return blocks - 1 - block


@triton.jit
def load_rows(at, stride, start, r, d, limit, EVEN: tl.constexpr):
    """Load rows ``start + r`` of a matrix; zeros from row ``limit`` on. EVEN says that there are no such rows."""
    start = tl.cast(start, tl.int64)
    p = at + start * stride + r[:, None] * stride + d[None, :]
    return tl.load(p) if EVEN else tl.load(p, mask=(r < limit - start)[:, None], other=0.0)


@triton.jit
def load_query_rows(x, where, problem, start, r, d, EVEN: tl.constexpr):
    """Load rows of a view of query heads (query, cotangent, result); return ``None`` if it is absent."""
    if x.ptr is None:
        return  # noqa: RET502
    else:
        return load_rows(locate(x, where), row_stride(x, problem), start, r, d, problem.NQ, EVEN)


@triton.jit
def load_key_rows(x, where, problem, start, r, d, EVEN: tl.constexpr):
    """Load rows of a view of key heads (key, value); return ``None`` if it is absent."""
    if x.ptr is None:
        return  # noqa: RET502
    else:
        return load_rows(locate(x, where), row_stride(x, problem), start, r, d, problem.NK, EVEN)


@triton.jit
def store_rows(at, stride, x, start, r, d, limit):
    """Store rows ``start + r`` of a matrix that are below ``limit``."""
    start = tl.cast(start, tl.int64)
    p = at + start * stride + r[:, None] * stride + d[None, :]
    tl.store(p, x.to(at.dtype.element_ty), mask=(r < limit - start)[:, None])


@triton.jit
def store(view, at, x, where, head_index, problem, start, r, d, limit, SIZE: tl.constexpr):
    """Store rows of a tensor that begins at ``at`` and has the strides of ``view``.

    If ``view.head`` is ``None``, the tensor is contiguous, with ``limit`` rows of SIZE columns for each head.
    """
    if view.head is None:
        store_rows(at + head_index * limit * SIZE, SIZE, x, start, r, d, limit)
    else:
        store_rows(locate_like(at, view, where), row_stride(view, problem), x, start, r, d, limit)


@triton.jit
def load_score_tile(x, at, i, j, NQ, NK):
    """Load a tile of a mask, a bias or a bias's tangent. Broadcast dimensions (stride ``None``) are read once."""
    if x.row is None and x.col is None:
        return tl.load(at)
    elif x.row is None:
        return tl.load(at + j.to(tl.int64) * x.col, mask=j < NK, other=0)
    elif x.col is None:
        return tl.load(at + i.to(tl.int64) * x.row, mask=i < NQ, other=0)
    else:
        return tl.load(at + i.to(tl.int64) * x.row + j.to(tl.int64) * x.col, mask=(i < NQ) & (j < NK), other=0)


@triton.jit
def bias_and_mask(s, problem, terms, i, j, FOLD_SCALE: tl.constexpr, EDGE: tl.constexpr):
    """Return scores with bias, -inf where hidden. With FOLD_SCALE they are scaled here, otherwise by :func:`exponent`.

    EDGE: the tile may extend beyond the band or the last key.
    """
    if FOLD_SCALE:
        s = s * problem.scale
    if problem.bias.ptr is not None:
        s += load_score_tile(problem.bias, terms.bias, i, j, problem.NQ, problem.NK).to(tl.float32)
    if problem.mask.ptr is not None:
        s += load_score_tile(problem.mask, terms.mask, i, j, problem.NQ, problem.NK).to(tl.float32)
    if EDGE:
        shown = j < problem.NK
        if problem.right is not None:
            shown = shown & (j - i <= problem.right)
        if problem.left is not None:
            shown = shown & (i - j <= problem.left)
        s = tl.where(shown, s, float("-inf"))
    return s


@triton.jit
def exponent(s, shift, problem, FOLD_SCALE: tl.constexpr):
    """Return the base-2 logarithm of ``exp(scores - shift)`` for scores from :func:`bias_and_mask`.

    A bias may shift whole rows by thousands, or to the end of the range. With FOLD_SCALE the shift, in natural units,
    is therefore subtracted first: the difference is exact. Otherwise scale and difference are one instruction, which
    rounds once, and the shift is in base 2.
    """
    if FOLD_SCALE:
        return (s - shift) * LOG2E
    else:
        return s * (problem.scale * LOG2E) - shift


@triton.jit
def shift_units(problem, FOLD_SCALE: tl.constexpr):
    """Return the factor that turns scores from :func:`bias_and_mask` into the units of a shift of :func:`exponent`."""
    if FOLD_SCALE:
        return 1.0
    else:
        return problem.scale * LOG2E


@triton.jit
def murmur_mix(x):
    """Apply the 32-bit finaliser of MurmurHash3 (Appleby)."""
    x = (x ^ (x >> 16)) * 0x85EBCA6B
    x = (x ^ (x >> 13)) * 0xC2B2AE35
    return x ^ (x >> 16)


@triton.jit
def dropout_keeps(seed, threshold, i, j):
    """Return which elements dropout keeps: bit for bit those of ``dropout_weight`` in ``backends/masking.py``."""
    low = (seed & 0xFFFFFFFF).to(tl.uint32)
    high = ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)
    row = murmur_mix((i.to(tl.uint32) * 0x9E3779B9) ^ low)
    bits = murmur_mix(murmur_mix(j.to(tl.uint32) * 0x9E3779B9 + row) ^ high)
    return bits.to(tl.int64) >= threshold


@triton.jit
def key_range(problem, row, BM: tl.constexpr, BN: tl.constexpr):
    """Return the range of keys that rows ``[row, row + BM)`` see, as ``lo <= a <= b <= hi``.

    The edges of the band do not cross the tiles between ``a`` and ``b``.
    """
    lo = 0
    a = 0
    hi = problem.NK
    b = problem.NK // BN * BN
    if problem.right is not None:
        hi = tl.minimum(hi, tl.maximum(row + BM + problem.right, 0))
        b = tl.minimum(b, tl.maximum(row + problem.right + 1, 0) // BN * BN)
    if problem.left is not None:
        lo = tl.minimum(tl.maximum(row - problem.left, 0) // BN * BN, hi)
        a = tl.minimum(tl.cdiv(tl.maximum(row + BM - 1 - problem.left, 0), BN) * BN, tl.cdiv(hi, BN) * BN)
    return lo, tl.maximum(a, lo), tl.maximum(b, a), hi


@triton.jit
def row_range(problem, key, BM: tl.constexpr, BN: tl.constexpr):
    """Return the range of rows that see keys ``[key, key + BN)``, as :func:`key_range` does, for tiles of BM rows."""
    lo = 0
    a = 0
    hi = problem.NQ
    b = problem.NQ // BM * BM
    if problem.left is not None:
        hi = tl.minimum(hi, key + BN + problem.left)
        b = tl.minimum(b, (key + problem.left + 1) // BM * BM)
    if problem.right is not None:
        lo = tl.minimum(tl.maximum(key - problem.right, 0) // BM * BM, tl.cdiv(hi, BM) * BM)
        a = tl.minimum(tl.cdiv(tl.maximum(key + BN - 1 - problem.right, 0), BM) * BM, tl.cdiv(hi, BM) * BM)
    return lo, tl.maximum(a, lo), tl.maximum(b, a), hi


@triton.constexpr_function
def segment_exists(segment, starts_with_edge, ends_with_edge, SPLIT):
    """Return whether a loop over a range ``lo <= a <= b <= hi`` has a segment.

    With SPLIT the loop has up to three: 0, from ``lo`` to ``a``, if the range starts with tiles that an edge crosses;
    1, from ``a`` to ``b``, which needs no comparisons; 2, from ``b`` to ``hi``, if it ends with such tiles. Without
    SPLIT it has one, number 2.

    Each kernel has one loop body, inside ``for segment in tl.static_range(3)``. The loop itself cannot be shared: its
    body updates the accumulators of the kernel, and Triton has no function arguments that could do so.
    """
    if segment == 0:
        return SPLIT and starts_with_edge
    if segment == 1:
        return SPLIT
    return ends_with_edge or not SPLIT


@triton.jit
def segment_bounds(bounds, segment: tl.constexpr, SPLIT: tl.constexpr):
    """Return where a segment of a range ``bounds = (lo, a, b, hi)`` begins and ends."""
    lo, a, b, hi = bounds
    if not SPLIT:
        return lo, hi
    elif segment == 0:
        return lo, tl.minimum(a, hi)
    elif segment == 1:
        return a, b
    else:
        return b, hi


@triton.jit
def sees_few_keys(problem, row, BM: tl.constexpr):
    """Return whether one of the rows ``[row, row + BM)`` sees at most MAX_FEW_KEYS keys.

    If one does, then so does the first or the last of them.
    """
    first = row
    last = tl.minimum(row + BM, problem.NQ) - 1
    keys_of_first = problem.NK
    keys_of_last = problem.NK
    if problem.right is not None:
        keys_of_first = tl.minimum(keys_of_first, first + problem.right + 1)
        keys_of_last = tl.minimum(keys_of_last, last + problem.right + 1)
    if problem.left is not None:
        keys_of_first -= tl.maximum(first - problem.left, 0)
        keys_of_last -= tl.maximum(last - problem.left, 0)
    return tl.minimum(keys_of_first, keys_of_last) <= MAX_FEW_KEYS


@triton.jit
def load_row_value(at, head_index, i, NQ, OTHER: tl.constexpr):
    """Load one number for each row from a contiguous ``[heads, NQ]``; OTHER past the last row."""
    return tl.load(at + head_index * NQ + i, mask=i < NQ, other=OTHER)


@triton.jit
def load_lse(at, head_index, i, NQ, FOLD_SCALE: tl.constexpr):
    """Load the lse as a shift of :func:`exponent`: 0 for rows without keys; +inf past the last row: P is 0 there."""
    lse = load_row_value(at, head_index, i, NQ, float("inf"))
    lse = tl.where(lse == float("-inf"), 0.0, lse)
    return lse if FOLD_SCALE else lse * LOG2E


@triton.jit
def lse_is_imprecise(lse):
    """Return whether some lse from :func:`load_lse` is so large that ``exp(scores - lse)`` loses digits."""
    size = tl.abs(lse)
    return tl.max(tl.where(size < float("inf"), size, 0.0)) > IMPRECISE_LSE


@triton.jit
def minus_lse_bar(at, lse_at, head_index, i, NQ):
    """Return what a cotangent of the lse adds to the deltas: nothing for rows without keys, whose lse is constant."""
    delta = tl.zeros(i.shape, tl.float32)
    if at is not None:
        lse = load_row_value(lse_at, head_index, i, NQ, 0.0)
        delta = tl.where(lse == float("-inf"), 0.0, -load_row_value(at, head_index, i, NQ, 0.0))
    return delta


@triton.jit
def deltas(e, e_t, o, o_t, JVP: tl.constexpr):
    """Return ``rowsum(out_bar * out)`` and, with JVP, its tangent."""
    e = e.to(tl.float32)
    delta = tl.sum(e * o.to(tl.float32), 1)
    delta_t = delta
    if JVP:
        delta_t = tl.sum(e * o_t.to(tl.float32), 1)
        if e_t is not None:
            delta_t += tl.sum(e_t.to(tl.float32) * o.to(tl.float32), 1)
    return delta, delta_t
