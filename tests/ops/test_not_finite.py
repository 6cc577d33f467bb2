"""NaN and infinity: what is hidden from a row does not reach it, what it sees does, in every derivative and tiling."""

import math

import pytest
import torch
from torch.func import grad, jvp, vjp

import metaattn
from metaattn.backends import tiling
from tests.conftest import BACKENDS

ROWS, KEYS, HEADS = 6, 7, 2
I, J = torch.arange(ROWS)[:, None], torch.arange(KEYS)
_mask = torch.rand(HEADS, ROWS, KEYS, generator=torch.Generator().manual_seed(3)) < 0.5
_mask[:, 2] = False  # a row without keys
_mask[:, :, 5] = False  # a key that no row sees

# What hides keys: arguments of the operator, and which keys each row of each head sees.
HIDING = {
    "causal": ({"is_causal": True}, J <= I),
    "window": ({"window": (1, 2)}, (J >= I - 1) & (J <= I + 2)),
    "padding": ({"attn_mask": J < 5}, J < 5),
    "mask": ({"attn_mask": _mask}, _mask),
    "bias": ({"attn_mask": torch.where(_mask, 0.3, -torch.inf).double()}, _mask),
    "both": ({"attn_mask": _mask, "window": (None, 1)}, _mask & (J <= I + 1)),
}
# Where numbers are not finite: index of query, key, value or cotangent, and which of its elements.
PLACES = {
    "key": (1, (0, slice(None), 5)),
    "first_key": (1, (0, slice(None), 0, 1)),
    "value": (2, (0, slice(None), 5)),
    "one_number": (2, (0, 0, 4, 1)),
    "two_values": (2, (0, slice(None), slice(3, 5), 0)),
    "query": (0, (0, slice(None), 2)),
    "last_query": (0, (0, 1, ROWS - 1, 0)),
    "cotangent": (3, (0, slice(None), 2)),
    "last_cotangent": (3, (0, 0, ROWS - 1, 1)),
}
KINDS = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


def oracle(shown):
    """Return attention in which each row is computed from the keys that it sees, and from nothing else."""
    shown = shown.expand(HEADS, ROWS, KEYS)

    def row(q, k, v):
        if not len(k):
            return v.new_zeros(v.shape[-1])
        s = k @ q / math.sqrt(len(q))
        e = torch.exp(s - s.detach().amax())
        return ((e / e.sum())[:, None] * v).sum(0)

    def f(query, key, value):
        def head(q, k, v, shown):
            return torch.stack([row(q[i], k[shown[i]], v[shown[i]]) for i in range(ROWS)])

        return torch.stack([head(query[0, h], key[0, h], value[0, h], shown[h]) for h in range(HEADS)])[None]

    return f


def derivatives(f, x, w, tangents):
    """Return value, gradients, tangents, and second derivatives in both ways."""
    gradient = lambda *x: vjp(f, *x)[1](w)
    out, out_t = jvp(f, x, tangents)
    along = jvp(gradient, x, tangents)[1]
    again = grad(lambda *x: sum((a * t).sum() for a, t in zip(gradient(*x), tangents, strict=True)), (0, 1, 2))(*x)
    return {"value": [out], "tangent": [out_t], "gradient": gradient(*x), "along": along, "again": again}


def inputs(dtype, place, kind):
    g = torch.Generator().manual_seed(7)
    shapes = [(1, HEADS, n, 3) for n in (ROWS, KEYS, KEYS, ROWS)]
    x = [torch.randn(s, generator=g, dtype=torch.float64).to(dtype) for s in shapes]
    t = [torch.randn(s, generator=g, dtype=torch.float64).to(dtype) for s in shapes[:3]]
    which, at = PLACES[place]
    x[which][at] = KINDS[kind]
    return tuple(x[:3]), x[3], tuple(t)


