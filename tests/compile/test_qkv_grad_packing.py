"""Gradients that are written packed, as one matrix, and that a recorded graph stays the same function."""

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, jvp, vmap

import metaattn
from metaattn.backends.base import empty_packed_qkv, pack_qkv
from metaattn.compile.passes.matmul_fusion import fuse_matmuls
from metaattn.compile.passes.qkv_grad_packing import pack_qkv_gradients
from metaattn.compile.piecewise import PiecewiseFunction, as_recorded
from metaattn.compile.recorder import Recording
from metaattn.nn.attention import SelfAttention, rotation
from tests.helpers import assert_close

X = torch.randn(2, 5, 16, dtype=torch.float64)


def run(function, *tensors):
    """Check that packing leaves a function the same; return how many packed results each operator has, and all cats."""
    recording = Recording(function, tensors)
    got = PiecewiseFunction(recording, as_recorded, {})(*tensors, *recording.captured)
    assert_close(got, function(*tensors), torch.float64)
    graph = pack_qkv_gradients(fuse_matmuls(recording.graph))
    graph.lint()
    counts = [len(n.users) for n in graph.nodes if n.target is torch.ops.metaattn._backward_packed.default]
    return counts, sum(n.target is torch.ops.aten.cat.default for n in graph.nodes)


def loss_of(by=None, **options):
    """Return the loss of a layer as a function of its parameters and the tokens, and its parameters."""
    options = {"causal": True, "window": None, "dropout": 0.0, "bias": False, "backend": None, **options}
    layer = SelfAttention(16, 4, options.pop("kv_heads", 4), **options).double()
    params = {k: t.detach() for k, t in layer.named_parameters()}
    return lambda p, x: functional_call(layer, p, (x, by)).sin().sum(), params


def gradient(loss, params):
    """Return the gradient of a loss as a function of tensors."""
    return lambda x, *given: tuple(grad(loss)(dict(zip(params, given, strict=True)), x).values())


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_of_a_layer(kv_heads):
    loss, params = loss_of(kv_heads=kv_heads)
    assert run(gradient(loss, params), X, *params.values()) == ([1], 0)


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_of_its_hessian_product_over_tasks(kv_heads):
    loss, params = loss_of(kv_heads=kv_heads)

    def product(x, *given):
        return jvp(lambda *given: vmap(lambda x: gradient(loss, params)(x, *given))(x), given, given)

    def flat(x, *given):
        value, tangent = product(x, *given)
        return *value, *tangent

    assert run(flat, X, *params.values()) == ([2], 0)


@pytest.mark.parametrize("only", [0, 1])
def test_of_one_of_two_sets(only):
    """Only the gradient, or only its tangent, is packed."""

    def f(qkv):
        def loss(qkv):
            return metaattn.sdpa(*qkv.unflatten(-1, (6, 4)).transpose(-3, -2).split(2, -3)).sin().sum()

        return (jvp(grad(loss), (qkv,), (qkv.cos(),))[only],)

    assert run(f, torch.randn(2, 5, 24, dtype=torch.float64)) == ([1], 0)


def test_of_tokens_without_a_batch():
    loss, params = loss_of()
    assert run(gradient(loss, params), X[0], *params.values()) == ([1], 0)


def test_of_its_bits_is_not():
    """A view of another dtype has other numbers."""

    def f(q, k, v):
        parts = grad(lambda *x: metaattn.sdpa(*x).sin().sum(), (0, 1, 2))(q, k, v)
        bits = torch.cat([part.view(torch.int64) for part in parts], -3)
        return (bits.transpose(-3, -2).contiguous() + 0,)

    recording = Recording(f, torch.randn(3, 2, 2, 5, 4, dtype=torch.float64).unbind())
    targets = [n.target for n in pack_qkv_gradients(fuse_matmuls(recording.graph)).nodes]
    assert torch.ops.metaattn._backward_packed.default not in targets


