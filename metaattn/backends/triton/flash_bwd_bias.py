"""B and S for an additive mask: the gradient of the scores, summed over all that the mask is broadcast to."""

import triton
import triton.language as tl

from .flash_bwd import probabilities, products, score_gradient
from .tile_ops import key_head, load_key, load_lse, load_query, load_stat, locate


@triton.jit
def by_bias(
    x,
    x_t,
    problem,
    w,  # with the deltas that by_row or the launcher left
    grad_bias,  # [SPLITS, *bias] contiguous, float32
    part,  # of the bias: View with strides of grad_bias (None where broadcast), and its sizes
    D: tl.constexpr,
    DV: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    SECOND: tl.constexpr,
    FOLD: tl.constexpr,
    EXACT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The gradient of one tile of a bias, over one share of the heads, rows and keys that it is broadcast to."""
    NQ = problem.NQ
    NK = problem.NK
    r = tl.arange(0, BM)
    c = tl.arange(0, BN)
    d = tl.arange(0, D)
    dv = tl.arange(0, DV)
    row_blocks = tl.cdiv(NQ, BM)
    key_blocks = tl.cdiv(NK, BN)
    # Of the grid: the tile in the bias, its batch and head, and the share.
    pid = tl.program_id(0)
    tile_rows = row_blocks if part.row is not None else 1
    tile_keys = key_blocks if part.col is not None else 1
    tile_row = pid % tile_rows
    pid = pid // tile_rows
    tile_key = pid % tile_keys
    pid = pid // tile_keys
    own = pid % part.OWN
    share = pid // part.OWN
    own_h = own % part.HEADS
    own_b = own // part.HEADS
    own_b1 = own_b % part.BATCH1
    own_b0 = own_b // part.BATCH1

    total = tl.zeros([BM, BN], tl.float32)
    # All (batch, head) pairs that this part of the bias serves: a range, of which the share is a stride.
    for t in range(share, part.SERVES, part.SPLITS):
        h = t % part.SERVES_HEADS
        t_b = t // part.SERVES_HEADS
        # One of (own, served) is 0 in each dimension: the bias has it, or is broadcast along it.
        head = own_h + h
        b1 = own_b1 + t_b % part.SERVES_BATCH1
        b0 = own_b0 + t_b // part.SERVES_BATCH1
        where = (b0.to(tl.int64), b1.to(tl.int64), head.to(tl.int64))
        shared = key_head(where, problem)
        flat = ((b0 * problem.BATCH1 + b1) * problem.HEADS + head).to(tl.int64)
        bias_at = locate(problem.bias, where)
        mask_at = locate(problem.mask, where) if problem.mask.ptr is not None else None
        bias_t_at = locate(x_t.bias, where) if x_t.bias.ptr is not None else None
        seed = tl.load(problem.seeds + flat) if problem.seeds is not None else None
        first_row = tile_row if part.row is not None else 0
        last_row = tile_row + 1 if part.row is not None else row_blocks
        first_key = tile_key if part.col is not None else 0
        last_key = tile_key + 1 if part.col is not None else key_blocks
        for m in range(first_row, last_row):
            i = m * BM + r
            q = load_query(x.query, where, problem, m * BM, r, d, False)
            e = load_query(w.out, where, problem, m * BM, r, dv, False)
            q_t = load_query(x_t.query, where, problem, m * BM, r, d, False)
            e_t = load_query(w.out_t, where, problem, m * BM, r, dv, False)
            delta = load_stat(w.delta, flat, i, NQ, 0.0)
            delta_t = load_stat(w.delta_t, flat, i, NQ, 0.0) if SECOND else delta
            mu = load_stat(w.lse_value_t, flat, i, NQ, 0.0)[:, None] if SECOND else delta
            lse = load_lse(w.lse_value, flat, i, NQ)[:, None]
            gain = load_stat(w.gain, flat, i, NQ, 1.0)[:, None] if EXACT else None
            for n in range(first_key, last_key):
                k = load_key(x.key, shared, problem, n * BN, c, d, False)
                v = load_key(x.value, shared, problem, n * BN, c, dv, False)
                k_t = load_key(x_t.key, shared, problem, n * BN, c, d, False)
                v_t = load_key(x_t.value, shared, problem, n * BN, c, dv, False)
                s, s_t, dp, dp_t = products(q, q_t, e, e_t, k, k_t, v, v_t, PRECISION)
                p, _, dp, p_t, _, dp_t = probabilities(
                    s, s_t, dp, dp_t, lse, gain, mu, x_t, problem, bias_at, bias_t_at, mask_at, seed,
                    i[:, None], (n * BN + c)[None, :], SECOND, FOLD, True, False,
                )  # fmt: skip
                _, ds_t = score_gradient(p, dp, p_t, dp_t, delta[:, None], delta_t[:, None], SECOND, False)
                total += ds_t
    i = tile_row * BM + r
    j = tile_key * BN + c
    at = grad_bias + share.to(tl.int64) * part.SIZE + own.to(tl.int64) * part.MATRIX
    if part.row is not None and part.col is not None:
        p = at + i.to(tl.int64)[:, None] * NK + j[None, :]
        tl.store(p, total, mask=(i < NQ)[:, None] & (j < NK)[None, :])
    elif part.row is not None:
        tl.store(at + i, tl.sum(total, 1), mask=i < NQ)
    elif part.col is not None:
        tl.store(at + j, tl.sum(total, 0), mask=j < NK)
    else:
        tl.store(at, tl.sum(tl.sum(total, 1), 0))
