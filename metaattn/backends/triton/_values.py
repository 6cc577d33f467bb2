"""F, T and both at once: one walk over the keys for each block of rows.

Read beside ``docs/mathematics.md``. With VALUE the softmax is online (Milakov and Gimelshein 2018, arXiv
1805.02867); without, ``out`` and ``lse`` are given and only their tangents are computed.
"""

import triton
import triton.language as tl

from ._scores import (
    LN2,
    LOG2E,
    batch_of,
    hide,
    kept,
    key_range,
    load_plane,
    load_rows,
    locate,
    locate_key,
    schedule,
    store_rows,
    stride_of,
)


@triton.jit
def values(
    x,  # query, key, value
    x_t,  # their tangents; a part may be absent
    problem,
    out,  # View; written with VALUE, else read
    lse,  # [L, NQ] contiguous; likewise
    out_t,  # [L, NQ, DV] contiguous
    lse_t,
    D: tl.constexpr,
    DV: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    VALUE: tl.constexpr,
    TANGENT: tl.constexpr,
    FOLD: tl.constexpr,
    EVEN_M: tl.constexpr,
    EVEN_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Rows ``[row, row + BM)`` of one query head."""
    NQ = problem.NQ
    NK = problem.NK
    blocks = tl.cdiv(NQ, BM)
    block, flat = schedule(blocks, problem.LANES, problem.WAVE)
    row = (blocks - 1 - block) * BM  # under a causal mask the last rows have the most keys
    where = batch_of(flat, problem.BATCH1, problem.HEADS)
    r = tl.arange(0, BM)
    c = tl.arange(0, BN)
    d = tl.arange(0, D)
    dv = tl.arange(0, DV)
    i = row + r
    row_ok = i < NQ

    q = load_rows(locate(x.query, where), stride_of(x.query, problem), row, r, d, NQ, EVEN_M)
    k_at = locate_key(x.key, where, problem.GROUP)
    v_at = locate_key(x.value, where, problem.GROUP)
    dtype = q.dtype
    bias_at = locate(problem.bias, where) if problem.bias.ptr is not None else None
    mask_at = locate(problem.mask, where) if problem.mask.ptr is not None else None
    if TANGENT:
        if x_t.query.ptr is not None:
            q_t = load_rows(locate(x_t.query, where), stride_of(x_t.query, problem), row, r, d, NQ, EVEN_M)
        k_t_at = locate_key(x_t.key, where, problem.GROUP) if x_t.key.ptr is not None else None
        v_t_at = locate_key(x_t.value, where, problem.GROUP) if x_t.value.ptr is not None else None
        bias_t_at = locate(x_t.bias, where) if x_t.bias.ptr is not None else None
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
        peak = tl.load(lse + flat * NQ + i, mask=row_ok, other=0.0) * LOG2E
        peak = tl.where(peak == float("-inf"), 0.0, peak)

    lo, a, b, hi = key_range(problem, row, BM, BN)
    for segment in tl.static_range(3):
        if (
            segment == 1
            or (segment == 0 and problem.left is not None)
            or (segment == 2 and (not EVEN_N or problem.right is not None))
        ):
            first, last = (lo, tl.minimum(a, hi)) if segment == 0 else (a, b) if segment == 1 else (b, hi)
            for n in range(first, last, BN):
                j = n + c
                k = load_rows(k_at, stride_of(x.key, problem), n, c, d, NK, EVEN_N or segment == 1)
                s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
                if TANGENT:
                    s_t = tl.zeros([BM, BN], tl.float32)
                    if x_t.query.ptr is not None:
                        s_t = tl.dot(q_t, tl.trans(k), s_t, input_precision=PRECISION)
                    if x_t.key.ptr is not None:
                        k_t = load_rows(k_t_at, stride_of(x_t.key, problem), n, c, d, NK, EVEN_N or segment == 1)
                        s_t = tl.dot(q, tl.trans(k_t), s_t, input_precision=PRECISION)
                    s_t = s_t * problem.scale
                    if x_t.bias.ptr is not None:
                        s_t += load_plane(x_t.bias, bias_t_at, i[:, None], j[None, :], NQ, NK).to(tl.float32)
                s = hide(s, problem, bias_at, mask_at, i[:, None], j[None, :], FOLD, segment != 1)
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
                    # Unnormalised and not centred: P (s. - mu) V = P s. V - mu P V, and P V is at hand at the end.
                    p_t = p * s_t
                    if VALUE:
                        mu = mu * decay
                        acc_t = acc_t * decay[:, None]
                    mu += tl.sum(p_t, 1)
                if problem.seeds is not None:
                    keep = kept(seed, problem.threshold, i[:, None], j[None, :])
                    p = tl.where(keep, p, 0.0)
                    if TANGENT:
                        p_t = tl.where(keep, p_t, 0.0)
                v = load_rows(v_at, stride_of(x.value, problem), n, c, dv, NK, EVEN_N or segment == 1)
                if VALUE:
                    acc = tl.dot(p.to(dtype), v, acc, input_precision=PRECISION)
                if TANGENT:
                    acc_t = tl.dot(p_t.to(dtype), v, acc_t, input_precision=PRECISION)
                    if x_t.value.ptr is not None:
                        v_t = load_rows(v_t_at, stride_of(x_t.value, problem), n, c, dv, NK, EVEN_N or segment == 1)
                        acc_t = tl.dot(p.to(dtype), v_t, acc_t, input_precision=PRECISION)

    if VALUE:
        empty = total == 0.0  # a row without keys
        total = tl.where(empty, 1.0, total)
        inverse = 1.0 / total
        o = acc * (inverse * problem.boost)[:, None]
        store_rows(out.ptr + flat * NQ * DV, o, row, r, dv, NQ, DV)
        natural = tl.where(empty, float("-inf"), (peak + tl.log2(total)) * LN2)
        tl.store(lse + flat * NQ + i, natural, mask=row_ok)
        if TANGENT:
            mu = mu * inverse
            acc_t = acc_t * (inverse * problem.boost)[:, None]
    else:
        o = load_rows(locate(out, where), stride_of(out, problem), row, r, dv, NQ, EVEN_M).to(tl.float32)
        acc_t = acc_t * problem.boost
    if TANGENT:
        store_rows(out_t + flat * NQ * DV, acc_t - mu[:, None] * o, row, r, dv, NQ, DV)
        tl.store(lse_t + flat * NQ + i, mu, mask=row_ok)
