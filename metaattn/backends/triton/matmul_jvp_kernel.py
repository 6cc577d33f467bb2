"""The kernel of batched matrix products and their tangents: one or two products, independent of each other."""

import triton
import triton.language as tl

from .tile_ops import product


@triton.jit
def stepped(i, stride):
    """Return ``i * stride``. A stride of ``None`` is 1, because an integer 1 in a nested tuple breaks Triton 3.6."""
    if stride is None:
        return i
    else:
        return i * stride


@triton.jit
def load_block(x, batch, m, n, M, N, EVEN_M: tl.constexpr, EVEN_N: tl.constexpr):
    """Load elements ``[m, n]`` of a matrix ``[M, N]``; zeros past its ends. EVEN says that an end is not exceeded."""
    p = x.ptr + stepped(batch, x.batch) + stepped(m, x.row)[:, None] + stepped(n, x.col)[None, :]
    if EVEN_M and EVEN_N:
        return tl.load(p)
    elif EVEN_M:
        return tl.load(p, mask=(n < N)[None, :], other=0.0)
    elif EVEN_N:
        return tl.load(p, mask=(m < M)[:, None], other=0.0)
    else:
        return tl.load(p, mask=(m < M)[:, None] & (n < N)[None, :], other=0.0)


@triton.jit
def store_block(at, x, batch, m, n, M, N):
    """Store a block of a contiguous result."""
    p = at + batch * (M * N) + m[:, None] * N + n[None, :]
    tl.store(p, x.to(at.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :])


@triton.jit
def matmul_jvp_block(
    job,  # Job: factors, results, sizes
    pid,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    EVEN_M: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Compute one block of ``a b`` and of its tangent ``a. b + a b.``, each if it is requested."""
    M = job.M
    N = job.N
    K = job.K
    rows = tl.cdiv(M, BM)
    tiles = rows * tl.cdiv(N, BN)
    batch = (pid // tiles).to(tl.int64)
    tile = pid % tiles
    m = tile % rows * BM + tl.arange(0, BM)
    n = tile // rows * BN + tl.arange(0, BN)
    value = tl.zeros([BM, BN], tl.float32)
    tangent = tl.zeros([BM, BN], tl.float32)
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)
        a = load_block(job.a, batch, m, k, M, K, EVEN_M, EVEN_K)
        b = load_block(job.b, batch, k, n, K, N, EVEN_K, EVEN_N)
        if job.value is not None:
            value = product(a, b, value, PRECISION)
        if job.tangent is not None:
            a_t = load_block(job.a_t, batch, m, k, M, K, EVEN_M, EVEN_K)
            b_t = load_block(job.b_t, batch, k, n, K, N, EVEN_K, EVEN_N)
            tangent = product(a_t, b, tangent, PRECISION)
            tangent = product(a, b_t, tangent, PRECISION)
    if job.value is not None:
        store_block(job.value, value, batch, m, n, M, N)
    if job.tangent is not None:
        store_block(job.tangent, tangent, batch, m, n, M, N)


@triton.jit
def matmul_jvp(
    first,  # Job
    second,  # Job; without factors if there is only one product
    split,  # number of programs of the first product; all others compute the second
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    EVEN_M: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    BM2: tl.constexpr,
    BN2: tl.constexpr,
    BK2: tl.constexpr,
    EVEN_M2: tl.constexpr,
    EVEN_N2: tl.constexpr,
    EVEN_K2: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Compute one or two products side by side."""
    pid = tl.program_id(0)
    if second.a.ptr is None:
        matmul_jvp_block(first, pid, BM, BN, BK, EVEN_M, EVEN_N, EVEN_K, PRECISION)
    else:
        if pid < split:
            matmul_jvp_block(first, pid, BM, BN, BK, EVEN_M, EVEN_N, EVEN_K, PRECISION)
        else:
            matmul_jvp_block(second, pid - split, BM2, BN2, BK2, EVEN_M2, EVEN_N2, EVEN_K2, PRECISION)
