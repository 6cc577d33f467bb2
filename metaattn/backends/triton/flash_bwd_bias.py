"""The kernel of B and S for an additive mask: the gradient of the scores, summed over what the mask is broadcast to."""

import triton
import triton.language as tl

from .flash_bwd import RowStats, probabilities, score_gradient, score_products
from .tile_ops import (
    HeadTerms,
    key_head,
    load_key_rows,
    load_lse,
    load_query_rows,
    load_row_value,
    load_seed,
    locate_optional,
)


@triton.jit
def attention_backward_bias(
    x,  # Inputs: query, key, value
    x_t,  # Inputs: their tangents; each may be absent
    problem,  # KernelProblem
    rows,  # RowInputs, with the deltas that attention_backward_rows wrote
    grad_bias,  # [SPLITS, *bias] contiguous, float32
    split,  # BiasSplit
    D: tl.constexpr,
    DV: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    JVP: tl.constexpr,
    FOLD_SCALE: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Compute one tile of a bias's gradient: its sum over a share of the heads, and over broadcast rows and keys."""
    NQ = problem.NQ
    NK = problem.NK
    r = tl.arange(0, BM)
    c = tl.arange(0, BN)
    d = tl.arange(0, D)
    dv = tl.arange(0, DV)
    row_blocks = tl.cdiv(NQ, BM)
    key_blocks = tl.cdiv(NK, BN)
    # The program's number says which tile of the bias, which of its matrices, and which share of the sum.
    pid = tl.program_id(0)
    tile_rows = row_blocks if split.row is not None else 1
    tile_keys = key_blocks if split.col is not None else 1
    tile_row = pid % tile_rows
    pid = pid // tile_rows
    tile_key = pid % tile_keys
    pid = pid // tile_keys
    bias_index = pid % split.BIAS_HEADS
    share = pid // split.BIAS_HEADS
    bias_head = bias_index % split.HEADS
    bias_b = bias_index // split.HEADS
    bias_b1 = bias_b % split.BATCH1
    bias_b0 = bias_b // split.BATCH1

    total = tl.zeros([BM, BN], tl.float32)
    # The heads that this matrix of the bias is broadcast to are numbered from 0. A share is every SPLITS-th of them.
    for t in range(share, split.SUMMED, split.SPLITS):
        h = t % split.SUMMED_HEADS
        t_b = t // split.SUMMED_HEADS
        # In each dimension one of the two terms is 0: either the bias has the dimension, or it is broadcast along it.
        head = bias_head + h
        b1 = bias_b1 + t_b % split.SUMMED_BATCH1
        b0 = bias_b0 + t_b // split.SUMMED_BATCH1
        where = (b0.to(tl.int64), b1.to(tl.int64), head.to(tl.int64))
        kv_where = key_head(where, problem)
        head_index = ((b0 * problem.BATCH1 + b1) * problem.HEADS + head).to(tl.int64)
        terms = HeadTerms(
            locate_optional(problem.bias, where),
            locate_optional(x_t.bias, where),
            locate_optional(problem.mask, where),
            load_seed(problem, head_index),
        )
        first_row = tile_row if split.row is not None else 0
        last_row = tile_row + 1 if split.row is not None else row_blocks
        first_key = tile_key if split.col is not None else 0
        last_key = tile_key + 1 if split.col is not None else key_blocks
        for m in range(first_row, last_row):
            i = m * BM + r
            q = load_query_rows(x.query, where, problem, m * BM, r, d, False)
            e = load_query_rows(rows.out_bar, where, problem, m * BM, r, dv, False)
            q_t = load_query_rows(x_t.query, where, problem, m * BM, r, d, False)
            e_t = load_query_rows(rows.out_bar_t, where, problem, m * BM, r, dv, False)
            delta = load_row_value(rows.delta, head_index, i, NQ, 0.0)
            delta_t = load_row_value(rows.delta_t, head_index, i, NQ, 0.0) if JVP else delta
            mu = load_row_value(rows.lse_t, head_index, i, NQ, 0.0)[:, None] if JVP else delta
            lse = load_lse(rows.lse, head_index, i, NQ, FOLD_SCALE)[:, None]
            row_renorm = load_row_value(rows.row_renorm, head_index, i, NQ, 1.0)[:, None] if RENORMALIZE else None
            for n in range(first_key, last_key):
                k = load_key_rows(x.key, kv_where, problem, n * BN, c, d, False)
                v = load_key_rows(x.value, kv_where, problem, n * BN, c, dv, False)
                k_t = load_key_rows(x_t.key, kv_where, problem, n * BN, c, d, False)
                v_t = load_key_rows(x_t.value, kv_where, problem, n * BN, c, dv, False)
                p, _, dp, p_t, _, dp_t = probabilities(
                    score_products(q, q_t, e, e_t, k, k_t, v, v_t, PRECISION), RowStats(lse, row_renorm, mu), terms,
                    x_t, problem, i[:, None], (n * BN + c)[None, :], JVP, FOLD_SCALE, True, False,
                )  # fmt: skip
                _, ds_t = score_gradient(p, dp, p_t, dp_t, delta[:, None], delta_t[:, None], JVP, False)
                total += ds_t
    i = tile_row * BM + r
    j = tile_key * BN + c
    at = grad_bias + share.to(tl.int64) * split.SIZE + bias_index.to(tl.int64) * split.MATRIX
    if split.row is not None and split.col is not None:
        p = at + i.to(tl.int64)[:, None] * NK + j[None, :]
        tl.store(p, total, mask=(i < NQ)[:, None] & (j < NK)[None, :])
    elif split.row is not None:
        tl.store(at + i, tl.sum(total, 1), mask=i < NQ)
    elif split.col is not None:
        tl.store(at + j, tl.sum(total, 0), mask=j < NK)
    else:
        tl.store(at, tl.sum(tl.sum(total, 1), 0))
