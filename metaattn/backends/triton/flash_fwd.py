"""F, T and both at once: one walk over the keys for each block of rows.

Read beside ``docs/mathematics.md``. With VALUE the softmax is online (Milakov and Gimelshein 2018, arXiv
1805.02867); without, ``out`` and ``lse`` are given and only their tangents are computed.
"""

import triton
import triton.language as tl

from .tile_ops import (
    LN2,
    LOG2E,
    batch_of,
    held,
    hide,
    kept,
    key_head,
    key_range,
    load_key,
    load_lse,
    load_plane,
    load_query,
    locate,
    part_of,
    product,
    product_of,
    rounded,
    row_block,
    schedule,
    sees_few,
    store,
)


@triton.jit
def scores(
    q,
    q_t,
    k,
    k_t,
    x_t,
    problem,
    bias_at,
    bias_t_at,
    mask_at,
    i,
    j,
    TANGENT: tl.constexpr,
    FOLD: tl.constexpr,
    EDGE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Scores of one tile, and their tangent."""
    kt = tl.trans(k)
    s = product(q, kt, None, PRECISION)
    s_t = s
    if TANGENT:
        s_t = tl.zeros_like(s)
        if q_t is not None:
            s_t = product(q_t, kt, s_t, PRECISION)
        if k_t is not None:
            s_t = product(q, tl.trans(k_t), s_t, PRECISION)
        s_t = s_t * problem.scale
        if x_t.bias.ptr is not None:
            s_t += load_plane(x_t.bias, bias_t_at, i, j, problem.NQ, problem.NK).to(tl.float32)
    return hide(s, problem, bias_at, mask_at, i, j, FOLD, EDGE), s_t


@triton.jit
def values(
    x,  # query, key, value
    x_t,  # their tangents; a part may be absent
    problem,
    out,  # View; written with VALUE, else read
    lse,  # [L, NQ] contiguous; likewise
    out_t,  # View, written
    lse_t,
    D: tl.constexpr,
    DV: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    VALUE: tl.constexpr,
    TANGENT: tl.constexpr,
    FOLD: tl.constexpr,
    FEW: tl.constexpr,
    EXACT: tl.constexpr,
    SPLIT: tl.constexpr,
    HOLD: tl.constexpr,
    EVEN_M: tl.constexpr,
    EVEN_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Rows ``[row, row + BM)`` of one query head.

    FEW: some rows of the problem see few keys. What rounding takes from their ``P s.`` would show beside ``P (s. -
    mu)``, so that a first walk over the keys finds mu.
    """
    NQ = problem.NQ
    blocks = tl.cdiv(NQ, BM)
    block, flat = schedule(blocks, problem.LANES, problem.WAVE)
    row = row_block(block, blocks, FEW) * BM
    where = batch_of(flat, problem.BATCH1, problem.HEADS)
    shared = key_head(where, problem)
    r = tl.arange(0, BM)
    c = tl.arange(0, BN)
    d = tl.arange(0, D)
    dv = tl.arange(0, DV)
    i = row + r
    row_ok = i < NQ

    q = load_query(x.query, where, problem, row, r, d, EVEN_M)
    dtype = q.dtype
    q = held(q, HOLD)
    q_t = held(load_query(x_t.query, where, problem, row, r, d, EVEN_M), HOLD)
    bias_at = locate(problem.bias, where) if problem.bias.ptr is not None else None
    mask_at = locate(problem.mask, where) if problem.mask.ptr is not None else None
    bias_t_at = locate(x_t.bias, where) if x_t.bias.ptr is not None else None
    if TANGENT:
        acc_t = tl.zeros([BM, DV], tl.float32)
        mu = tl.zeros([BM], tl.float32)
    if problem.seeds is not None:
        seed = tl.load(problem.seeds + flat)
    factor = 1.0 if FOLD else problem.scale * LOG2E
    if VALUE:
        acc = tl.zeros([BM, DV], tl.float32)
        total = tl.zeros([BM], tl.float32)
        peak = tl.full([BM], float("-inf"), tl.float32)
    else:
        peak = load_lse(lse, flat, i, NQ)

    walk = key_range(problem, row, BM, BN)
    if TANGENT:
        centre = tl.zeros([BM], tl.float32)  # what is taken from s.: mu, or nothing
        if FEW:
            if sees_few(problem, row, BM):
                weight = tl.zeros([BM], tl.float32)
                for n in tl.range(walk[0], walk[3], BN, num_stages=1):
                    k = load_key(x.key, shared, problem, n, c, d, False)
                    k_t = load_key(x_t.key, shared, problem, n, c, d, False)
                    s, s_t = scores(
                        q, q_t, k, k_t, x_t, problem, bias_at, bias_t_at, mask_at,
                        i[:, None], (n + c)[None, :], TANGENT, FOLD, True, PRECISION,
                    )  # fmt: skip
                    new = peak
                    if VALUE:
                        new = tl.maximum(peak, tl.max(s, 1) * factor)
                    base = tl.where(new == float("-inf"), 0.0, new)
                    p = tl.exp2(s * factor - base[:, None])
                    if VALUE:
                        decay = tl.exp2(peak - base)
                        weight = weight * decay
                        centre = centre * decay
                        peak = new
                    weight += tl.sum(p, 1)
                    centre += tl.sum(p * s_t, 1)
                centre = centre / tl.where(weight == 0.0, 1.0, weight)
                if VALUE:
                    peak = tl.full([BM], float("-inf"), tl.float32)

    for segment in tl.static_range(3):
        if (
            (segment == 1 and SPLIT)
            or (segment == 0 and SPLIT and problem.left is not None)
            or (segment == 2 and (not SPLIT or not EVEN_N or problem.right is not None))
        ):
            first, last = part_of(walk, segment, SPLIT)
            even = EVEN_N or segment == 1
            for n in range(first, last, BN):
                j = n + c
                k = load_key(x.key, shared, problem, n, c, d, even)
                k_t = load_key(x_t.key, shared, problem, n, c, d, even)
                s, s_t = scores(
                    q, q_t, k, k_t, x_t, problem, bias_at, bias_t_at, mask_at,
                    i[:, None], j[None, :], TANGENT, FOLD, segment != 1, PRECISION,
                )  # fmt: skip
                if VALUE:
                    new = tl.maximum(peak, tl.max(s, 1) * factor)
                    # A row that has seen no key yet: subtract 0, not -inf.
                    base = tl.where(new == float("-inf"), 0.0, new)
                    p = tl.exp2(s * factor - base[:, None])
                    decay = tl.exp2(peak - base)
                    peak = new
                    total = total * decay + tl.sum(p, 1)
                    acc = acc * decay[:, None]
                else:
                    p = tl.exp2(s * factor - peak[:, None])
                if TANGENT:
                    # Unnormalised: P (s. - mu) V = P (s. - c) V - (mu - c) P V for any c; P V is at hand at the end.
                    p_t = p * (s_t - centre[:, None])
                    if VALUE:
                        mu = mu * decay
                        acc_t = acc_t * decay[:, None]
                    mu += tl.sum(p_t, 1)
                if problem.seeds is not None:
                    keep = kept(seed, problem.threshold, i[:, None], j[None, :])
                    p = tl.where(keep, p, 0.0)
                    if TANGENT:
                        p_t = tl.where(keep, p_t, 0.0)
                v = load_key(x.value, shared, problem, n, c, dv, even)
                pz = rounded(p, dtype, EXACT)
                if VALUE:
                    acc = product_of(pz, v, acc, EXACT, PRECISION)
                if TANGENT:
                    acc_t = product_of(rounded(p_t, dtype, EXACT), v, acc_t, EXACT, PRECISION)
                    v_t = load_key(x_t.value, shared, problem, n, c, dv, even)
                    if v_t is not None:
                        acc_t = product_of(pz, v_t, acc_t, EXACT, PRECISION)

    if VALUE:
        empty = total == 0.0  # a row without keys
        total = tl.where(empty, 1.0, total)
        inverse = 1.0 / total
        o = acc * (inverse * problem.boost)[:, None]
        store(out, out.ptr, o, where, flat, problem, row, r, dv, NQ, DV)
        natural = tl.where(empty, float("-inf"), (peak + tl.log2(total)) * LN2)
        tl.store(lse + flat * NQ + i, natural, mask=row_ok)
        if TANGENT:
            mu = mu * inverse
            acc_t = acc_t * (inverse * problem.boost)[:, None]
    else:
        o = load_query(out, where, problem, row, r, dv, EVEN_M).to(tl.float32)
        acc_t = acc_t * problem.boost
    if TANGENT:
        store(out_t, out_t.ptr, acc_t - mu[:, None] * o, where, flat, problem, row, r, dv, NQ, DV)
        tl.store(lse_t + flat * NQ + i, mu + centre, mask=row_ok)