def assert_same(got, want, tolerance):
    for name in want:
        for part, (a, b) in enumerate(zip(got[name], want[name], strict=True)):
            finite = b.isfinite()
            assert torch.equal(a.isfinite(), finite), f"{name}, part {part}: {a} instead of {b}"
            assert torch.allclose(a[finite].double(), b[finite].double(), tolerance, tolerance), f"{name}, part {part}"
            if name == "value":
                assert torch.equal(a.isnan(), b.isnan()), f"{name}: {a} instead of {b}"


@pytest.mark.parametrize("tiles", ["one", "many"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("hiding", HIDING)
@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_hidden_does_not_reach_a_row(backend, hiding, place, kind, tiles, monkeypatch):
    if tiles == "many":
        if backend == "reference":
            pytest.skip("it has no tiles")
        monkeypatch.setattr(tiling, "ROWS", 2)
        monkeypatch.setattr(tiling, "COLS", 3)
    check(backend, hiding, place, kind, torch.float64, 1e-9)


def check(backend, hiding, place, kind, dtype, tolerance):
    arguments, shown = HIDING[hiding]
    mask = arguments.get("attn_mask")
    if mask is not None and mask.is_floating_point():
        arguments = {**arguments, "attn_mask": mask.to(dtype)}
    x, w, t = inputs(torch.float64, place, kind)
    shown = shown & (x[0] @ x[1].mT != -torch.inf)[0]  # a score of -inf hides its key
    want = derivatives(oracle(shown), x, w, t)
    x, w, t = inputs(dtype, place, kind)
    got = derivatives(lambda *x: metaattn.sdpa(*x, **arguments, backend=backend), x, w, t)
    assert_same(got, want, tolerance)


@pytest.mark.parametrize("hiding", ["padding", "bias"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.usefixtures("small_tiles")
def test_third_derivatives(backend, hiding):
    """A key that no row sees may be NaN: nothing changes, and its derivatives are zero."""
    x, _, t = inputs(torch.float64, "key", "nan")
    t[2][:, :, 5] = torch.inf

    def third(*x):
        f = lambda *x: metaattn.sdpa(*x, **HIDING[hiding][0], backend=backend).sin().sum()
        second = lambda *x: jvp(grad(f, (0, 1, 2)), x, t)[1]
        return grad(lambda *x: sum((a * a).sum() for a in second(*x)), (0, 1, 2))(*x)

    got = third(*x)
    t[2][:, :, 5] = 0.0
    want = third(*(a.nan_to_num(0.0) for a in x))
    for a, b in zip(got, want, strict=True):
        assert b.any()
        assert torch.allclose(a, b)


def test_gradient_of_a_bias_that_hides():
    """Where a bias hides, its gradient is zero, whatever is there; elsewhere it is not affected."""
    x, w, _ = inputs(torch.float64, "key", "nan")
    bias = HIDING["bias"][0]["attn_mask"]
    for backend in BACKENDS:
        loss = lambda b, backend=backend: (metaattn.sdpa(*x, b, backend=backend) * w).sum()
        g = grad(loss)(bias)
        assert g.isfinite().all()
        assert not g[~_mask].any()
        assert g[_mask].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_infinite_scores(backend):
    """The softmax of an infinite score is NaN; a score of minus infinity hides its key."""
    q = torch.ones(1, 1, 2, 1)
    k = torch.tensor([1.0, math.inf, 2.0]).view(1, 1, 3, 1)
    out, lse = metaattn.sdpa(q, k, k.isfinite().float(), return_lse=True, backend=backend)
    assert out.isnan().all()
    assert lse.isnan().all()
    v = torch.tensor([1.0, math.nan, 1.0]).view(1, 1, 3, 1)
    mask = torch.zeros(2, 3)
    out, lse = metaattn.sdpa(q, -k, v, mask, return_lse=True, backend=backend)
    assert torch.allclose(out, torch.ones(()))
    assert lse.isfinite().all()
