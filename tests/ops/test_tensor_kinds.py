"""Tensors that are more, or less, than numbers in memory: causal biases, and subclasses that are taken or rejected."""

import warnings

import pytest
import torch
from torch.func import functional_call, grad, jvp, vmap
from torch.nn import functional as F

import metaattn
from tests.conftest import BACKENDS, FUSED
from tests.helpers import assert_close, dense

LENGTHS = {"square": (5, 5), "more_keys": (4, 7), "more_rows": (7, 4), "far_more_keys": (2, 20), "one_row": (1, 6)}


@pytest.fixture(scope="module")
def bias():
    """The module of the causal biases, which imports Dynamo."""
    return pytest.importorskip("torch.nn.attention.bias")


def _causal(bias, variant, rows, keys):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch's own attention gives NaN in rows without keys
        return getattr(bias, f"causal_{variant}")(rows, keys)


def _shown(variant, rows, keys):
    return torch.ones(rows, keys, dtype=torch.bool).tril(keys - rows if variant == "lower_right" else 0)


def _inputs(rows, keys, dtype=torch.float64):
    g = torch.Generator().manual_seed(5)
    make = lambda n, d: torch.randn(2, 2, n, d, generator=g, dtype=torch.float64).to(dtype)
    return make(rows, 3), make(keys, 3), make(keys, 2)


DERIVATIVES = {
    "value": lambda f, x: f(*x),
    "gradient": lambda f, x: grad(lambda *x: f(*x).sin().sum(), (0, 1, 2))(*x),
    "tangent": lambda f, x: jvp(f, x, x)[1],
    "hessian_product": lambda f, x: jvp(grad(lambda *x: f(*x).sin().sum(), (0, 1, 2)), x, x)[1],
    "third": lambda f, x: grad(lambda q: jvp(grad(lambda *x: f(*x).sin().sum(), 1), (q, *x[1:]), x)[1].sin().sum())(
        x[0]
    ),
    "mapped": lambda f, x: vmap(f)(*x),
}


@pytest.mark.parametrize("order", DERIVATIVES)
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("variant", ["upper_left", "lower_right"])
@pytest.mark.parametrize("backend", [*BACKENDS, *FUSED])
@pytest.mark.usefixtures("small_tiles")
def test_causal_biases(backend, variant, lengths, order, bias):
    if order == "third" and backend in FUSED:
        pytest.skip("blockwise computes it for every backend")
    rows, keys = LENGTHS[lengths]
    dtype = torch.float32 if backend in FUSED else torch.float64
    mask, x = _causal(bias, variant, rows, keys), _inputs(rows, keys)
    ours = lambda *x: metaattn.sdpa(*x, mask, backend=backend)
    oracle = lambda *x: dense(*x, _shown(variant, rows, keys))[0]
    got = DERIVATIVES[order](ours, tuple(t.to(dtype) for t in x))
    assert_close(got, DERIVATIVES[order](oracle, x), dtype, factor=4)


@pytest.mark.parametrize("variant", ["upper_left", "lower_right"])
def test_causal_biases_make_no_mask(variant, bias):
    from metaattn.ops._checks import prepare

    q, k, v = _inputs(4, 7)
    p = prepare(q, k, v, _causal(bias, variant, 4, 7), 0.0, False, None, False, (2, 9), None)
    assert p.x.mask is None
    assert p.x.bias is None
    assert (p.call.left, p.call.right) == (2, 3 if variant == "lower_right" else 0)


@pytest.mark.parametrize("window", [(1, None), (None, 1), (2, 0)])
def test_causal_biases_and_windows(window, bias, backend):
    q, k, v = _inputs(4, 7)
    got = metaattn.sdpa(q, k, v, _causal(bias, "lower_right", 4, 7), window=window, backend=backend)
    assert_close(got, dense(q, k, v, _shown("lower_right", 4, 7), window=window)[0])


def test_is_causal_and_a_wider_window(backend):
    """A window to the right shows no key that is_causal hides."""
    q, k, v = _inputs(5, 6)
    got = metaattn.sdpa(q, k, v, is_causal=True, window=(None, 2), backend=backend)
    assert_close(got, dense(q, k, v, is_causal=True)[0])


def test_causal_biases_of_the_explicit_derivatives(bias):
    q, k, v = x = _inputs(4, 7)
    mask, shown = _causal(bias, "lower_right", 4, 7), _shown("lower_right", 4, 7)
    w = torch.ones(2, 2, 4, 2, dtype=torch.float64)
    for f, args in (
        (metaattn.sdpa_jvp, ((q, k, v),)),
        (metaattn.sdpa_vjp, (w,)),
        (metaattn.sdpa_hvp, ((q, k, v), w)),
    ):
        tangents = [(*a, None) if isinstance(a, tuple) else a for a in args]
        assert_close(f((*x, mask), *tangents), f((*x, shown), *tangents))


@pytest.mark.parametrize("variant", ["upper_left", "lower_right"])
@pytest.mark.parametrize("how", ["block", "installed"])
def test_causal_biases_in_replaced_attention(how, variant, bias):
    q, k, v = _inputs(4, 7)
    mask = _causal(bias, variant, 4, 7)
    want = dense(q, k, v, _shown(variant, 4, 7))[0]
    if how == "block":
        with metaattn.replace_sdpa():
            got = F.scaled_dot_product_attention(q, k, v, mask)
    else:
        metaattn.replace_sdpa.install()
        try:
            got = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        finally:
            metaattn.replace_sdpa.uninstall()
    assert type(got) is torch.Tensor
    assert_close(got, want)


