"""The kernel of F, of T, and of both at once: one loop over the keys for each block of rows.

Read this with ``docs/mathematics.md``. FORWARD and JVP say which of the two are computed. With FORWARD the softmax is
online (Milakov and Gimelshein 2018, arXiv 1805.02867). Without it ``out`` and ``lse`` are given, and only their
tangents are computed.
"""

import triton
import triton.language as tl

from .tile_ops import (
    LN2,
    LOG2E,
    HeadTerms,
    bias_and_mask,
    dropout_keeps,
    exponent,
    keep_in_registers,
    key_head,
    key_range,
    load_key_rows,
    load_lse,
    load_query_rows,
    load_score_tile,
    load_seed,
    locate_optional,
    product,
    product_with_rest,
    reversed_row_block,
    round_with_rest,
    schedule,
    sees_few_keys,
    segment_bounds,
    segment_exists,
    shift_units,
    split_head_index,
    store,
)


@triton.jit
def scores(
    q,
    q_t,
    k,
    k_t,
    terms,
    x_t,
    problem,
    i,
    j,
    JVP: tl.constexpr,
    FOLD_SCALE: tl.constexpr,
    EDGE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Return the scores of one tile and, with JVP, their tangent."""
    kt = tl.trans(k)
    s = product(q, kt, None, PRECISION)
    s_t = s
    if JVP:
        s_t = tl.zeros_like(s)
        if q_t is not None:
            s_t = product(q_t, kt, s_t, PRECISION)
        if k_t is not None:
            s_t = product(q, tl.trans(k_t), s_t, PRECISION)
        s_t = s_t * problem.scale
        if x_t.bias.ptr is not None:
            s_t += load_score_tile(x_t.bias, terms.bias_t, i, j, problem.NQ, problem.NK).to(tl.float32)
    return bias_and_mask(s, problem, terms, i, j, FOLD_SCALE, EDGE), s_t


@triton.jit
def attention_forward(
    x,  # Inputs: query, key, value
    x_t,  # Inputs: their tangents; each may be absent
    problem,  # KernelProblem
    out,  # View; written with FORWARD, otherwise read
    lse,  # [heads, NQ] contiguous; written with FORWARD, otherwise read
    out_t,  # View, written
    lse_t,  # [heads, NQ] contiguous, written
    D: tl.constexpr,
    DV: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    FORWARD: tl.constexpr,
    JVP: tl.constexpr,
    FOLD_SCALE: tl.constexpr,
    FEW_KEYS: tl.constexpr,
    COMPENSATE: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    SPLIT: tl.constexpr,
    KEEP_IN_REGISTERS: tl.constexpr,
    EVEN_M: tl.constexpr,
    EVEN_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Compute rows ``[row, row + BM)`` of one query head.

    RENORMALIZE: without FORWARD, correct the effect of the rounded lse on P, so that its rows sum to one.

    FEW_KEYS: some rows see few keys. There ``P (s. - mu)`` is small compared with ``P s.``, so that the rounding of
    ``P s.`` to 16 bits would be a large error. A first loop over the keys of such rows therefore computes mu.
    """
    NQ = problem.NQ
    blocks = tl.cdiv(NQ, BM)
    block, head_index = schedule(blocks, problem.TOTAL_HEADS, problem.L2_GROUP)
    row = reversed_row_block(block, blocks, FEW_KEYS) * BM
    where = split_head_index(head_index, problem.BATCH1, problem.HEADS)
    kv_where = key_head(where, problem)
    r = tl.arange(0, BM)
    c = tl.arange(0, BN)
    d = tl.arange(0, D)
    dv = tl.arange(0, DV)
    i = row + r
    row_ok = i < NQ

    q = load_query_rows(x.query, where, problem, row, r, d, EVEN_M)
    dtype = q.dtype
    q = keep_in_registers(q, KEEP_IN_REGISTERS)
    q_t = keep_in_registers(load_query_rows(x_t.query, where, problem, row, r, d, EVEN_M), KEEP_IN_REGISTERS)
    terms = HeadTerms(
        locate_optional(problem.bias, where),
        locate_optional(x_t.bias, where),
        locate_optional(problem.mask, where),
        load_seed(problem, head_index),
    )
    if JVP:
        acc_t = tl.zeros([BM, DV], tl.float32)
        mu = tl.zeros([BM], tl.float32)
    factor = shift_units(problem, FOLD_SCALE)
    total = tl.zeros([BM], tl.float32)
    if FORWARD:
        acc = tl.zeros([BM, DV], tl.float32)
        peak = tl.full([BM], float("-inf"), tl.float32)
    else:
        peak = load_lse(lse, head_index, i, NQ, FOLD_SCALE)

    bounds = key_range(problem, row, BM, BN)
    if JVP:
        centre = tl.zeros([BM], tl.float32)  # subtracted from s.: mu, or zero
        if FEW_KEYS:
            if sees_few_keys(problem, row, BM):
                weight = tl.zeros([BM], tl.float32)
                for n in tl.range(bounds[0], bounds[3], BN, num_stages=1):
                    k = load_key_rows(x.key, kv_where, problem, n, c, d, False)
                    k_t = load_key_rows(x_t.key, kv_where, problem, n, c, d, False)
                    s, s_t = scores(
                        q, q_t, k, k_t, terms, x_t, problem,
                        i[:, None], (n + c)[None, :], JVP, FOLD_SCALE, True, PRECISION,
                    )  # fmt: skip
                    new = peak
                    if FORWARD:
                        new = tl.maximum(peak, tl.max(s, 1) * factor)
                    base = tl.where(new == float("-inf"), 0.0, new)
                    p = tl.exp2(exponent(s, base[:, None], problem, FOLD_SCALE))
                    if FORWARD:
                        decay = tl.exp2((peak - base) * (LOG2E if FOLD_SCALE else 1.0))
                        weight = weight * decay
                        centre = centre * decay
                        peak = new
                    weight += tl.sum(p, 1)
                    centre += tl.sum(p * s_t, 1)
                centre = centre / tl.where(weight == 0.0, 1.0, weight)
                if FORWARD:
                    peak = tl.full([BM], float("-inf"), tl.float32)

    for segment in tl.static_range(3):
        if segment_exists(segment, problem.left is not None, not EVEN_N or problem.right is not None, SPLIT):
            first, last = segment_bounds(bounds, segment, SPLIT)
            even = EVEN_N or segment == 1
            for n in range(first, last, BN):
                j = n + c
                k = load_key_rows(x.key, kv_where, problem, n, c, d, even)
                k_t = load_key_rows(x_t.key, kv_where, problem, n, c, d, even)
                s, s_t = scores(
                    q, q_t, k, k_t, terms, x_t, problem,
                    i[:, None], j[None, :], JVP, FOLD_SCALE, segment != 1, PRECISION,
                )  # fmt: skip
                if FORWARD:
                    new = tl.maximum(peak, tl.max(s, 1) * factor)
                    # For a row that has seen no key yet subtract 0, not -inf.
                    base = tl.where(new == float("-inf"), 0.0, new)
                    p = tl.exp2(exponent(s, base[:, None], problem, FOLD_SCALE))
                    decay = tl.exp2((peak - base) * (LOG2E if FOLD_SCALE else 1.0))
                    peak = new
                    total = total * decay + tl.sum(p, 1)
                    acc = acc * decay[:, None]
                else:
                    p = tl.exp2(exponent(s, peak[:, None], problem, FOLD_SCALE))
                    if RENORMALIZE:
                        total += tl.sum(p, 1)
                if JVP:
                    # Not yet normalised. For any c, P (s. - mu) V = P (s. - c) V - (mu - c) P V, and P V is available
                    # at the end.
                    p_t = p * (s_t - centre[:, None])
                    if FORWARD:
                        mu = mu * decay
                        acc_t = acc_t * decay[:, None]
                    mu += tl.sum(p_t, 1)
                if problem.seeds is not None:
                    keep = dropout_keeps(terms.seed, problem.dropout_threshold, i[:, None], j[None, :])
                    p = tl.where(keep, p, 0.0)
                    if JVP:
                        p_t = tl.where(keep, p_t, 0.0)
                v = load_key_rows(x.value, kv_where, problem, n, c, dv, even)
                pz = round_with_rest(p, dtype, COMPENSATE)
                if FORWARD:
                    acc = product_with_rest(pz, v, acc, COMPENSATE, PRECISION)
                if JVP:
                    pz_t = round_with_rest(p_t, dtype, COMPENSATE)
                    acc_t = product_with_rest(pz_t, v, acc_t, COMPENSATE, PRECISION)
                    v_t = load_key_rows(x_t.value, kv_where, problem, n, c, dv, even)
                    if v_t is not None:
                        acc_t = product_with_rest(pz, v_t, acc_t, COMPENSATE, PRECISION)

    if FORWARD:
        empty = total == 0.0  # a row without keys
        total = tl.where(empty, 1.0, total)
        inverse = 1.0 / total
        o = acc * (inverse * problem.dropout_scale)[:, None]
        store(out, out.ptr, o, where, head_index, problem, row, r, dv, NQ, DV)
        natural = peak + tl.log2(total) * LN2 if FOLD_SCALE else (peak + tl.log2(total)) * LN2
        natural = tl.where(empty, float("-inf"), natural)
        tl.store(lse + head_index * NQ + i, natural, mask=row_ok)
        if JVP:
            mu = mu * inverse
            acc_t = acc_t * (inverse * problem.dropout_scale)[:, None]
    else:
        o = load_query_rows(out, where, problem, row, r, dv, EVEN_M).to(tl.float32)
        inverse = 1.0 / tl.where(total == 0.0, 1.0, total)  # one without RENORMALIZE
        mu = mu * inverse
        acc_t = acc_t * (inverse * problem.dropout_scale)[:, None]
    if JVP:
        store(out_t, out_t.ptr, acc_t - mu[:, None] * o, where, head_index, problem, row, r, dv, NQ, DV)
        tl.store(lse_t + head_index * NQ + i, mu + centre, mask=row_ok)
