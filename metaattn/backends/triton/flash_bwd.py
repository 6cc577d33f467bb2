"""The kernels of B, of S, and of both at once: the gradients, and their derivative.

Read this with ``docs/mathematics.md``. There are two kernels, and each computes the scores again, so that no result
needs atomic additions:

* :func:`attention_backward_rows` computes the gradient of a block of rows, with tiles ``[rows, keys]``, and the deltas
  that the other one reads;
* :func:`attention_backward_keys` computes the gradients of a block of keys and values, with tiles ``[keys, rows]``.

If the roles of ``(query, out_bar)`` and ``(key, value)`` are exchanged, the formulas of both are the same:
:func:`score_products`, :func:`probabilities`, :func:`score_gradient`. JVP says that S is computed. For B and S at once
the kernels write the results of B to the tensors ``first_*``, and those of S to the others.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .tile_ops import (
    HeadTerms,
    bias_and_mask,
    deltas,
    dropout_keeps,
    exponent,
    keep_in_registers,
    key_head,
    key_range,
    load_key_rows,
    load_lse,
    load_query_rows,
    load_row_value,
    load_score_tile,
    load_seed,
    locate_optional,
    lse_is_imprecise,
    minus_lse_bar,
    product,
    product_with_rest,
    reversed_row_block,
    round_with_rest,
    row_range,
    schedule,
    sees_few_keys,
    segment_bounds,
    segment_exists,
    split_head_index,
    store,
    transpose_with_rest,
)


class ScoreProducts(NamedTuple):
    """Products of one tile, with tangents (``_t``): ``q k^T``, and ``out_bar v^T``, the cotangent of P Z."""

    s: Any
    s_t: Any
    dp: Any
    dp_t: Any


class RowStats(NamedTuple):
    """One number for each row, shaped to broadcast to the tile.

    ``lse`` is a shift of :func:`exponent`, ``mu`` is its tangent, and ``row_renorm`` is the factor that makes a row of
    P sum to one (``None``: no factor).
    """

    lse: Any
    row_renorm: Any
    mu: Any


class Probabilities(NamedTuple):
    """P, P Z and the cotangent dP of one tile, with tangents (``_t``)."""

    p: Any
    pz: Any
    dp: Any
    p_t: Any
    pz_t: Any
    dp_t: Any


@triton.jit
def score_products(a, a_t, e, e_t, b, b_t, f, f_t, PRECISION: tl.constexpr):
    """Return ``a b^T`` and ``e f^T`` with their tangents: for (a, e, b, f) = (q, out_bar, k, v), or the transposes."""
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
    return ScoreProducts(s, s_t, dp, dp_t)


@triton.jit
def probabilities(
    products,
    stats,
    terms,
    x_t,
    problem,
    i,
    j,
    JVP: tl.constexpr,
    FOLD_SCALE: tl.constexpr,
    EDGE: tl.constexpr,
    RENORMALIZE: tl.constexpr,
):
    """Return P, P Z and dP of one tile, and their tangents, from its products.

    Each row of P sums to one, apart from the rounding of its lse. ``stats.row_renorm`` corrects that; so does
    RENORMALIZE, for a tile ``[keys, rows]`` that holds whole rows.
    """
    s, s_t, dp, dp_t = products
    s = bias_and_mask(s, problem, terms, i, j, FOLD_SCALE, EDGE)
    p = tl.exp2(exponent(s, stats.lse, problem, FOLD_SCALE))
    if stats.row_renorm is not None:
        p = p * stats.row_renorm
    if RENORMALIZE:
        weight = tl.sum(p, 0)
        p = p / tl.where(weight == 0.0, 1.0, weight)[None, :]
    p_t = p
    if JVP:
        s_t = s_t * problem.scale
        if x_t.bias.ptr is not None:
            s_t += load_score_tile(x_t.bias, terms.bias_t, i, j, problem.NQ, problem.NK).to(tl.float32)
        p_t = p * (s_t - stats.mu)
    pz = p
    pz_t = p_t
    if problem.seeds is not None:
        keeps = dropout_keeps(terms.seed, problem.dropout_threshold, i, j)
        z = tl.where(keeps, problem.dropout_scale, 0.0)
        dp = dp * z
        dp_t = dp_t * z
        pz = p * z
        pz_t = p_t * z
    return Probabilities(p, pz, dp, p_t, pz_t, dp_t)


@triton.jit
def score_gradient(p, dp, p_t, dp_t, delta, delta_t, JVP: tl.constexpr, SINGLE_KEY_BLOCK: tl.constexpr):
    """Return ``dS`` and, with JVP, its tangent.

    SINGLE_KEY_BLOCK: the tile ``[keys, rows]`` holds whole rows, so that ``rowsum(P dP)`` is summed here. That is
    exact; a delta from the rounded ``out`` is not.
    """
    if SINGLE_KEY_BLOCK:
        delta += tl.sum(p * dp, 0)[None, :]
    dp = dp - delta
    ds = p * dp
    ds_t = ds
    if JVP:
        if SINGLE_KEY_BLOCK:
            # rowsum(P. dP + P dP.). The first term may use the centred dP, because the rows of P. sum to zero.
            delta_t += tl.sum(p_t * dp + p * dp_t, 0)[None, :]
        ds_t = p_t * dp + p * (dp_t - delta_t)
    return ds, ds_t


@triton.jit
def attention_backward_rows(
    x,  # Inputs: query, key, value
    x_t,  # Inputs: their tangents; each may be absent
    problem,  # KernelProblem
    rows,  # RowInputs; deltas and row_renorm are written
    grad_query,  # View, written
    first_query,  # a tensor with the same strides, or None: the gradient of B, if S is computed as well
    D: tl.constexpr,
    DV: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
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
    """Compute the gradient of rows ``[row, row + BM)`` of one query head, and their deltas.

    FEW_KEYS: some rows see few keys. Their ``delta = rowsum(dO O)`` from a 16-bit ``O`` is too inaccurate; a first loop
    over their keys computes it as ``rowsum(P dP)``. COMPENSATE: there are few rows, and all are treated so.
    RENORMALIZE: rows with a large lse are treated so, and ``row_renorm`` corrects the effect of the rounded lse on
    their ``P``.
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

    q = load_query_rows(x.query, where, problem, row, r, d, EVEN_M)
    e = load_query_rows(rows.out_bar, where, problem, row, r, dv, EVEN_M)
    o = load_query_rows(rows.out, where, problem, row, r, dv, EVEN_M)
    q_t = load_query_rows(x_t.query, where, problem, row, r, d, EVEN_M)
    e_t = load_query_rows(rows.out_bar_t, where, problem, row, r, dv, EVEN_M)
    o_t = load_query_rows(rows.out_t, where, problem, row, r, dv, EVEN_M)
    dtype = q.dtype
    q = keep_in_registers(q, KEEP_IN_REGISTERS)
    e = keep_in_registers(e, KEEP_IN_REGISTERS)
    q_t = keep_in_registers(q_t, KEEP_IN_REGISTERS)
    e_t = keep_in_registers(e_t, KEEP_IN_REGISTERS)
    lse = load_lse(rows.lse, head_index, i, NQ, FOLD_SCALE)[:, None]
    mu = load_row_value(rows.lse_t, head_index, i, NQ, 0.0)[:, None] if JVP else lse
    terms = HeadTerms(
        locate_optional(problem.bias, where),
        locate_optional(x_t.bias, where),
        locate_optional(problem.mask, where),
        load_seed(problem, head_index),
    )
    bounds = key_range(problem, row, BM, BN)

    delta, delta_t = deltas(e, e_t, o, o_t, JVP)
    weight = tl.zeros_like(delta)
    if FEW_KEYS or RENORMALIZE:
        first_loop = COMPENSATE
        if FEW_KEYS:
            first_loop = first_loop or sees_few_keys(problem, row, BM)
        if RENORMALIZE:
            first_loop = first_loop or lse_is_imprecise(lse)
        if first_loop:
            delta = tl.zeros_like(delta)
            delta_t = tl.zeros_like(delta_t)
            for n in tl.range(bounds[0], bounds[3], BN, num_stages=1):
                k = load_key_rows(x.key, kv_where, problem, n, c, d, False)
                v = load_key_rows(x.value, kv_where, problem, n, c, dv, False)
                k_t = load_key_rows(x_t.key, kv_where, problem, n, c, d, False)
                v_t = load_key_rows(x_t.value, kv_where, problem, n, c, dv, False)
                p, _, dp, p_t, _, dp_t = probabilities(
                    score_products(q, q_t, e, e_t, k, k_t, v, v_t, PRECISION), RowStats(lse, None, mu), terms,
                    x_t, problem, i[:, None], (n + c)[None, :], JVP, FOLD_SCALE, True, False,
                )  # fmt: skip
                if RENORMALIZE:
                    weight += tl.sum(p, 1)
                delta += tl.sum(p * dp, 1)
                if JVP:
                    delta_t += tl.sum(p_t * dp + p * dp_t, 1)
    row_renorm = None
    if RENORMALIZE:
        row_renorm = 1.0 / tl.where(weight == 0.0, 1.0, weight)
        delta = delta * row_renorm
        delta_t = delta_t * row_renorm
        tl.store(rows.row_renorm + head_index * NQ + i, row_renorm, mask=i < NQ)
        row_renorm = row_renorm[:, None]
    delta += minus_lse_bar(rows.lse_bar, rows.lse, head_index, i, NQ)
    tl.store(rows.delta + head_index * NQ + i, delta, mask=i < NQ)
    if JVP:
        delta_t += minus_lse_bar(rows.lse_bar_t, rows.lse, head_index, i, NQ)
        tl.store(rows.delta_t + head_index * NQ + i, delta_t, mask=i < NQ)

    grad = tl.zeros([BM, D], tl.float32)
    first_grad = tl.zeros([BM, D], tl.float32)
    for segment in tl.static_range(3):
        if segment_exists(segment, problem.left is not None, not EVEN_N or problem.right is not None, SPLIT):
            first, last = segment_bounds(bounds, segment, SPLIT)
            even = EVEN_N or segment == 1
            for n in range(first, last, BN):
                k = load_key_rows(x.key, kv_where, problem, n, c, d, even)
                v = load_key_rows(x.value, kv_where, problem, n, c, dv, even)
                k_t = load_key_rows(x_t.key, kv_where, problem, n, c, d, even)
                v_t = load_key_rows(x_t.value, kv_where, problem, n, c, dv, even)
                p, _, dp, p_t, _, dp_t = probabilities(
                    score_products(q, q_t, e, e_t, k, k_t, v, v_t, PRECISION), RowStats(lse, row_renorm, mu), terms,
                    x_t, problem, i[:, None], (n + c)[None, :], JVP, FOLD_SCALE, segment != 1, False,
                )  # fmt: skip
                ds, ds_t = score_gradient(p, dp, p_t, dp_t, delta[:, None], delta_t[:, None], JVP, False)
                ds = round_with_rest(ds, dtype, COMPENSATE)
                if JVP:
                    ds_t = round_with_rest(ds_t, dtype, COMPENSATE)
                    grad = product_with_rest(ds_t, k, grad, COMPENSATE, PRECISION)
                    if k_t is not None:
                        grad = product_with_rest(ds, k_t, grad, COMPENSATE, PRECISION)
                    if first_query is not None:
                        first_grad = product_with_rest(ds, k, first_grad, COMPENSATE, PRECISION)
                else:
                    grad = product_with_rest(ds, k, grad, COMPENSATE, PRECISION)
    grad = grad * problem.scale
    store(grad_query, grad_query.ptr, grad, where, head_index, problem, row, r, d, NQ, D)
    if first_query is not None:
        first_grad = first_grad * problem.scale
        store(grad_query, first_query, first_grad, where, head_index, problem, row, r, d, NQ, D)


