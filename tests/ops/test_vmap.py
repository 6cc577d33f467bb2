"""vmap over the operator: every placement of the mapped dimension, unmapped operands, randomness."""

import itertools

import pytest
import torch
from torch.func import grad, jvp, vmap

import metaattn
from metaattn.ops import operators
from tests.helpers import assert_close, dense

pytestmark = pytest.mark.usefixtures("small_tiles")
SAMPLES = 3


def _operands():
    """Query, key, value and bias of one sample, with ranks 3, 3, 3 and 2."""
    return [torch.randn(s, dtype=torch.float64) for s in ((2, 4, 3), (2, 5, 3), (2, 5, 2), (4, 5))]


def _map(operands, in_dims):
    """Stack samples along each in_dim; operands that are not mapped stay as they are."""
    stacked = [
        x if d is None else torch.stack([x, x.sin(), x.cos()], d) for x, d in zip(operands, in_dims, strict=True)
    ]
    samples = [
        [x if d is None else x.select(d, i) for x, d in zip(stacked, in_dims, strict=True)] for i in range(SAMPLES)
    ]
    return stacked, samples


IN_DIMS = [
    d
    for d in itertools.product((0, 1, -1, None), (0, 2, None), (1, -1, None), (0, None))
    if any(x is not None for x in d)
]


@pytest.mark.parametrize("in_dims", IN_DIMS, ids=str)
def test_in_dims(in_dims, backend):
    stacked, samples = _map(_operands(), in_dims)
    f = lambda *x: metaattn.sdpa(*x, return_lse=True, backend=backend)
    want = [dense(*s) for s in samples]
    assert_close(vmap(f, in_dims)(*stacked), tuple(torch.stack(w) for w in zip(*want, strict=True)))


@pytest.mark.parametrize("in_dims", IN_DIMS[::5], ids=str)
def test_in_dims_of_second_derivatives(in_dims, backend):
    stacked, samples = _map(_operands(), in_dims)
    tangents = tuple(torch.randn_like(x) for x in _operands())

    def hvp(f):
        loss = lambda *x: f(*x).sin().sum()
        return lambda *x: jvp(grad(loss, (0, 1, 2, 3)), x, tangents)[1]

    got = vmap(hvp(lambda *x: metaattn.sdpa(*x, backend=backend)), in_dims)(*stacked)
    want = [hvp(lambda *x: dense(*x)[0])(*s) for s in samples]
    assert_close(got, tuple(torch.stack(w) for w in zip(*want, strict=True)))


@pytest.mark.parametrize("out_dims", [0, 1, 2, -1, 3])
def test_out_dims(out_dims, backend):
    q, k, v = (torch.randn(SAMPLES, *x.shape, dtype=torch.float64) for x in _operands()[:3])
    got = vmap(lambda *x: metaattn.sdpa(*x, backend=backend), out_dims=out_dims)(q, k, v)
    assert_close(got, torch.stack([dense(*s)[0] for s in zip(q, k, v, strict=True)], out_dims))


def test_nested_levels_map_different_operands(backend):
    q, k, v, _ = _operands()
    qs, ks = torch.stack([q, q.sin(), q.cos()]), torch.stack([k, k.sin()])
    f = lambda q, k: metaattn.sdpa(q, k, v, backend=backend)
    got = vmap(vmap(f, (None, 0)), (0, None))(qs, ks)
    want = torch.stack([torch.stack([dense(a, b, v)[0] for b in ks]) for a in qs])
    assert_close(got, want)


def test_chunks(backend):
    q, k, v = (torch.randn(5, *x.shape, dtype=torch.float64) for x in _operands()[:3])
    f = lambda *x: metaattn.sdpa(*x, backend=backend)
    assert_close(vmap(f, chunk_size=2)(q, k, v), vmap(f)(q, k, v))


def test_mapped_boolean_mask(backend):
    q, k, v, _ = _operands()
    masks = torch.rand(SAMPLES, 4, 5) < 0.6
    got = vmap(lambda m: metaattn.sdpa(q, k, v, m, backend=backend))(masks)
    assert_close(got, torch.stack([dense(q, k, v, m)[0] for m in masks]))


def test_unmapped_operands_are_expanded_and_not_copied(monkeypatch):
    seen = []
    forward = operators.forward
    monkeypatch.setattr(operators, "forward", lambda *args: seen.append(args[5:8]) or forward(*args))
    q, k, v, _ = _operands()
    vmap(lambda q: metaattn.sdpa(q, k, v))(torch.stack([q, q]))
    ((query, key, value),) = seen
    assert query.shape[0] == key.shape[0] == value.shape[0] == 2
    assert query.stride(0) != 0
    assert key.stride(0) == value.stride(0) == 0
    assert key.data_ptr() == k.data_ptr()


def test_randomness_error():
    q, k, v, _ = _operands()
    with pytest.raises(RuntimeError, match="randomness"):
        vmap(lambda q: metaattn.sdpa(q, k, v, dropout_p=0.5))(torch.stack([q, q]))


def test_randomness_same_and_different(backend):
    q, k, v, _ = _operands()
    f = lambda q: metaattn.sdpa(q, k, v, dropout_p=0.5, backend=backend)
    same = vmap(f, randomness="same")(torch.stack([q, q]))
    assert torch.equal(same[0], same[1])
    different = vmap(f, randomness="different")(torch.stack([q, q]))
    assert not torch.equal(different[0], different[1])


def test_randomness_different_is_one_mask_in_every_rule(backend):
    """Each sample has a separate dropout mask, and its derivatives use the mask of its value."""
    q, k, v, _ = _operands()
    qs = torch.stack([q, q.sin()])

    def f(q):
        return metaattn.sdpa(q, k, v, dropout_p=0.5, backend=backend).sin().sum()

    def mapped(qs):
        torch.manual_seed(5)
        return vmap(f, randomness="different")(qs).sum()

    t, h = torch.randn_like(qs), 1e-6
    slope = (mapped(qs + h * t) - mapped(qs - h * t)) / (2 * h)
    assert abs((grad(mapped)(qs) * t).sum() - slope) < 1e-8
    assert abs(jvp(mapped, (qs,), (t,))[1] - slope) < 1e-8
