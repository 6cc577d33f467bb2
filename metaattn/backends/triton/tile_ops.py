"""Scores, mask, window, bias and dropout of one tile, on the device: the one home of each for every kernel.

A tile is ``[rows, keys]`` in the kernels that walk over keys and ``[keys, rows]`` in those that walk over
rows. All here works for both: ``i`` (row numbers) and ``j`` (key numbers) come shaped to broadcast to the
tile. Scores are in base 2: ``exp2(s * c - lse * LOG2E)`` are the probabilities.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
MANY = tl.constexpr(64)  # keys of a row, above which what it loses to rounding averages out


@triton.jit
def nearest(x):
    """float32 rounded to tf32, as cuBLAS does it: the tensor cores would cut the rest off, 3 times the error."""
    if INTERPRETED:
        bits = x.to(tl.int32, bitcast=True)
        rounded = ((bits + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
        return tl.where(x == x, rounded, x)  # in a NaN the carry would reach the sign
    else:
        # One instruction: by bits there are four, and a predicate for each element. A thread kept 128 of these, and
        # ptxas made wrong code of it (docs/benchmarks).
        asm: tl.constexpr = "cvt.rna.tf32.f32 $0, $1;"
        bits = tl.inline_asm_elementwise(asm, "=r,f", [x], dtype=tl.int32, is_pure=True, pack=1)
        return bits.to(tl.float32, bitcast=True)


@triton.jit
def product(a, b, acc, PRECISION: tl.constexpr):
    """``a b + acc`` on the tensor cores, in float32; ``acc`` may be ``None``."""
    if PRECISION == "tf32" and a.dtype == tl.float32:
        # Here and not where they are loaded, once: that is slower by a tenth (T, F with T, S at head size 128).
        a = nearest(a)
        b = nearest(b)
    if acc is None:
        return tl.dot(a, b, input_precision=PRECISION)
    else:
        return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def rounded(p, dtype: tl.constexpr, EXACT: tl.constexpr):
    """``p``, in float32, as a factor of products: rounded; and with EXACT, in 16 bits, what rounding took from it.

    Where a result sums over few rows that shows: it does not average out.
    """
    high = p.to(dtype)
    low = high
    if EXACT and dtype != tl.float32:
        low = (p - high.to(tl.float32)).to(dtype)
    return high, low


@triton.jit
def product_of(p, b, acc, EXACT: tl.constexpr, PRECISION: tl.constexpr):
    """``p b + acc`` of what :func:`rounded` made."""
    high, low = p
    acc = product(high, b, acc, PRECISION)
    if EXACT and b.dtype != tl.float32:
        acc = product(low, b, acc, PRECISION)
    return acc


@triton.jit
def transposed(p):
    """The transpose of what :func:`rounded` made."""
    high, low = p
    return tl.trans(high), tl.trans(low)


@triton.jit
def held(x, HOLD: tl.constexpr):
    """With HOLD ``x`` times the identity, exact in 16 bits: what a product gave, the next can read from registers.

    Reading it from shared memory for each product keeps that 70% busy on an H100, and the tensor cores at 43 to 52%.
    """
    if x is None:
        return  # noqa: RET502
    elif HOLD:
        c = tl.arange(0, x.shape[1])
        return tl.dot(x, (c[:, None] == c[None, :]).to(x.dtype)).to(x.dtype)
    else:
        return x


@triton.jit
def locate(x, where):
    """Where the matrix of batch ``(b0, b1)`` and head begins in a view."""
    return locate_like(x.ptr, x, where)


@triton.jit
def locate_like(at, x, where):
    """The same in a tensor that begins ``at`` and lies like a view."""
    b0, b1, head = where
    return at + b0 * x.batch0 + b1 * x.batch1 + head * x.head


@triton.jit
def stride_of(x, problem):
    """The row stride of a view: its own, or the common one, whose offsets are then computed once for all."""
    if x.row is None:
        return problem.ROW
    else:
        return x.row


@triton.jit
def batch_of(index, BATCH1, HEADS):
    """The batch ``(b0, b1)`` and head of a flat index, in int64: offsets pass 2^31."""
    index = index.to(tl.int64)
    head = index % HEADS
    b = index // HEADS
    return b // BATCH1, b % BATCH1, head


@triton.jit
def key_head(where, problem):
    """The key head that a query head shares, computed once: its division would stay in a loop."""
    b0, b1, head = where
    return b0, b1, head // problem.GROUP


@triton.jit
def schedule(BLOCKS, LANES, WAVE):
    """Which block of which lane (batch and head) a program has: first blocks of WAVE lanes, then their second ones.

    With the heaviest blocks first no multiprocessor is left with a long one at the end, and the lanes of a wave are
    few enough that their keys stay in the L2 cache.
    """
    pid = tl.program_id(0)
    first = pid // (WAVE * BLOCKS) * WAVE
    lanes = tl.minimum(WAVE, LANES - first)
    rest = pid % (WAVE * BLOCKS)
    return rest // lanes, (first + rest % lanes).to(tl.int64)


@triton.jit
def row_block(block, blocks, FEW: tl.constexpr):
    """Which block of rows a program has: under a causal mask the last rows have the most keys, and come first.

    With FEW the first one is before them: under a causal mask it sees few keys, walks twice, and would end alone.
    """
    if FEW:
        return (blocks - block) % blocks
    else:
        return blocks - 1 - block


@triton.jit
def load_rows(at, stride, start, r, d, limit, EVEN: tl.constexpr):
    """Rows ``start + r`` of a matrix; zeros past row ``limit``, unless EVEN says that there are none."""
    start = tl.cast(start, tl.int64)
    p = at + start * stride + r[:, None] * stride + d[None, :]
    return tl.load(p) if EVEN else tl.load(p, mask=(r < limit - start)[:, None], other=0.0)


@triton.jit
def load_query(x, where, problem, start, r, d, EVEN: tl.constexpr):
    """Rows of what belongs to query heads: the query, a cotangent, a value; ``None`` of what is absent."""
    if x.ptr is None:
        return  # noqa: RET502 (of None itself Triton 3.6 makes a tensor)
    else:
        return load_rows(locate(x, where), stride_of(x, problem), start, r, d, problem.NQ, EVEN)


@triton.jit
def load_key(x, where, problem, start, r, d, EVEN: tl.constexpr):
    """The same of what belongs to key heads, each shared by a group of query heads: the key, the value."""
    if x.ptr is None:
        return  # noqa: RET502
    else:
        return load_rows(locate(x, where), stride_of(x, problem), start, r, d, problem.NK, EVEN)


@triton.jit
def store_rows(at, stride, x, start, r, d, limit):
    """The same rows, written."""
    start = tl.cast(start, tl.int64)
    p = at + start * stride + r[:, None] * stride + d[None, :]
    tl.store(p, x.to(at.dtype.element_ty), mask=(r < limit - start)[:, None])


@triton.jit
def store(view, at, x, where, flat, problem, start, r, d, limit, SIZE: tl.constexpr):
    """Rows of what lies ``at`` like a view: that has strides, or is contiguous, with ``limit`` rows of SIZE columns."""
    if view.head is None:
        store_rows(at + flat * limit * SIZE, SIZE, x, start, r, d, limit)
    else:
        store_rows(locate_like(at, view, where), stride_of(view, problem), x, start, r, d, limit)


@triton.jit
def load_plane(x, at, i, j, NQ, NK):
    """A tile of a mask, a bias or its tangent; a stride of ``None`` is a broadcast dimension, read once."""
    if x.row is None and x.col is None:
        return tl.load(at)
    elif x.row is None:
        return tl.load(at + j.to(tl.int64) * x.col, mask=j < NK, other=0)
    elif x.col is None:
        return tl.load(at + i.to(tl.int64) * x.row, mask=i < NQ, other=0)
    else:
        return tl.load(at + i.to(tl.int64) * x.row + j.to(tl.int64) * x.col, mask=(i < NQ) & (j < NK), other=0)


@triton.jit
def hide(s, problem, bias_at, mask_at, i, j, FOLD: tl.constexpr, EDGE: tl.constexpr):
    """Scores with bias, -inf where hidden. With FOLD they are scaled here, else by their user.

    EDGE: the tile may reach past the band or the last key.
    """
    if FOLD:
        s = s * (problem.scale * LOG2E)
    if problem.bias.ptr is not None:
        s += load_plane(problem.bias, bias_at, i, j, problem.NQ, problem.NK).to(tl.float32) * LOG2E
    if problem.mask.ptr is not None:
        s += load_plane(problem.mask, mask_at, i, j, problem.NQ, problem.NK).to(tl.float32)
    if EDGE:
        shown = j < problem.NK
        if problem.right is not None:
            shown = shown & (j - i <= problem.right)
        if problem.left is not None:
            shown = shown & (i - j <= problem.left)
        s = tl.where(shown, s, float("-inf"))
    return s


@triton.jit
def mix(x):
    """The 32-bit finaliser of MurmurHash3 (Appleby)."""
    x = (x ^ (x >> 16)) * 0x85EBCA6B
    x = (x ^ (x >> 13)) * 0xC2B2AE35
    return x ^ (x >> 16)


@triton.jit
def kept(seed, threshold, i, j):
    """Which elements dropout keeps: the function of seed, row and column of ``backends/_scores.py``, bit for bit."""
    low = (seed & 0xFFFFFFFF).to(tl.uint32)
    high = ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)
    row = mix((i.to(tl.uint32) * 0x9E3779B9) ^ low)
    bits = mix(mix(j.to(tl.uint32) * 0x9E3779B9 + row) ^ high)
    return bits.to(tl.int64) >= threshold


@triton.jit
def key_range(problem, row, BM: tl.constexpr, BN: tl.constexpr):
    """Keys that rows ``[row, row + BM)`` see: ``lo <= a <= b <= hi``, with no edge in tiles between ``a`` and ``b``."""
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
def sees_few(problem, row, BM: tl.constexpr):
    """Whether one of the rows ``[row, row + BM)`` sees no more than MANY keys: the first or the last one then does."""
    first = row
    last = tl.minimum(row + BM, problem.NQ) - 1
    fewest_first = problem.NK
    fewest_last = problem.NK
    if problem.right is not None:
        fewest_first = tl.minimum(fewest_first, first + problem.right + 1)
        fewest_last = tl.minimum(fewest_last, last + problem.right + 1)
    if problem.left is not None:
        fewest_first -= tl.maximum(first - problem.left, 0)
        fewest_last -= tl.maximum(last - problem.left, 0)
    return tl.minimum(fewest_first, fewest_last) <= MANY


@triton.jit
def row_range(problem, key, BM: tl.constexpr, BN: tl.constexpr):
    """Rows that see keys ``[key, key + BN)``: the same, for tiles of BM rows."""
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


@triton.jit
def part_of(walk, segment: tl.constexpr, SPLIT: tl.constexpr):
    """Where a segment of a walk ``lo <= a <= b <= hi`` begins and ends: before, within, or past the band's inside."""
    lo, a, b, hi = walk
    if not SPLIT:
        return lo, hi
    elif segment == 0:
        return lo, tl.minimum(a, hi)
    elif segment == 1:
        return a, b
    else:
        return b, hi


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