def test_causal_biases_in_compiled_functions(bias):
    q, k, v = _inputs(4, 7)
    mask = _causal(bias, "lower_right", 4, 7)
    torch._dynamo.reset()
    got = torch.compile(metaattn.sdpa, backend="eager", fullgraph=True)(q, k, v, mask)
    assert_close(got, dense(q, k, v, _shown("lower_right", 4, 7))[0])


def test_causal_biases_for_other_lengths(bias):
    q, k, v = _inputs(4, 7)
    with pytest.raises(ValueError, match="causal bias for 5 rows and 7 keys; query and key have 4 and 7: make one"):
        metaattn.sdpa(q, k, v, _causal(bias, "lower_right", 5, 7))
    with pytest.raises(ValueError, match="attn_mask and is_causal exclude each other"):
        metaattn.sdpa(q, k, v, _causal(bias, "lower_right", 4, 7), is_causal=True)


class Renamed(torch.Tensor):
    """Changes nothing."""


class Logged(torch.Tensor):
    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return super().__torch_function__(func, types, args, kwargs or {})


def test_a_subclass_that_changes_nothing_is_a_tensor(backend):
    q, k, v = _inputs(4, 5)
    want = grad(lambda q: metaattn.sdpa(q, k, v).sum())(q)
    x = q.as_subclass(Renamed).requires_grad_()
    out = metaattn.sdpa(x, k.as_subclass(Renamed), torch.nn.Parameter(v), backend=backend)
    assert type(out) is torch.Tensor
    (got,) = torch.autograd.grad(out.sum(), x)
    assert_close(got.as_subclass(torch.Tensor), want)


def _two_tensor(t):
    return pytest.importorskip("torch.testing._internal.two_tensor").TwoTensor(t, t)


def _masked(t):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a prototype
        return torch.masked.masked_tensor(t, t > 0)


OTHERS = {
    "a function of its own": (lambda t: t.as_subclass(Logged), r"got the subclass .*Logged.*as_subclass"),
    "a dispatch of its own": (_two_tensor, "got the subclass .*TwoTensor"),
    "masked": (_masked, "got the subclass .*MaskedTensor"),
    "sparse": (lambda t: t.to_sparse(), "must be a dense tensor; got torch.sparse_coo.*to_dense"),
    "sparse rows": (lambda t: t[0, 0].to_sparse_csr(), "must be a dense tensor; got torch.sparse_csr"),
    "nested": (lambda t: torch.nested.nested_tensor([t[0], t[1]]), "must be a dense tensor; got a nested one"),
    "jagged": (
        lambda t: torch.nested.nested_tensor([t[0], t[1]], layout=torch.jagged),
        "must be a dense tensor; got a nested one",
    ),
    "quantized": (lambda t: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.qint8), "must not be quantized.*qint8"),
    "not initialised": (lambda t: torch.nn.UninitializedParameter(), "got the subclass .*UninitializedParameter"),
}


@pytest.mark.filterwarnings("ignore:Sparse CSR", "ignore:The PyTorch API of nested", "ignore:.*[Qq]uantiz")
@pytest.mark.parametrize("argument", ["query", "key", "value", "attn_mask"])
@pytest.mark.parametrize("kind", OTHERS)
def test_other_kinds_are_rejected_by_name(kind, argument):
    q, k, v = _inputs(4, 4)
    make, message = OTHERS[kind]
    arguments = {"query": q, "key": k, "value": v, argument: make(torch.randn(2, 2, 4, 4, dtype=torch.float64))}
    with pytest.raises(TypeError, match=f"{argument} {message}|{argument} must be a plain tensor; {message}"):
        metaattn.sdpa(**arguments)


def test_other_kinds_of_tangents_and_cotangents():
    q, k, v = _inputs(4, 4)
    with pytest.raises(TypeError, match=r"the tangent of query must be a dense tensor; got torch.sparse_coo"):
        metaattn.sdpa_jvp((q, k, v), (q.to_sparse(), None, None))
    with pytest.raises(TypeError, match=r"the cotangent of out must be a plain tensor; got the subclass .*Logged"):
        metaattn.sdpa_vjp((q, k, v), v.as_subclass(Logged))
    with pytest.raises(TypeError, match=r"tangents must be a sequence of tensors or None; got NoneType"):
        metaattn.sdpa_jvp((q, k, v), None)
    with pytest.raises(TypeError, match=r"primals must be .*; got NoneType"):
        metaattn.sdpa_jvp(None, (q, None, None))


def test_negative_bits_are_numbers(backend):
    """A view that negates its memory when it is read."""
    q, k, v = _inputs(4, 5)
    negative = torch.complex(v, -q[..., :2].new_ones(v.shape)).conj().imag
    assert negative.is_neg()
    assert_close(metaattn.sdpa(q, k, negative, backend=backend), torch.ones(2, 2, 4, 2, dtype=torch.float64))


def test_parameters_of_a_module():
    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.key = torch.nn.Parameter(_inputs(4, 5)[1])
            self.value = torch.nn.Buffer(_inputs(4, 5)[2])

        def forward(self, query):
            return metaattn.sdpa(query, self.key, self.value)

    layer, (q, k, v) = Layer(), _inputs(4, 5)
    assert_close(functional_call(layer, dict(layer.named_parameters()), (q,)), dense(q, k, v)[0])
