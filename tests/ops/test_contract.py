"""The contract of sdpa: equality with PyTorch's attention where that exists, precision, memory, and masks."""

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

import metaattn
from tests.conftest import FUSED
from tests.helpers import TOLERANCE, as_vector, assert_close, error
from tests.ops.cases import CASES
from tests.ops.nestings import _dot

r = torch.randn
LIKE_TORCH = {
    "plain": ((2, 4, 5, 8), (2, 4, 7, 8), (2, 4, 7, 3), {}),
    "two_dims": ((5, 8), (7, 8), (7, 3), {}),
    "broadcast": ((2, 3, 5, 4), (1, 3, 5, 4), (3, 5, 4), {}),
    "one_key_head": ((2, 3, 5, 4), (2, 1, 5, 4), (2, 1, 5, 4), {}),
    "one_query_head": ((2, 1, 5, 4), (2, 3, 5, 4), (2, 3, 5, 4), {}),
    "causal_tall": ((2, 2, 7, 4), (2, 2, 3, 4), (2, 2, 3, 4), {"is_causal": True}),
    "causal_wide": ((2, 2, 3, 4), (2, 2, 7, 4), (2, 2, 7, 4), {"is_causal": True}),
    "gqa": ((2, 4, 5, 4), (2, 2, 7, 4), (2, 2, 7, 3), {"enable_gqa": True}),
    "gqa_uneven": ((2, 4, 5, 4), (2, 2, 7, 4), (2, 1, 7, 3), {"enable_gqa": True}),
    "scale": ((2, 2, 5, 4), (2, 2, 5, 4), (2, 2, 5, 4), {"scale": 0.3}),
    "bias": ((2, 2, 5, 4), (2, 2, 6, 4), (2, 2, 6, 4), {"attn_mask": r(2, 1, 1, 6)}),
    "bool": ((2, 2, 5, 4), (2, 2, 6, 4), (2, 2, 6, 4), {"attn_mask": r(5, 6) > 0}),
    "hides_all": ((2, 2, 5, 4), (2, 2, 6, 4), (2, 2, 6, 4), {"attn_mask": torch.zeros(5, 6, dtype=torch.bool)}),
    "no_keys": ((2, 2, 5, 4), (2, 2, 0, 4), (2, 2, 0, 4), {}),
    "no_rows": ((2, 2, 0, 4), (2, 2, 5, 4), (2, 2, 5, 4), {}),
    "empty_batch": ((0, 2, 5, 4), (0, 2, 5, 4), (0, 2, 5, 4), {}),
}


@pytest.mark.parametrize("backend", ["auto", "reference", "blockwise", *FUSED])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_derivatives_along_one_key_are_zero(dtype, backend):
    """The softmax of one key is constant: all derivatives of query, key and bias are zero, and not rounding errors."""
    shapes = [(2, 4, 9, 8), (2, 4, 1, 8), (2, 4, 1, 6), (4, 9, 1)]
    x, t = (tuple(torch.randn(s).to(dtype) for s in shapes) for _ in range(2))

    def attention(q, k, v, bias):
        return metaattn.sdpa(q, k, v, bias, backend=backend)

    def loss(*x):
        return attention(*x).float().sin().sum()

    gradient = torch.func.grad(loss, (0, 1, 2, 3))
    out, out_t = torch.func.jvp(attention, x, t)
    assert torch.equal(out, x[2].expand_as(out))
    assert torch.equal(out_t, t[2].expand_as(out))
    derivatives = (
        gradient(*x),
        torch.func.jvp(gradient, x, t)[1],
        torch.func.grad(lambda *x: _dot(gradient(*x), t), (0, 1, 2, 3))(*x),
        torch.func.jvp(lambda *x: torch.func.jvp(gradient, x, t)[1], x, t)[1],
    )
    for query, key, value, bias in derivatives:
        assert not query.any()
        assert not key.any()
        assert not bias.any()
        assert value.any()


@pytest.mark.parametrize("name", LIKE_TORCH)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_like_torch(name, dtype, backend):
    *shapes, options = LIKE_TORCH[name]
    x = [r(s).to(dtype).requires_grad_() for s in shapes]
    wide = [t.detach().double().requires_grad_() for t in x]
    want = F.scaled_dot_product_attention(*wide, **options)
    got = metaattn.sdpa(*x, **options, backend=backend)
    assert got.dtype == dtype
    assert_close(got, want, dtype)
    w = torch.randn_like(want)
    grads = torch.autograd.grad(got, x, w.to(dtype))
    assert [g.dtype for g in grads] == [dtype] * 3
    assert_close(grads, torch.autograd.grad(want, wide, w.to(dtype).double()), dtype, factor=2)