def test_rotated_ones_are_not():
    by = rotation(5, 4, 1e4, X)
    loss, params = loss_of(by)
    counts, cats = run(gradient(loss, params), X, *params.values())
    assert counts == []
    assert cats > 0


def test_what_is_used_elsewhere_is_not():
    def f(qkv):
        def loss(qkv):
            return metaattn.sdpa(*qkv.transpose(-3, -2).split(2, -3)).sin().sum()

        def parts(q, k, v):
            return metaattn.sdpa(q, k, v).sin().sum()

        whole = grad(loss)(qkv)
        return whole.cos(), grad(parts)(*qkv.transpose(-3, -2).split(2, -3)).exp()

    counts, _ = run(f, torch.randn(2, 5, 6, 4, dtype=torch.float64))
    assert counts == []


def test_another_order_is_not():
    def f(qkv):
        def loss(qkv):
            k, q, v = qkv.transpose(-3, -2).split(2, -3)
            return metaattn.sdpa(q, k, v).sin().sum()

        return (grad(loss)(qkv).flatten(-2).cos(),)

    counts, cats = run(f, torch.randn(2, 5, 6, 4, dtype=torch.float64))
    assert (counts, cats) == ([], 1)


def test_of_one_task_among_them_is_not():
    """A view of fewer elements has other numbers."""

    def f(qkv):
        def loss(q, k, v):
            return metaattn.sdpa(q, k, v).sin().sum()

        first = [g[0] for g in grad(loss, (0, 1, 2))(*qkv.transpose(-3, -2).split(2, -3))]
        return (torch.cat(first, -3).transpose(-3, -2).flatten(-2),)

    counts, cats = run(f, torch.randn(2, 3, 5, 6, 4, dtype=torch.float64))
    assert (counts, cats) == ([], 1)


def test_a_view_with_several_results_is_not():
    def f(q, k, v):
        return tuple(t.sin() for t in grad(lambda q: metaattn.sdpa(q, k, v).sin().sum())(q).unbind(0))

    counts, _ = run(f, *torch.randn(3, 2, 2, 5, 4, dtype=torch.float64))
    assert counts == []


def test_with_the_gradient_of_a_bias_is_not():
    linear = nn.Linear(8, 24, bias=False).double()

    def f(w, bias):
        def loss(w, bias):
            qkv = nn.functional.linear(X[..., :8], w).unflatten(-1, (-1, 4)).transpose(-3, -2)
            return metaattn.sdpa(*qkv.split(2, -3), bias).sin().sum()

        return grad(loss, (0, 1))(w, bias)

    counts, cats = run(f, linear.weight.detach(), torch.randn(1, 2, 5, 5, dtype=torch.float64))
    assert (counts, cats) == ([], 1)


def test_in_one_is_a_view_where_there_is_room():
    shapes = (2, 4, 5, 8), (2, 2, 5, 8), (2, 2, 5, 8)
    parts = [torch.randn(shape) for shape in shapes]
    room = empty_packed_qkv(parts)
    for there, part in zip(room, parts, strict=True):
        there.copy_(part)
    one = pack_qkv(room)
    assert one.shape == (2, 5, 8, 8)
    assert one.data_ptr() == room[0].data_ptr()
    assert torch.equal(one, pack_qkv(parts))
    assert torch.equal(one, torch.cat(parts, 1).transpose(1, 2))


@pytest.mark.parametrize("order", [(1, 0, 2), (0, 2, 1)])
def test_in_one_copies_what_lies_otherwise(order):
    room = empty_packed_qkv([torch.randn(2, 2, 5, 8)] * 3)
    for t in room:
        t.normal_()
    parts = [room[i] for i in order]
    one = pack_qkv(parts)
    assert torch.equal(one, torch.cat(parts, 1).transpose(1, 2))
    assert one.untyped_storage().data_ptr() != room[0].untyped_storage().data_ptr()
