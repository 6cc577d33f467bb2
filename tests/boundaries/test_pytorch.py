"""Limits and faults of PyTorch that the library works around. A failure means that a new PyTorch has lifted one."""

import gc

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import Function
from torch.func import grad, jvp
from torch.library import custom_op
from torch.nn.attention import SDPBackend, sdpa_kernel

X = torch.randn(1, 2, 8, 16, generator=torch.Generator().manual_seed(0))


def _flash(x):
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return F.scaled_dot_product_attention(x, x, x)


def _cuda(kind, x):
    with sdpa_kernel(kind):
        return F.scaled_dot_product_attention(x, x, x)


CUDA = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION]


def test_flash_on_cpu_runs():
    """The other tests mean something only while this backend supports these inputs."""
    assert _flash(X).isfinite().all()
    assert grad(lambda x: _flash(x).sum())(X).isfinite().all()


def test_flash_on_cpu_has_no_forward_mode():
    with pytest.raises(NotImplementedError, match="forward AD"):
        jvp(_flash, (X,), (X,))


def test_flash_on_cpu_has_no_double_backward():
    x = X.clone().requires_grad_()
    (g,) = torch.autograd.grad(_flash(x).sin().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"derivative for aten::_scaled_dot_product.*is not implemented"):
        g.sum().backward()


@pytest.mark.gpu
@pytest.mark.parametrize("kind", CUDA, ids=lambda k: k.name.lower())
def test_fused_attention_on_cuda_has_no_forward_mode(kind):
    x = X.cuda().bfloat16()
    assert _cuda(kind, x).isfinite().all()
    with pytest.raises((NotImplementedError, RuntimeError), match=r"forward AD|not implemented|No available kernel"):
        jvp(lambda x: _cuda(kind, x), (x,), (x,))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", CUDA, ids=lambda k: k.name.lower())
def test_fused_attention_on_cuda_has_no_double_backward(kind):
    x = X.cuda().bfloat16().requires_grad_()
    (g,) = torch.autograd.grad(_cuda(kind, x).sin().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="is not implemented"):
        g.sum().backward()


def test_softmax_fails_in_reverse_over_a_dual_level():
    """This is why the oracle writes the exponential out. The operator itself must not fail (``reverse_over_dual``)."""
    with torch.autograd.forward_ad.dual_level():
        x = torch.randn(3, requires_grad=True)
        y = torch.autograd.forward_ad.make_dual(x, torch.ones(3)).softmax(-1).square().sum()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(torch.autograd.forward_ad.unpack_dual(y).tangent, x)


class _Exp(Function):
    @staticmethod
    def forward(x):
        return x.exp()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_forward(*inputs)

    @staticmethod
    def jvp(ctx, t):
        (x,) = ctx.saved_tensors
        return t * _Exp.apply(x)  # an ordinary product in a jvp rule


def test_an_operation_in_a_jvp_rule_loses_the_outer_tangents():
    """Silently. This is why our jvp rules add with a custom function (``autodiff.add_terms``)."""
    x = torch.randn(3, dtype=torch.float64)
    once = lambda x: jvp(_Exp.apply, (x,), (torch.ones_like(x),))[1]
    twice = jvp(once, (x,), (torch.ones_like(x),))[1]
    assert torch.allclose(once(x), x.exp())
    assert torch.equal(twice, torch.zeros_like(x))  # should be exp(x)


def test_a_custom_op_is_silently_constant_in_forward_mode():
    """This is why the operators are below the rules, and private."""

    @custom_op("metaattn_tests::double", mutates_args=())
    def double(x: torch.Tensor) -> torch.Tensor:
        return 2 * x

    double.register_autograd(lambda ctx, g: 2 * g)
    x = torch.randn(3)
    assert torch.equal(jvp(double, (x,), (x,))[1], torch.zeros(3))


def test_checkpoint_raises_under_torch_func():
    f = lambda x: torch.utils.checkpoint.checkpoint(torch.sin, x, use_reentrant=False).sum()
    with pytest.raises(RuntimeError):
        grad(f)(torch.randn(3))


def test_linearize_draws_random_numbers_twice():
    """PyTorch's own dropout shows the limit that ``NOT_RANDOM`` of the exactness suite respects."""
    x = torch.ones(1000)
    f = lambda x: F.dropout(x, 0.5)
    out, tangent_map = torch.func.linearize(f, x)
    assert not torch.equal(out, tangent_map(x))  # a linear function is its own tangent map