@triton.jit
def attention_backward_keys(
    x,  # Inputs: query, key, value
    x_t,  # Inputs: their tangents; each may be absent
    problem,  # KernelProblem
    rows,  # RowInputs
    grad_query,  # View, written with SINGLE_KEY_BLOCK
    first_query,  # a tensor with the same strides, or None: the gradient of B, if S is computed as well
    grad_key,  # View, written
    first_key,  # as first_query
    grad_value,  # View, written
    first_value,  # as first_query
    D: tl.constexpr,
    DV: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    JVP: tl.constexpr,
    SINGLE_KEY_BLOCK: tl.constexpr,
    FOLD_SCALE: tl.constexpr,
    COMPENSATE: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    SPLIT: tl.constexpr,
    KEEP_IN_REGISTERS: tl.constexpr,
    EVEN_M: tl.constexpr,
    EVEN_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Compute the gradients of keys and values ``[key, key + BN)`` of one key head, summed over its query heads.

    SINGLE_KEY_BLOCK: these are all keys. The gradient of the query then needs no other kernel, and is written here.
    """
    NQ = problem.NQ
    NK = problem.NK
    GROUP = problem.GROUP
    block, kv_head_index = schedule(tl.cdiv(NK, BN), problem.TOTAL_HEADS // GROUP, problem.L2_GROUP)
    key = block * BN
    b0, b1, kv_head = split_head_index(kv_head_index, problem.BATCH1, problem.HEADS // GROUP)
    r = tl.arange(0, BM)
    c = tl.arange(0, BN)
    d = tl.arange(0, D)
    dv = tl.arange(0, DV)
    j = key + c
    kv_where = (b0, b1, kv_head)

    k = load_key_rows(x.key, kv_where, problem, key, c, d, EVEN_N)
    v = load_key_rows(x.value, kv_where, problem, key, c, dv, EVEN_N)
    k_t = load_key_rows(x_t.key, kv_where, problem, key, c, d, EVEN_N)
    v_t = load_key_rows(x_t.value, kv_where, problem, key, c, dv, EVEN_N)
    dtype = k.dtype
    k = keep_in_registers(k, KEEP_IN_REGISTERS)
    v = keep_in_registers(v, KEEP_IN_REGISTERS)
    k_t = keep_in_registers(k_t, KEEP_IN_REGISTERS)
    v_t = keep_in_registers(v_t, KEEP_IN_REGISTERS)

    grad_k = tl.zeros([BN, D], tl.float32)
    grad_v = tl.zeros([BN, DV], tl.float32)
    first_k = tl.zeros([BN, D], tl.float32)
    first_v = tl.zeros([BN, DV], tl.float32)
    bounds = row_range(problem, key, BM, BN)
    if SINGLE_KEY_BLOCK:
        # Include rows that see no key: their gradient, zero, must be written as well.
        _, a, b, _ = bounds
        a = tl.minimum(a, tl.cdiv(NQ, BM) * BM)
        bounds = (0, a, tl.maximum(b, a), NQ)
    for g in range(GROUP):
        where = (b0, b1, kv_head * GROUP + g)
        head_index = kv_head_index * GROUP + g
        terms = HeadTerms(
            locate_optional(problem.bias, where),
            locate_optional(x_t.bias, where),
            locate_optional(problem.mask, where),
            load_seed(problem, head_index),
        )
        for segment in tl.static_range(3):
            if segment_exists(segment, problem.right is not None, not EVEN_M or problem.left is not None, SPLIT):
                first, last = segment_bounds(bounds, segment, SPLIT)
                even = EVEN_M or segment == 1
                # Keys past the last one affect only their own rows of the gradients, which are not written. But in the
                # gradient of the query, ds k, they would be summed: with SINGLE_KEY_BLOCK they must be hidden.
                for m in range(first, last, BM):
                    i = m + r
                    q = load_query_rows(x.query, where, problem, m, r, d, even)
                    e = load_query_rows(rows.out_bar, where, problem, m, r, dv, even)
                    q_t = load_query_rows(x_t.query, where, problem, m, r, d, even)
                    e_t = load_query_rows(rows.out_bar_t, where, problem, m, r, dv, even)
                    if SINGLE_KEY_BLOCK:
                        delta = minus_lse_bar(rows.lse_bar, rows.lse, head_index, i, NQ)
                        delta_t = minus_lse_bar(rows.lse_bar_t, rows.lse, head_index, i, NQ) if JVP else delta
                    else:
                        delta = load_row_value(rows.delta, head_index, i, NQ, 0.0)
                        delta_t = load_row_value(rows.delta_t, head_index, i, NQ, 0.0) if JVP else delta
                    lse = load_lse(rows.lse, head_index, i, NQ, FOLD_SCALE)[None, :]
                    mu = load_row_value(rows.lse_t, head_index, i, NQ, 0.0)[None, :] if JVP else lse
                    row_renorm = (
                        load_row_value(rows.row_renorm, head_index, i, NQ, 1.0)[None, :]
                        if RENORMALIZE and not SINGLE_KEY_BLOCK
                        else None
                    )
                    p, pz, dp, p_t, pz_t, dp_t = probabilities(
                        score_products(k, k_t, v, v_t, q, q_t, e, e_t, PRECISION), RowStats(lse, row_renorm, mu), terms,
                        x_t, problem, i[None, :], j[:, None], JVP, FOLD_SCALE,
                        segment != 1 or (SINGLE_KEY_BLOCK and not EVEN_N), RENORMALIZE and SINGLE_KEY_BLOCK,
                    )  # fmt: skip
                    ds, ds_t = score_gradient(p, dp, p_t, dp_t, delta[None, :], delta_t[None, :], JVP, SINGLE_KEY_BLOCK)
                    pz = round_with_rest(pz, dtype, COMPENSATE)
                    ds = round_with_rest(ds, dtype, COMPENSATE)
                    ds_t = round_with_rest(ds_t, dtype, COMPENSATE)
                    if JVP:
                        pz_t = round_with_rest(pz_t, dtype, COMPENSATE)
                        grad_v = product_with_rest(pz_t, e, grad_v, COMPENSATE, PRECISION)
                        if e_t is not None:
                            grad_v = product_with_rest(pz, e_t, grad_v, COMPENSATE, PRECISION)
                        grad_k = product_with_rest(ds_t, q, grad_k, COMPENSATE, PRECISION)
                        if q_t is not None:
                            grad_k = product_with_rest(ds, q_t, grad_k, COMPENSATE, PRECISION)
                        if first_key is not None:
                            first_v = product_with_rest(pz, e, first_v, COMPENSATE, PRECISION)
                            first_k = product_with_rest(ds, q, first_k, COMPENSATE, PRECISION)
                    else:
                        grad_v = product_with_rest(pz, e, grad_v, COMPENSATE, PRECISION)
                        grad_k = product_with_rest(ds, q, grad_k, COMPENSATE, PRECISION)
                    if SINGLE_KEY_BLOCK:
                        grad_q = product_with_rest(transpose_with_rest(ds_t), k, None, COMPENSATE, PRECISION)
                        if k_t is not None:
                            grad_q = product_with_rest(transpose_with_rest(ds), k_t, grad_q, COMPENSATE, PRECISION)
                        grad_q = grad_q * problem.scale
                        store(grad_query, grad_query.ptr, grad_q, where, head_index, problem, m, r, d, NQ, D)
                        if first_query is not None:
                            first_q = product_with_rest(transpose_with_rest(ds), k, None, COMPENSATE, PRECISION)
                            first_q = first_q * problem.scale
                            store(grad_query, first_query, first_q, where, head_index, problem, m, r, d, NQ, D)
    grad_k = grad_k * problem.scale
    store(grad_key, grad_key.ptr, grad_k, kv_where, kv_head_index, problem, key, c, d, NK, D)
    store(grad_value, grad_value.ptr, grad_v, kv_where, kv_head_index, problem, key, c, dv, NK, DV)
    if first_key is not None:
        first_k = first_k * problem.scale
        store(grad_key, first_key, first_k, kv_where, kv_head_index, problem, key, c, d, NK, D)
        store(grad_value, first_value, first_v, kv_where, kv_head_index, problem, key, c, dv, NK, DV)
