"""B and S, the gradients and their derivative: by rows and by keys.

Read beside ``docs/mathematics.md``. The scores are computed anew in each pass, so that no result needs an
atomic addition. A tile is ``[rows, keys]`` in :func:`by_row` and ``[keys, rows]`` in :func:`by_key`; with
the roles of ``(query, out_bar)`` and ``(key, value)`` exchanged the formulas of both are the same:
:func:`products`, :func:`score_gradient`.
"""

import triton
import triton.language as tl

from ._rows import deltas, load_lse, load_stat, minus_lse_bar
from ._scores import (
    LOG2E,
    batch_of,
    hide,
    kept,
    key_range,
    load_plane,
    load_rows,
    locate,
    locate_key,
    row_range,
    schedule,
    store_rows,
    stride_of,
)


@triton.jit
def products(a, a_t, e, e_t, b, b_t, f, f_t, SECOND: tl.constexpr, PRECISION: tl.constexpr):
    """``a b^T`` and ``e f^T``, with their tangents: scores and P's cotangent, or their transposes."""
    bt = tl.trans(b)
    ft = tl.trans(f)
    s = tl.dot(a, bt, input_precision=PRECISION)
    dp = tl.dot(e, ft, input_precision=PRECISION)
    s_t = tl.zeros_like(s)
    dp_t = tl.zeros_like(s)
    if SECOND:
        if a_t is not None:
            s_t = tl.dot(a_t, bt, s_t, input_precision=PRECISION)
        if b_t is not None:
            s_t = tl.dot(a, tl.trans(b_t), s_t, input_precision=PRECISION)
        if e_t is not None:
            dp_t = tl.dot(e_t, ft, dp_t, input_precision=PRECISION)
        if f_t is not None:
            dp_t = tl.dot(e, tl.trans(f_t), dp_t, input_precision=PRECISION)
    return s, s_t, dp, dp_t


@triton.jit
def score_gradient(
    s,
    s_t,
    dp,
    dp_t,
    rows,  # lse (base 2), delta, mu, delta_t: shaped to broadcast to the tile
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
    ALONE: tl.constexpr,
):
    """``P Z`` and ``dS``, then ``P. Z`` and ``dS.``, of one tile from its products.

    ALONE: the tile, ``[keys, rows]``, holds whole rows, so that ``rowsum(P dP)`` is summed here: exactly, where a
    delta from the rounded ``out`` is not.
    """
    lse, delta, mu, delta_t = rows
    s = hide(s, problem, bias_at, mask_at, i, j, FOLD, EDGE)
    factor = 1.0 if FOLD else problem.scale * LOG2E
    p = tl.exp2(s * factor - lse)
    pz = p
    if problem.seeds is not None:
        z = tl.where(kept(seed, problem.threshold, i, j), problem.boost, 0.0)
        dp = dp * z
        dp_t = dp_t * z
        pz = p * z
    if ALONE:
        delta += tl.sum(p * dp, 0)[None, :]
    dp = dp - delta
    ds = p * dp
    p_t = p
    ds_t = ds
    if SECOND:
        s_t = s_t * problem.scale
        if x_t.bias.ptr is not None:
            s_t += load_plane(x_t.bias, bias_t_at, i, j, problem.NQ, problem.NK).to(tl.float32)
        p_t = p * (s_t - mu)
        if ALONE:
            # rowsum(P. dP + P dP.): with the centred dP in its first term, for the rows of P. sum to zero.
            delta_t += tl.sum(p_t * dp + p * dp_t, 0)[None, :]
        ds_t = p_t * dp + p * (dp_t - delta_t)
        if problem.seeds is not None:
            p_t = p_t * z
    return pz, ds, p_t, ds_t


