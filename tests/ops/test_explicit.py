"""sdpa_jvp, sdpa_vjp and sdpa_hvp against torch.func, on every backend."""

import pytest
import torch
from torch.func import grad, jvp, vjp

import metaattn
from tests.helpers import assert_close
from tests.ops.cases import CASES

pytestmark = pytest.mark.usefixtures("small_tiles")
NAMES = sorted(CASES.keys() - {"dropout", "everything"})  # two calls draw different masks


def _call(name, backend):
    case = CASES[name]
    qkv, mask = case._split(case.inputs())
    primals = (*qkv, mask)
    tangents = tuple(None if x is None or x.dtype == torch.bool else torch.randn_like(x) for x in primals)
    differentiable = 4 if tangents[3] is not None else 3
    plain = tuple(None if x is None else x.contiguous() for x in primals)  # torch.func.jvp takes no expanded tensors

    def f(*x):
        return metaattn.sdpa(*x, *primals[len(x) :], **case.options, return_lse=True, backend=backend)

    options = {**case.options, "backend": backend}
    return f, primals, plain[:differentiable], tangents, options


@pytest.mark.parametrize("name", NAMES)
def test_jvp(name, backend):
    f, primals, plain, tangents, options = _call(name, backend)
    n = len(plain)
    got = metaattn.sdpa_jvp(primals, tangents, **options)
    (out, lse), (out_t, lse_t) = jvp(f, plain, tangents[:n])
    assert_close(got, (out, lse, out_t, lse_t))


@pytest.mark.parametrize("name", NAMES)
def test_vjp(name, backend):
    f, primals, plain, _, options = _call(name, backend)
    n = len(plain)
    (out, lse), pull = vjp(f, *plain)
    w = (torch.randn_like(out), torch.randn_like(lse))
    got = metaattn.sdpa_vjp(primals, w, **options)
    assert_close((got.out, got.lse, got.gradients[:n]), (out, lse, pull(w)))
    assert_close(metaattn.sdpa_vjp(primals, w[0], **options).gradients[:n], pull((w[0], torch.zeros_like(lse))))


@pytest.mark.parametrize("name", NAMES)
def test_hvp(name, backend):
    f, primals, plain, tangents, options = _call(name, backend)
    n = len(plain)
    out, lse = f(*plain)
    w = (torch.randn_like(out), torch.randn_like(lse))

    def phi(*x):
        out, lse = f(*x)
        return (w[0] * out).sum() + (w[1] * torch.where(torch.isinf(lse), 0.0, lse)).sum()

    want = jvp(grad(phi, tuple(range(n))), plain, tangents[:n])[1]
    got = metaattn.sdpa_hvp(primals, tangents, w, **options)
    assert_close(got.product[:n], want)
    assert_close((got.out, got.lse), (out, lse))
    assert_close((got.out_tangent, got.lse_tangent), jvp(f, plain, tangents[:n])[1])


def test_a_jvp_is_not_a_vjp(backend):
    """The Jacobian is not symmetric: its jvp and vjp differ, and are adjoint."""
    q, k, v, t = (torch.randn(1, 2, 5, 4, dtype=torch.float64) for _ in range(4))
    jvp_ = metaattn.sdpa_jvp((q, k, v), (t, None, None), backend=backend).out_tangent
    vjp_ = metaattn.sdpa_vjp((q, k, v), t, backend=backend).gradients.query
    assert (jvp_ - vjp_).norm() > 0.1 * vjp_.norm()
    w = torch.randn_like(t)
    vjp_ = metaattn.sdpa_vjp((q, k, v), w, backend=backend).gradients.query
    assert torch.allclose((w * jvp_).sum(), (vjp_ * t).sum())


def test_the_hessian_is_symmetric(backend):
    x = tuple(torch.randn(1, 2, 5, 4, dtype=torch.float64) for _ in range(3))
    s, t = (tuple(map(torch.randn_like, x)) for _ in range(2))
    w = torch.randn_like(x[0])
    hs = metaattn.sdpa_hvp(x, s, w, backend=backend).product[:3]
    ht = metaattn.sdpa_hvp(x, t, w, backend=backend).product[:3]
    dot = lambda a, b: sum((i * j).sum() for i, j in zip(a, b, strict=True))
    assert torch.allclose(dot(hs, t), dot(ht, s))