@pytest.mark.parametrize("backend", ["reference", "blockwise", *FUSED])
def test_output_keeps_the_layout_of_a_projection(backend):
    """If the heads of a token are adjacent in memory, they are in the output and its tangent too: no copy follows."""
    qkv = r(2, 5, 3, 4, 8).unbind(2)  # batch, tokens, query key or value, heads, size
    x = [t.transpose(1, 2) for t in qkv]
    out, tangent = torch.func.jvp(lambda *x: metaattn.sdpa(*x, backend=backend), tuple(x), tuple(map(torch.sin, x)))
    for t in (out, tangent, metaattn.sdpa(*x, backend=backend)):
        assert t.transpose(1, 2).flatten(-2).data_ptr() == t.data_ptr()
    with torch._subclasses.FakeTensorMode() as fake:
        assert metaattn.sdpa(*map(fake.from_tensor, x)).stride() == out.stride()
    assert metaattn.sdpa(*(t.contiguous() for t in x), backend=backend).is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", sorted(CASES))
def test_low_precision(name, dtype, backend):
    """The primitives in each dtype equal those in float64 on the same, rounded, numbers."""
    case = CASES[name]
    rounded = [x.to(dtype) for x in case.inputs()]
    t = [x.to(dtype) for x in case.like(10)]

    def derivatives(attention, x, t):
        def f(*x):
            out, lse = attention(*x)
            return out.double().sin().sum() + torch.where(torch.isinf(lse), 0.0, lse.double()).sum()

        g = torch.func.grad(f, tuple(range(len(x))))
        x, t = tuple(x), tuple(t)
        return attention(*x), torch.func.jvp(attention, x, t)[1], *torch.func.jvp(g, x, t)

    got = derivatives(case.attention(backend), rounded, t)
    want = derivatives(case.oracle(), [x.double() for x in rounded], [x.double() for x in t])
    assert got[0][0].dtype == dtype
    assert got[0][1].dtype == torch.float32
    for g, w in zip(got, want, strict=True):
        assert_close(as_vector(g), as_vector(w), dtype, factor=2)


def test_lse_dtype():
    for dtype, lse in ((torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)):
        x = r(1, 4, 4).to(dtype)
        assert metaattn.sdpa(x, x, x, return_lse=True)[1].dtype == lse


def test_large_scores(backend):
    """Nothing overflows where the softmax saturates, in any derivative."""
    q, k, v = (100 * r(1, 2, 6, 4) for _ in range(3))
    loss = lambda *x: metaattn.sdpa(*x, return_lse=True, backend=backend)[1].sum()
    g, h = torch.func.jvp(torch.func.grad(loss, (0, 1, 2)), (q, k, v), (k, v, q))
    assert all(t.isfinite().all() for t in (*g, *h))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("low", ["finfo.min", -1e9, 1e6])
def test_huge_finite_masks(low, dtype, backend):
    """Rows that a finite mask hides completely have weights that sum to one, in the value and in its derivatives."""
    q, k, v, t = (r(1, 2, 5, 4, dtype=dtype) for _ in range(4))
    mask = torch.zeros(5, 5, dtype=dtype)
    mask[1:3] = torch.finfo(dtype).min if low == "finfo.min" else low
    f = lambda *x: metaattn.sdpa(*x, mask, backend=backend)
    ones = torch.ones_like(v)
    assert_close(f(q, k, ones), ones, dtype)
    assert_close(torch.func.jvp(lambda v: f(q, k, v), (v,), (ones,))[1], ones, dtype)
    assert_close(torch.func.vjp(f, q, k, v)[1](ones)[2].sum(-2), torch.full((1, 2, 4), 5.0), dtype)
    # With all values equal to one, nothing changes along the query, and the sum of the gradient does not either.
    h = torch.func.jvp(lambda q: torch.func.vjp(f, q, k, ones)[1](ones), (q,), (t,))[1]
    assert_close(h[0], torch.zeros_like(q), dtype, factor=100)
    assert_close(h[2].sum(-2), torch.zeros(1, 2, 4), dtype, factor=100)