def test_mse_loss_fails_forward_over_reverse_without_a_tangent_of_its_target():
    """This is why mixed mode gives the data a tangent of zeros (``metaattn/meta/_hvp.py``)."""
    x, y, t = (torch.randn(3) for _ in range(3))
    product = lambda x, y: grad(lambda x: F.mse_loss(x, y))(x)
    with pytest.raises(RuntimeError, match="ZeroTensors are immutable"):
        jvp(lambda x: product(x, y), (x,), (t,))
    assert torch.allclose(jvp(product, (x, y), (t, torch.zeros(3)))[1], 2 * t / 3)


def test_layer_norm_has_wrong_meta_gradients_under_vmap():
    """Silently. This is why the Transformer writes its norms out (``metaattn/nn/norm.py``)."""
    x, w = torch.randn(2, 4, 5, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    weight_grad = lambda x, w: grad(lambda w: F.layer_norm(x, (5,), w).sin().sum())(w).sin().sum()
    mapped = grad(lambda x: torch.func.vmap(weight_grad, (0, None))(x, w).sum())(x)
    looped = torch.stack([grad(weight_grad)(t, w) for t in x])
    assert (mapped - looped).norm() > 0.1 * looped.norm()  # should be equal


def test_batch_norm_has_wrong_meta_gradients_under_vmap():
    """Silently, with the statistics of the batch and a weight. ``docs/coming_from.md`` warns of it."""
    x, w = torch.randn(2, 4, 5, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    norm = lambda x, w: F.batch_norm(x, None, None, weight=w, training=True)
    weight_grad = lambda x, w: grad(lambda w: norm(x, w).sin().sum())(w).sin().sum()
    mapped = grad(lambda x: torch.func.vmap(weight_grad, (0, None))(x, w).sum())(x)
    looped = torch.stack([grad(weight_grad)(t, w) for t in x])
    assert (mapped - looped).norm() > 0.1 * looped.norm()  # should be equal


NORMS = {
    "layer": (lambda x: F.layer_norm(x, (4,)), -1),
    "instance": (F.instance_norm, -1),
    "batch": (lambda x: F.batch_norm(x, None, None, training=True), (0, 2)),
}


@pytest.mark.parametrize("name", NORMS)
def test_norms_have_wrong_second_derivatives(name):
    """Silently, also without a weight, in grad of jvp and in jvp of jvp: the Transformer writes its norms out.

    PyTorch's issues 196699 (batch), 196700 (layer) and 198017.
    """
    norm, over = NORMS[name]
    x, t = (torch.randn(2, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(i)) for i in (0, 1))

    def written_out(x):
        centred = x - x.mean(over, keepdim=True)
        return centred / (centred.square().mean(over, keepdim=True) + 1e-5).sqrt()

    def second(f):
        along = lambda x: jvp(lambda x: f(x).sin().sum(), (x,), (t,))[1]
        return torch.cat([grad(along)(x).flatten(), jvp(along, (x,), (t,))[1].flatten()]).split([x.numel(), 1])

    got, want = second(norm), second(written_out)
    assert all((g - w).norm() > 0.01 * w.norm() for g, w in zip(got, want, strict=True))  # should be equal


def _left_to_the_garbage_collector(call):
    """Number of objects in reference cycles that a call leaves, after it has run before."""
    call()
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        call()
        return gc.collect()
    finally:
        gc.unfreeze()
        gc.enable()


@pytest.mark.filterwarnings("ignore")
def test_transforms_leave_reference_cycles():
    """Of any function: tree_flatten and torch.func.grad recurse in nested functions, which refer to themselves.

    With the garbage collector off, memory grows with each call: by far the most under linearize, whose graph is left.
    ``tests/autodiff/test_garbage.py`` asserts that we add none, and ``_torch_internals.tree_flatten`` is why.
    """
    x = torch.randn(3)
    f = lambda x: x.sin().sum()
    flatten = _left_to_the_garbage_collector(lambda: torch.utils._pytree.tree_flatten([x]))
    product = _left_to_the_garbage_collector(lambda: jvp(grad(f), (x,), (x,)))
    linear = _left_to_the_garbage_collector(lambda: torch.func.linearize(f, x)[1](x))
    assert 0 < flatten < 20 < product < 1000 < linear
