"""B and S, the gradients and their derivative: by rows and by keys.

Read beside ``docs/mathematics.md``. The scores are computed anew in each pass, so that no result needs an
atomic addition. A tile is ``[rows, keys]`` in :func:`by_row` and ``[keys, rows]`` in :func:`by_key`; with
the roles of ``(query, out_bar)`` and ``(key, value)`` exchanged the formulas of both are the same:
:func:`products`, :func:`probabilities`, :func:`score_gradient`.
"""

import triton
import triton.language as tl

from .tile_ops import (
    LOG2E,
    batch_of,
    deltas,
    held,
    hide,
    kept,
    key_head,
    key_range,
    load_key,
    load_lse,
    load_plane,
    load_query,
    load_stat,
    locate,
    minus_lse_bar,
    part_of,
    product,
    product_of,
    rounded,
    row_block,
    row_range,
    schedule,
    sees_few,
    store,
    transposed,
)


@triton.jit
def products(a, a_t, e, e_t, b, b_t, f, f_t, PRECISION: tl.constexpr):
    """``a b^T`` and ``e f^T``, with their tangents: scores and P's cotangent, or their transposes."""
    bt = tl.trans(b)
    ft = tl.trans(f)
    s = product(a, bt, None, PRECISION)
    dp = product(e, ft, None, PRECISION)
    s_t = tl.zeros_like(s)
    dp_t = tl.zeros_like(s)
    if a_t is not None:
        s_t = product(a_t, bt, s_t, PRECISION)
    if b_t is not None:
        s_t = product(a, tl.trans(b_t), s_t, PRECISION)
    if e_t is not None:
        dp_t = product(e_t, ft, dp_t, PRECISION)
    if f_t is not None:
        dp_t = product(e, tl.trans(f_t), dp_t, PRECISION)
    return s, s_t, dp, dp_t