def test_rows_without_keys_have_zero_derivatives(backend):
    """Derivatives of every order and input are zero, whatever the cotangent of the lse."""
    x = tuple(r(1, 2, 4, 3, dtype=torch.float64) for _ in range(3))
    mask = torch.ones(4, 4, dtype=torch.bool)
    mask[1] = False

    def row(q, k, v):
        out, lse = metaattn.sdpa(q, k, v, mask, return_lse=True, backend=backend)
        return out[:, :, 1].sum() + (lse[:, :, 1] - lse[:, :, 1].detach()).nan_to_num(0.0).sum()

    assert metaattn.sdpa(*x, mask, return_lse=True, backend=backend)[1][0, 0, 1] == -torch.inf
    f = row
    for _ in range(3):
        g = torch.func.grad(f, (0, 1, 2))
        assert all((t == 0).all() for t in g(*x))
        f = lambda *x, g=g: sum(t.sin().sum() for t in g(*x))
    out, pull = torch.func.vjp(lambda *x: metaattn.sdpa(*x, mask, return_lse=True, backend=backend), *x)
    w = torch.zeros_like(out[1])
    w[:, :, 1] = torch.nan
    assert all((t == 0).all() for t in pull((torch.zeros_like(out[0]), w)))


def test_autocast(backend):
    x = [r(1, 2, 5, 4) for _ in range(3)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = metaattn.sdpa(*x, backend=backend)
        assert F.scaled_dot_product_attention(*x).dtype == got.dtype == torch.bfloat16
        assert metaattn.sdpa(*(t.double() for t in x), backend=backend).dtype == torch.float64
    rounded = [t.bfloat16() for t in x]
    assert torch.equal(got, metaattn.sdpa(*rounded, backend=backend))  # accumulators keep their dtype


def test_autocast_of_mixed_dtypes():
    q, k = r(1, 2, 5, 4), r(1, 2, 5, 4).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(metaattn.sdpa(q, k, k), metaattn.sdpa(q.bfloat16(), k, k))
        half, mask = q.half(), r(5, 5).half()  # a mask of the query's own dtype, as without autocast
        assert metaattn.sdpa(half, half, half, mask).dtype == torch.bfloat16
        # and one of autocast's, as a model in low precision makes it
        got = metaattn.sdpa(q, k, k, mask.bfloat16())
        assert_close(got, F.scaled_dot_product_attention(q, k, k, mask.bfloat16()), torch.bfloat16)


def test_meta_tensors():
    x = torch.empty(1, 2, 5, 4, device="meta")
    assert metaattn.sdpa(x, x, x).shape == x.shape


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant, backend):
    x = r(1, 2, 5, 4, requires_grad=True)
    f = lambda x: metaattn.sdpa(x.sin(), x, x, backend=backend).cos()
    (want,) = torch.autograd.grad(f(x).sum(), x)
    checkpoint(f, x, use_reentrant=reentrant).sum().backward()
    assert torch.equal(x.grad, want)


def test_checkpointed_double_backward(backend):
    x = r(1, 2, 5, 4, dtype=torch.float64, requires_grad=True)
    f = lambda x: metaattn.sdpa(x.sin(), x, x, backend=backend).cos().square().sum()

    def double(f):
        (g,) = torch.autograd.grad(f(x), x, create_graph=True)
        return torch.autograd.grad(g.square().sum(), x)[0]

    assert_close(double(lambda x: checkpoint(f, x, use_reentrant=False)), double(f))


def test_no_graph_is_built_without_need():
    x = r(1, 2, 4, 4, requires_grad=True)
    with torch.no_grad():
        assert not metaattn.sdpa(x, x, x).requires_grad
    assert not metaattn.sdpa(x.detach(), x.detach(), x.detach()).requires_grad