def test_differentiable(backend):
    q, k, v, t = (torch.randn(1, 2, 5, 4, dtype=torch.float64) for _ in range(4))
    f = lambda q: metaattn.sdpa_hvp((q, k, v), (t, t, t), t, backend=backend).product.value.sin().sum()
    loss = lambda q, k, v: (t * metaattn.sdpa(q, k, v, backend="reference")).sum()
    want = lambda q: jvp(grad(loss, 2), (q, k, v), (t, t, t))[1].sin().sum()
    assert_close(grad(f)(q), grad(want)(q))


def test_missing_tangents_are_zeros(backend):
    x = tuple(torch.randn(1, 2, 5, 4, dtype=torch.float64) for _ in range(3))
    t = torch.randn_like(x[1])
    zero = torch.zeros_like(t)
    assert_close(
        metaattn.sdpa_hvp(x, (None, t, None), (t, None), backend=backend),
        metaattn.sdpa_hvp(x, (zero, t, zero), t, backend=backend),
    )
    assert_close(metaattn.sdpa_vjp(x, [t, None], backend=backend), metaattn.sdpa_vjp(x, t, backend=backend))


def test_tangents_and_cotangents_under_autocast():
    """Tangents may have the dtype of the inputs, or that of autocast."""
    x = tuple(torch.randn(1, 2, 5, 4) for _ in range(3))
    with torch.autocast("cpu", torch.bfloat16):
        wide = metaattn.sdpa_hvp(x, x, x[0])
        narrow = metaattn.sdpa_hvp(x, [t.bfloat16() for t in x], x[0].bfloat16())
    assert wide.out_tangent.dtype == torch.bfloat16
    assert wide.product.query.dtype == torch.float32
    assert_close(wide, narrow)


X = tuple(torch.zeros(1, 2, 5, 4) for _ in range(3))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: metaattn.sdpa_jvp(X[:2], X[:2]), ValueError, r"primals must be \(query, key, value\).*got 2"),
        (lambda: metaattn.sdpa_jvp(torch.zeros(3, 2, 5, 4), X), TypeError, r"primals must be .*; got one tensor"),
        (lambda: metaattn.sdpa_jvp(X, X[:2]), ValueError, "one tangent for each of the 3 primals; got 2"),
        (lambda: metaattn.sdpa_jvp(X, (None,) * 3), ValueError, "all tangents are None"),
        (lambda: metaattn.sdpa_jvp(X, (X[0][0], None, None)), ValueError, "tangent of query must have its shape"),
        (lambda: metaattn.sdpa_jvp((*X, None), (*X, X[0])), ValueError, "attn_mask has no tangent"),
        (lambda: metaattn.sdpa_jvp((*X, X[0][0, 0, :, :1] > 0), (*X, X[0])), ValueError, "attn_mask has no tangent"),
        (
            lambda: metaattn.sdpa_jvp(X, (X[0].double(), None, None)),
            TypeError,
            r"tangent of query must have its dtype, torch.float32; got torch.float64: convert it",
        ),
        (lambda: metaattn.sdpa_vjp(X, X[0].double()), TypeError, "cotangent of out must have its dtype, torch.float32"),
        (
            lambda: metaattn.sdpa_vjp([x.bfloat16() for x in X], (None, X[0][..., 0].bfloat16())),
            TypeError,
            "cotangent of lse must have its dtype, torch.float32; got torch.bfloat16",
        ),
        (lambda: metaattn.sdpa_vjp(X, (X[0],) * 3), TypeError, r"a tensor or a pair \(of out, of lse\); got tuple"),
        (lambda: metaattn.sdpa_vjp(X, X[0], backend="vendor"), NotImplementedError, "needs a CUDA device"),
        (lambda: metaattn.sdpa_vjp(X, X[0][0]), ValueError, "cotangent of out must have its shape"),
        (lambda: metaattn.sdpa_vjp(X, (X[0], X[0])), ValueError, "cotangent of lse must have its shape"),
        (lambda: metaattn.sdpa_vjp(X, (None, None)), ValueError, "both cotangents are None"),
        (lambda: metaattn.sdpa_vjp(X, X[0], causal=True), TypeError, r"unexpected options \['causal'\]"),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()