@triton.jit
def probabilities(
    s,
    s_t,
    dp,
    dp_t,
    lse,
    gain,
    mu,
    x_t,
    problem,
    bias_at,
    bias_t_at,
    mask_at,
    seed,
    i,
    j,
    SECOND: tl.constexpr,
    FOLD: tl.constexpr,
    EDGE: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """``P``, ``P Z`` and the cotangents ``dP`` of one tile from its products, then the tangents of all three.

    The ``P`` of a row sum to one but for the rounding of its lse: exactly with ``gain``; or with WHOLE, where the tile,
    ``[keys, rows]``, holds whole rows.
    """
    s = hide(s, problem, bias_at, mask_at, i, j, FOLD, EDGE)
    factor = 1.0 if FOLD else problem.scale * LOG2E
    p = tl.exp2(s * factor - lse)
    if gain is not None:
        p = p * gain
    if WHOLE:
        weight = tl.sum(p, 0)
        p = p / tl.where(weight == 0.0, 1.0, weight)[None, :]
    p_t = p
    if SECOND:
        s_t = s_t * problem.scale
        if x_t.bias.ptr is not None:
            s_t += load_plane(x_t.bias, bias_t_at, i, j, problem.NQ, problem.NK).to(tl.float32)
        p_t = p * (s_t - mu)
    pz = p
    pz_t = p_t
    if problem.seeds is not None:
        z = tl.where(kept(seed, problem.threshold, i, j), problem.boost, 0.0)
        dp = dp * z
        dp_t = dp_t * z
        pz = p * z
        pz_t = p_t * z
    return p, pz, dp, p_t, pz_t, dp_t


@triton.jit
def score_gradient(p, dp, p_t, dp_t, delta, delta_t, SECOND: tl.constexpr, ALONE: tl.constexpr):
    """``dS`` and its tangent.

    ALONE: the tile, ``[keys, rows]``, holds whole rows, so that ``rowsum(P dP)`` is summed here: exactly, where a
    delta from the rounded ``out`` is not.
    """
    if ALONE:
        delta += tl.sum(p * dp, 0)[None, :]
    dp = dp - delta
    ds = p * dp
    ds_t = ds
    if SECOND:
        if ALONE:
            # rowsum(P. dP + P dP.): with the centred dP in its first term, for the rows of P. sum to zero.
            delta_t += tl.sum(p_t * dp + p * dp_t, 0)[None, :]
        ds_t = p_t * dp + p * (dp_t - delta_t)
    return ds, ds_t


@triton.jit
def by_row(
    x,
    x_t,
    problem,
    w,  # cotangents, residuals and scratch
    grad_query,  # View, written
    first_query,  # what lies like it, or None: B's gradient, beside S's
    D: tl.constexpr,
    DV: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    SECOND: tl.constexpr,
    FOLD: tl.constexpr,
    FEW: tl.constexpr,
    EXACT: tl.constexpr,
    SPLIT: tl.constexpr,
    HOLD: tl.constexpr,
    EVEN_M: tl.constexpr,
    EVEN_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The gradient of rows ``[row, row + BM)`` of one query head; and their deltas, for :func:`by_key`.

    FEW: some rows of the problem see few keys. Rounding ``out`` to 16 bits takes most from their deltas, which are
    summed from the scores instead, in a walk over the keys of their own. EXACT: there are few rows, and all are taken
    for such; what the rounding of their lse makes of their ``P`` is set right.
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

    q = load_query(x.query, where, problem, row, r, d, EVEN_M)
    e = load_query(w.out, where, problem, row, r, dv, EVEN_M)
    o = load_query(w.out_value, where, problem, row, r, dv, EVEN_M)
    q_t = load_query(x_t.query, where, problem, row, r, d, EVEN_M)
    e_t = load_query(w.out_t, where, problem, row, r, dv, EVEN_M)
    o_t = load_query(w.out_value_t, where, problem, row, r, dv, EVEN_M)
    dtype = q.dtype
    q = held(q, HOLD)
    e = held(e, HOLD)
    q_t = held(q_t, HOLD)
    e_t = held(e_t, HOLD)
    lse = load_lse(w.lse_value, flat, i, NQ)[:, None]
    mu = load_stat(w.lse_value_t, flat, i, NQ, 0.0)[:, None] if SECOND else lse
    bias_at = locate(problem.bias, where) if problem.bias.ptr is not None else None
    mask_at = locate(problem.mask, where) if problem.mask.ptr is not None else None
    bias_t_at = locate(x_t.bias, where) if x_t.bias.ptr is not None else None
    seed = tl.load(problem.seeds + flat) if problem.seeds is not None else None
    walk = key_range(problem, row, BM, BN)

    delta, delta_t = deltas(e, e_t, o, o_t, SECOND)
    weight = tl.zeros_like(delta)
    if FEW or EXACT:
        if EXACT or sees_few(problem, row, BM):
            delta = tl.zeros_like(delta)
            delta_t = tl.zeros_like(delta_t)
            for n in tl.range(walk[0], walk[3], BN, num_stages=1):
                k = load_key(x.key, shared, problem, n, c, d, False)
                v = load_key(x.value, shared, problem, n, c, dv, False)
                k_t = load_key(x_t.key, shared, problem, n, c, d, False)
                v_t = load_key(x_t.value, shared, problem, n, c, dv, False)
                s, s_t, dp, dp_t = products(q, q_t, e, e_t, k, k_t, v, v_t, PRECISION)
                p, _, dp, p_t, _, dp_t = probabilities(
                    s, s_t, dp, dp_t, lse, None, mu, x_t, problem, bias_at, bias_t_at, mask_at, seed,
                    i[:, None], (n + c)[None, :], SECOND, FOLD, True, False,
                )  # fmt: skip
                if EXACT:
                    weight += tl.sum(p, 1)
                delta += tl.sum(p * dp, 1)
                if SECOND:
                    delta_t += tl.sum(p_t * dp + p * dp_t, 1)
    gain = None
    if EXACT:
        gain = 1.0 / tl.where(weight == 0.0, 1.0, weight)
        delta = delta * gain
        delta_t = delta_t * gain
        tl.store(w.gain + flat * NQ + i, gain, mask=i < NQ)
        gain = gain[:, None]
    delta += minus_lse_bar(w.lse, w.lse_value, flat, i, NQ)
    tl.store(w.delta + flat * NQ + i, delta, mask=i < NQ)
    if SECOND:
        delta_t += minus_lse_bar(w.lse_t, w.lse_value, flat, i, NQ)
        tl.store(w.delta_t + flat * NQ + i, delta_t, mask=i < NQ)

    grad = tl.zeros([BM, D], tl.float32)
    first_grad = tl.zeros([BM, D], tl.float32)
    for segment in tl.static_range(3):
        if (
            (segment == 1 and SPLIT)
            or (segment == 0 and SPLIT and problem.left is not None)
            or (segment == 2 and (not SPLIT or not EVEN_N or problem.right is not None))
        ):
            first, last = part_of(walk, segment, SPLIT)
            even = EVEN_N or segment == 1
            for n in range(first, last, BN):
                k = load_key(x.key, shared, problem, n, c, d, even)
                v = load_key(x.value, shared, problem, n, c, dv, even)
                k_t = load_key(x_t.key, shared, problem, n, c, d, even)
                v_t = load_key(x_t.value, shared, problem, n, c, dv, even)
                s, s_t, dp, dp_t = products(q, q_t, e, e_t, k, k_t, v, v_t, PRECISION)
                p, _, dp, p_t, _, dp_t = probabilities(
                    s, s_t, dp, dp_t, lse, gain, mu, x_t, problem, bias_at, bias_t_at, mask_at, seed,
                    i[:, None], (n + c)[None, :], SECOND, FOLD, segment != 1, False,
                )  # fmt: skip
                ds, ds_t = score_gradient(p, dp, p_t, dp_t, delta[:, None], delta_t[:, None], SECOND, False)
                ds = rounded(ds, dtype, EXACT)
                if SECOND:
                    grad = product_of(rounded(ds_t, dtype, EXACT), k, grad, EXACT, PRECISION)
                    if k_t is not None:
                        grad = product_of(ds, k_t, grad, EXACT, PRECISION)
                    if first_query is not None:
                        first_grad = product_of(ds, k, first_grad, EXACT, PRECISION)
                else:
                    grad = product_of(ds, k, grad, EXACT, PRECISION)
    grad = grad * problem.scale
    store(grad_query, grad_query.ptr, grad, where, flat, problem, row, r, d, NQ, D)
    if first_query is not None:
        first_grad = first_grad * problem.scale
        store(grad_query, first_query, first_grad, where, flat, problem, row, r, d, NQ, D)


@triton.jit
def by_key(
    x,
    x_t,
    problem,
    w,
    grad_query,
    first_query,
    grad_key,  # View, written
    first_key,  # as first_query
    grad_value,  # View, written
    first_value,
    D: tl.constexpr,
    DV: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    SECOND: tl.constexpr,
    ALONE: tl.constexpr,
    FOLD: tl.constexpr,
    EXACT: tl.constexpr,
    SPLIT: tl.constexpr,
    HOLD: tl.constexpr,
    EVEN_M: tl.constexpr,
    EVEN_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The gradients of keys and values ``[key, key + BN)`` of one key head, summed over the query heads that share it.

    ALONE: these are all the keys, so that the gradient of the query needs no other pass, and is written here.
    """
    NQ = problem.NQ
    NK = problem.NK
    GROUP = problem.GROUP
    block, flat_key = schedule(tl.cdiv(NK, BN), problem.LANES // GROUP, problem.WAVE)
    key = block * BN
    b0, b1, kv_head = batch_of(flat_key, problem.BATCH1, problem.HEADS // GROUP)
    r = tl.arange(0, BM)
    c = tl.arange(0, BN)
    d = tl.arange(0, D)
    dv = tl.arange(0, DV)
    j = key + c
    shared = (b0, b1, kv_head)

    k = load_key(x.key, shared, problem, key, c, d, EVEN_N)
    v = load_key(x.value, shared, problem, key, c, dv, EVEN_N)
    k_t = load_key(x_t.key, shared, problem, key, c, d, EVEN_N)
    v_t = load_key(x_t.value, shared, problem, key, c, dv, EVEN_N)
    dtype = k.dtype
    k = held(k, HOLD)
    v = held(v, HOLD)
    k_t = held(k_t, HOLD)
    v_t = held(v_t, HOLD)

    grad_k = tl.zeros([BN, D], tl.float32)
    grad_v = tl.zeros([BN, DV], tl.float32)
    first_k = tl.zeros([BN, D], tl.float32)
    first_v = tl.zeros([BN, DV], tl.float32)
    walk = row_range(problem, key, BM, BN)
    if ALONE:
        # Rows that see no key have a gradient to write as well: zero.
        _, a, b, _ = walk
        a = tl.minimum(a, tl.cdiv(NQ, BM) * BM)
        walk = (0, a, tl.maximum(b, a), NQ)
    for g in range(GROUP):
        where = (b0, b1, kv_head * GROUP + g)
        flat = flat_key * GROUP + g
        bias_at = locate(problem.bias, where) if problem.bias.ptr is not None else None
        mask_at = locate(problem.mask, where) if problem.mask.ptr is not None else None
        bias_t_at = locate(x_t.bias, where) if x_t.bias.ptr is not None else None
        seed = tl.load(problem.seeds + flat) if problem.seeds is not None else None
        for segment in tl.static_range(3):
            if (
                (segment == 1 and SPLIT)
                or (segment == 0 and SPLIT and problem.right is not None)
                or (segment == 2 and (not SPLIT or not EVEN_M or problem.left is not None))
            ):
                first, last = part_of(walk, segment, SPLIT)
                even = EVEN_M or segment == 1
                # Keys past the last one are only in their own rows of the gradients, which are not written;
                # but in ds k they would be summed.
                for m in range(first, last, BM):
                    i = m + r
                    q = load_query(x.query, where, problem, m, r, d, even)
                    e = load_query(w.out, where, problem, m, r, dv, even)
                    q_t = load_query(x_t.query, where, problem, m, r, d, even)
                    e_t = load_query(w.out_t, where, problem, m, r, dv, even)
                    if ALONE:
                        delta = minus_lse_bar(w.lse, w.lse_value, flat, i, NQ)
                        delta_t = minus_lse_bar(w.lse_t, w.lse_value, flat, i, NQ) if SECOND else delta
                    else:
                        delta = load_stat(w.delta, flat, i, NQ, 0.0)
                        delta_t = load_stat(w.delta_t, flat, i, NQ, 0.0) if SECOND else delta
                    lse = load_lse(w.lse_value, flat, i, NQ)[None, :]
                    mu = load_stat(w.lse_value_t, flat, i, NQ, 0.0)[None, :] if SECOND else lse
                    gain = load_stat(w.gain, flat, i, NQ, 1.0)[None, :] if EXACT and not ALONE else None
                    s, s_t, dp, dp_t = products(k, k_t, v, v_t, q, q_t, e, e_t, PRECISION)
                    p, pz, dp, p_t, pz_t, dp_t = probabilities(
                        s, s_t, dp, dp_t, lse, gain, mu, x_t, problem, bias_at, bias_t_at, mask_at, seed,
                        i[None, :], j[:, None], SECOND, FOLD, segment != 1 or (ALONE and not EVEN_N), EXACT and ALONE,
                    )  # fmt: skip
                    ds, ds_t = score_gradient(p, dp, p_t, dp_t, delta[None, :], delta_t[None, :], SECOND, ALONE)
                    pz = rounded(pz, dtype, EXACT)
                    ds = rounded(ds, dtype, EXACT)
                    ds_t = rounded(ds_t, dtype, EXACT)
                    if SECOND:
                        grad_v = product_of(rounded(pz_t, dtype, EXACT), e, grad_v, EXACT, PRECISION)
                        if e_t is not None:
                            grad_v = product_of(pz, e_t, grad_v, EXACT, PRECISION)
                        grad_k = product_of(ds_t, q, grad_k, EXACT, PRECISION)
                        if q_t is not None:
                            grad_k = product_of(ds, q_t, grad_k, EXACT, PRECISION)
                        if first_key is not None:
                            first_v = product_of(pz, e, first_v, EXACT, PRECISION)
                            first_k = product_of(ds, q, first_k, EXACT, PRECISION)
                    else:
                        grad_v = product_of(pz, e, grad_v, EXACT, PRECISION)
                        grad_k = product_of(ds, q, grad_k, EXACT, PRECISION)
                    if ALONE:
                        grad_q = product_of(transposed(ds_t), k, None, EXACT, PRECISION)
                        if k_t is not None:
                            grad_q = product_of(transposed(ds), k_t, grad_q, EXACT, PRECISION)
                        grad_q = grad_q * problem.scale
                        store(grad_query, grad_query.ptr, grad_q, where, flat, problem, m, r, d, NQ, D)
                        if first_query is not None:
                            first_q = product_of(transposed(ds), k, None, EXACT, PRECISION)
                            first_q = first_q * problem.scale
                            store(grad_query, first_query, first_q, where, flat, problem, m, r, d, NQ, D)
    grad_k = grad_k * problem.scale
    store(grad_key, grad_key.ptr, grad_k, shared, flat_key, problem, key, c, d, NK, D)
    store(grad_value, grad_value.ptr, grad_v, shared, flat_key, problem, key, c, dv, NK, DV)
    if first_key is not None:
        first_k = first_k * problem.scale
        store(grad_key, first_key, first_k, shared, flat_key, problem, key, c, d, NK, D)
        store(grad_value, first_value, first_v, shared, flat_key, problem, key, c, dv, NK, DV)