def test_memory_is_released(backend):
    """No reference cycle keeps a graph alive, whichever orders of derivatives were taken."""
    gc.disable()
    try:
        x = r(1, 2, 4, 4, requires_grad=True)
        out = metaattn.sdpa(x, x, x, backend=backend)
        (g,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
        (h,) = torch.autograd.grad(g.square().sum(), x, create_graph=True)
        alive = [weakref.ref(t) for t in (x, out, g, h)]
        del x, out, g, h
        assert [ref() for ref in alive] == [None] * 4
    finally:
        gc.enable()


def test_saved_tensors_are_guarded():
    """Changing an input in place before the backward raises instead of giving a wrong gradient."""
    x = r(1, 2, 4, 4, requires_grad=True)
    y = x.clone()
    out = metaattn.sdpa(y, y, y)
    y.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


class _Largest(TorchDispatchMode):
    """Records the size of the largest tensor that any operation returns."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor):
                self.numel = max(self.numel, t.untyped_storage().nbytes() // t.element_size())
        return out


def _largest(n, order):
    from metaattn.backends import blockwise, tiling
    from metaattn.backends.base import BackwardJvpInputs, Operands, Problem, Rows, Tangent

    x = Operands(*(torch.randn(1, 2, n, 8) for _ in range(3)))
    t = Tangent(*(torch.randn(1, 2, n, 8) for _ in range(3)))
    w, problem = Rows(torch.randn(1, 2, n, 8)), Problem(0.3)
    largest = _Largest()
    backend = blockwise.backend
    with largest:
        values = backend.forward(problem, x)
        if order == "backward":
            backend.backward(problem, x, values, w, bias_grad=False)
        if order == "forward_jvp":
            backend.forward_jvp(problem, x, values, t)
        if order == "backward_jvp":
            vt = backend.forward_jvp(problem, x, values, t)
            backend.backward_jvp(problem, x, BackwardJvpInputs(values, vt, w, t))
        if order == "third":
            blockwise.gradient(problem, x, values, w, [t, t], cotangent_tangent=Rows(), bias_grad=False)
    return largest.numel, tiling.TILE


@pytest.mark.parametrize("order", ["forward", "backward", "forward_jvp", "backward_jvp", "third"])
def test_blockwise_memory_does_not_grow_with_the_square(order, monkeypatch):
    from metaattn.backends import tiling

    for name, size in (("ROWS", 16), ("COLS", 16), ("TILE", 512)):
        monkeypatch.setattr(tiling, name, size)
    largest, tile = _largest(128, order)
    assert largest <= max(tile, 128 * 2 * 8)  # a tile, or an operand; the score matrix would be 128 * 128 * 2


@pytest.mark.parametrize("sizes", [(2, 3, 1), (1, 1, 6), (2, 3, 18), (5, 7, 2**19), (3, 2, 100)], ids=str)
def test_any_tiling_gives_the_same(sizes, monkeypatch):
    from metaattn.backends import tiling

    case = CASES["everything"]
    x, t = case.inputs(), case.like(10)

    def f(*x):
        out, lse = case.attention("blockwise")(*x)
        return out.sin().sum() + lse.cos().sum()

    def hvp():
        return torch.func.jvp(torch.func.grad(f, (0, 1, 2, 3)), x, t)

    want = hvp()
    for name, size in zip(("ROWS", "COLS", "TILE"), sizes, strict=True):
        monkeypatch.setattr(tiling, name, size)
    assert_close(hvp(), want)


def test_lse_merges_splits_of_the_keys(backend):
    """Attention over parts of the keys, merged by the lse, equals attention over all keys, in every derivative."""
    x = tuple(r(1, 2, 6, 4, dtype=torch.float64) for _ in range(3))
    t = tuple(r(1, 2, 6, 4, dtype=torch.float64) for _ in range(3))

    def whole(q, k, v):
        return metaattn.sdpa(q, k, v, backend="reference").sin().sum()

    def merged(q, k, v):
        parts = [
            metaattn.sdpa(q, k[:, :, s], v[:, :, s], return_lse=True, backend=backend)
            for s in (slice(0, 2), slice(2, 6))
        ]
        lse = torch.stack([part[1] for part in parts])
        weights = (lse - lse.logsumexp(0)).exp().unsqueeze(-1)
        return (weights * torch.stack([part[0] for part in parts])).sum(0).sin().sum()

    every = (0, 1, 2)
    assert_close(merged(*x), whole(*x))
    assert_close(
        torch.func.jvp(torch.func.grad(merged, every), x, t), torch.func.jvp(torch.func.grad(whole, every), x, t)
    )


def test_error_measure_sees_errors():
    """The comparison fails on NaN, on a wrong shape, on a missing infinity, and on a small error."""
    a = r(3, 4, dtype=torch.float64)
    assert error(a, a) == 0
    assert error(a + 1e-6, a) > 1e-8
    for wrong in (a * torch.nan, a[:2], torch.where(a > 0, torch.inf, a)):
        with pytest.raises(AssertionError):
            error(wrong, a)
    assert _dot((a,), (a,)) > 0