@triton.jit
def by_row(
    x,
    x_t,
    problem,
    w,  # cotangents, residuals and scratch
    grad_query,  # [L, NQ, D] contiguous
    D: tl.constexpr,
    DV: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    SECOND: tl.constexpr,
    FOLD: tl.constexpr,
    EVEN_M: tl.constexpr,
    EVEN_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The gradient of rows ``[row, row + BM)`` of one query head; and their deltas, for :func:`by_key`."""
    NQ = problem.NQ
    NK = problem.NK
    blocks = tl.cdiv(NQ, BM)
    block, flat = schedule(blocks, problem.LANES, problem.WAVE)
    row = (blocks - 1 - block) * BM
    where = batch_of(flat, problem.BATCH1, problem.HEADS)
    r = tl.arange(0, BM)
    c = tl.arange(0, BN)
    d = tl.arange(0, D)
    dv = tl.arange(0, DV)
    i = row + r

    q = load_rows(locate(x.query, where), stride_of(x.query, problem), row, r, d, NQ, EVEN_M)
    e = load_rows(locate(w.out, where), stride_of(w.out, problem), row, r, dv, NQ, EVEN_M)
    o = load_rows(locate(w.out_value, where), stride_of(w.out_value, problem), row, r, dv, NQ, EVEN_M)
    q_t = None
    e_t = None
    o_t = None
    if SECOND:
        if x_t.query.ptr is not None:
            q_t = load_rows(locate(x_t.query, where), stride_of(x_t.query, problem), row, r, d, NQ, EVEN_M)
        if w.out_t.ptr is not None:
            e_t = load_rows(locate(w.out_t, where), stride_of(w.out_t, problem), row, r, dv, NQ, EVEN_M)
        o_t = load_rows(locate(w.out_value_t, where), stride_of(w.out_value_t, problem), row, r, dv, NQ, EVEN_M)
    dtype = q.dtype
    delta, delta_t = deltas(e, e_t, o, o_t, w, flat, i, NQ, SECOND)
    tl.store(w.delta + flat * NQ + i, delta, mask=i < NQ)
    mu = delta
    if SECOND:
        tl.store(w.delta_t + flat * NQ + i, delta_t, mask=i < NQ)
        mu = load_stat(w.lse_value_t, flat, i, NQ, 0.0)
    rows = (load_lse(w.lse_value, flat, i, NQ)[:, None], delta[:, None], mu[:, None], delta_t[:, None])
    k_at = locate_key(x.key, where, problem.GROUP)
    v_at = locate_key(x.value, where, problem.GROUP)
    bias_at = locate(problem.bias, where) if problem.bias.ptr is not None else None
    mask_at = locate(problem.mask, where) if problem.mask.ptr is not None else None
    bias_t_at = locate(x_t.bias, where) if x_t.bias.ptr is not None else None
    seed = tl.load(problem.seeds + flat) if problem.seeds is not None else None

    grad = tl.zeros([BM, D], tl.float32)
    lo, a, b, hi = key_range(problem, row, BM, BN)
    for segment in tl.static_range(3):
        if (
            segment == 1
            or (segment == 0 and problem.left is not None)
            or (segment == 2 and (not EVEN_N or problem.right is not None))
        ):
            first, last = (lo, tl.minimum(a, hi)) if segment == 0 else (a, b) if segment == 1 else (b, hi)
            for n in range(first, last, BN):
                k = load_rows(k_at, stride_of(x.key, problem), n, c, d, NK, EVEN_N or segment == 1)
                v = load_rows(v_at, stride_of(x.value, problem), n, c, dv, NK, EVEN_N or segment == 1)
                k_t = None
                v_t = None
                if SECOND:
                    if x_t.key.ptr is not None:
                        k_t = load_rows(
                            locate_key(x_t.key, where, problem.GROUP),
                            stride_of(x_t.key, problem),
                            n,
                            c,
                            d,
                            NK,
                            EVEN_N or segment == 1,
                        )
                    if x_t.value.ptr is not None:
                        v_t = load_rows(
                            locate_key(x_t.value, where, problem.GROUP),
                            stride_of(x_t.value, problem),
                            n,
                            c,
                            dv,
                            NK,
                            EVEN_N or segment == 1,
                        )
                s, s_t, dp, dp_t = products(q, q_t, e, e_t, k, k_t, v, v_t, SECOND, PRECISION)
                _, ds, _, ds_t = score_gradient(
                    s, s_t, dp, dp_t, rows, x_t, problem, bias_at, bias_t_at, mask_at, seed,
                    i[:, None], (n + c)[None, :], SECOND, FOLD, segment != 1, False,
                )  # fmt: skip
                if SECOND:
                    grad = tl.dot(ds_t.to(dtype), k, grad, input_precision=PRECISION)
                    if k_t is not None:
                        grad = tl.dot(ds.to(dtype), k_t, grad, input_precision=PRECISION)
                else:
                    grad = tl.dot(ds.to(dtype), k, grad, input_precision=PRECISION)
    store_rows(grad_query + flat * NQ * D, grad * problem.scale, row, r, d, NQ, D)


@triton.jit
def by_key(
    x,
    x_t,
    problem,
    w,
    grad_query,
    grad_key,  # [L / GROUP, NK, D] contiguous
    grad_value,  # [L / GROUP, NK, DV] contiguous
    D: tl.constexpr,
    DV: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    SECOND: tl.constexpr,
    ALONE: tl.constexpr,
    FOLD: tl.constexpr,
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
    first_head = (b0, b1, kv_head * GROUP)

    k = load_rows(locate_key(x.key, first_head, GROUP), stride_of(x.key, problem), key, c, d, NK, EVEN_N)
    v = load_rows(locate_key(x.value, first_head, GROUP), stride_of(x.value, problem), key, c, dv, NK, EVEN_N)
    k_t = None
    v_t = None
    if SECOND:
        if x_t.key.ptr is not None:
            k_t = load_rows(locate_key(x_t.key, first_head, GROUP), stride_of(x_t.key, problem), key, c, d, NK, EVEN_N)
        if x_t.value.ptr is not None:
            v_t = load_rows(
                locate_key(x_t.value, first_head, GROUP),
                stride_of(x_t.value, problem),
                key,
                c,
                dv,
                NK,
                EVEN_N,
            )
    dtype = k.dtype

    grad_k = tl.zeros([BN, D], tl.float32)
    grad_v = tl.zeros([BN, DV], tl.float32)
    lo, a, b, hi = row_range(problem, key, BM, BN)
    if ALONE:
        # Rows that see no key have a gradient to write as well: zero.
        lo = 0
        a = tl.minimum(a, tl.cdiv(NQ, BM) * BM)
        b = tl.maximum(b, a)
        hi = NQ
    for g in range(GROUP):
        where = (b0, b1, kv_head * GROUP + g)
        flat = flat_key * GROUP + g
        bias_at = locate(problem.bias, where) if problem.bias.ptr is not None else None
        mask_at = locate(problem.mask, where) if problem.mask.ptr is not None else None
        bias_t_at = locate(x_t.bias, where) if x_t.bias.ptr is not None else None
        seed = tl.load(problem.seeds + flat) if problem.seeds is not None else None
        for segment in tl.static_range(3):
            if (
                segment == 1
                or (segment == 0 and problem.right is not None)
                or (segment == 2 and (not EVEN_M or problem.left is not None))
            ):
                first, last = (lo, tl.minimum(a, hi)) if segment == 0 else (a, b) if segment == 1 else (b, hi)
                # Keys past the last one are only in their own rows of the gradients, which are not written;
                # but in ds k they would be summed.
                for m in range(first, last, BM):
                    i = m + r
                    q = load_rows(
                        locate(x.query, where),
                        stride_of(x.query, problem),
                        m,
                        r,
                        d,
                        NQ,
                        EVEN_M or segment == 1,
                    )
                    e = load_rows(
                        locate(w.out, where),
                        stride_of(w.out, problem),
                        m,
                        r,
                        dv,
                        NQ,
                        EVEN_M or segment == 1,
                    )
                    q_t = None
                    e_t = None
                    if SECOND:
                        if x_t.query.ptr is not None:
                            q_t = load_rows(
                                locate(x_t.query, where),
                                stride_of(x_t.query, problem),
                                m,
                                r,
                                d,
                                NQ,
                                EVEN_M or segment == 1,
                            )
                        if w.out_t.ptr is not None:
                            e_t = load_rows(
                                locate(w.out_t, where),
                                stride_of(w.out_t, problem),
                                m,
                                r,
                                dv,
                                NQ,
                                EVEN_M or segment == 1,
                            )
                    if ALONE:
                        lse = load_stat(w.lse_value, flat, i, NQ, 0.0)
                        delta = minus_lse_bar(w.lse, lse, flat, i, NQ)
                        delta_t = minus_lse_bar(w.lse_t, lse, flat, i, NQ) if SECOND else delta
                    else:
                        delta = load_stat(w.delta, flat, i, NQ, 0.0)
                        delta_t = load_stat(w.delta_t, flat, i, NQ, 0.0) if SECOND else delta
                    mu = load_stat(w.lse_value_t, flat, i, NQ, 0.0) if SECOND else delta
                    rows = (load_lse(w.lse_value, flat, i, NQ)[None, :], delta[None, :], mu[None, :], delta_t[None, :])
                    s, s_t, dp, dp_t = products(k, k_t, v, v_t, q, q_t, e, e_t, SECOND, PRECISION)
                    p, ds, p_t, ds_t = score_gradient(
                        s, s_t, dp, dp_t, rows, x_t, problem, bias_at, bias_t_at, mask_at, seed,
                        i[None, :], j[:, None], SECOND, FOLD, segment != 1 or (ALONE and not EVEN_N), ALONE,
                    )  # fmt: skip
                    ds = ds.to(dtype)
                    ds_t = ds_t.to(dtype)
                    if SECOND:
                        grad_v = tl.dot(p_t.to(dtype), e, grad_v, input_precision=PRECISION)
                        if e_t is not None:
                            grad_v = tl.dot(p.to(dtype), e_t, grad_v, input_precision=PRECISION)
                        grad_k = tl.dot(ds_t, q, grad_k, input_precision=PRECISION)
                        if q_t is not None:
                            grad_k = tl.dot(ds, q_t, grad_k, input_precision=PRECISION)
                    else:
                        grad_v = tl.dot(p.to(dtype), e, grad_v, input_precision=PRECISION)
                        grad_k = tl.dot(ds, q, grad_k, input_precision=PRECISION)
                    if ALONE:
                        grad_q = tl.dot(tl.trans(ds_t), k, input_precision=PRECISION)
                        if k_t is not None:
                            grad_q = tl.dot(tl.trans(ds), k_t, grad_q, input_precision=PRECISION)
                        store_rows(grad_query + flat * NQ * D, grad_q * problem.scale, m, r, d, NQ, D)
    store_rows(grad_key + flat_key * NK * D, grad_k * problem.scale, key, c, d, NK, D)
    store_rows(grad_value + flat_key * NK * DV, grad_v, key, c, dv, NK, DV)
