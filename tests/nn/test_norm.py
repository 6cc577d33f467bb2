"""Norms: values as in PyTorch, derivatives of the formula, and the dtype of the input."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call, grad, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx

from metaattn.nn import LayerNorm, RMSNorm
from tests.helpers import TOLERANCE, assert_close

PAIRS = [(LayerNorm, torch.nn.LayerNorm), (RMSNorm, torch.nn.RMSNorm)]


def _module(cls, dtype=torch.float64, **options):
    module = cls(5, **options).to(dtype)
    for p in module.parameters():
        torch.nn.init.normal_(p, 1.0)
    return module


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_like_torch(ours, theirs, dtype):
    module = _module(ours, dtype)
    other = theirs(5).to(dtype)
    other.load_state_dict(module.state_dict())
    x = torch.randn(3, 4, 5).to(dtype)
    assert module(x).dtype == dtype
    assert_close(module(x), other(x), dtype, factor=2)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_rms_of_small_numbers(dtype):
    """The epsilon added to the mean square is that of the dtype in which the mean is taken."""
    x = 1e-3 * torch.randn(3, 5).to(dtype)
    assert_close(RMSNorm(5, dtype=dtype)(x), torch.nn.RMSNorm(5, dtype=dtype)(x), dtype, factor=2)


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_over_several_dimensions(ours, theirs):
    x = torch.randn(3, 4, 5, dtype=torch.float64)
    assert_close(ours((4, 5), dtype=torch.float64)(x), theirs((4, 5), dtype=torch.float64)(x))


@pytest.mark.parametrize("cls", [LayerNorm, RMSNorm])
def test_gradcheck(cls):
    module = _module(cls)
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    p = [t.detach().requires_grad_() for t in module.parameters()]
    f = lambda x, *p: functional_call(module, dict(zip(["weight", "bias"], p, strict=False)), (x,))
    assert gradcheck(f, (x, *p), check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(f, (x, *p), check_fwd_over_rev=True, check_batched_grad=True)


@pytest.mark.parametrize("cls", [LayerNorm, RMSNorm])
def test_meta_gradients_under_vmap(cls):
    """The derivative that PyTorch's layer_norm gets wrong."""
    module = _module(cls)
    params = {k: p.detach() for k, p in module.named_parameters()}
    x = torch.randn(3, 4, 5, dtype=torch.float64)

    def task(p, x):
        g = grad(lambda p: functional_call(module, p, (x,)).sin().sum())(p)
        return functional_call(module, {k: p[k] - 0.1 * g[k] for k in p}, (x,)).cos().sum()

    mapped = grad(lambda p, x: vmap(task, (None, 0))(p, x).sum(), (0, 1))(params, x)
    looped = grad(lambda p, x: sum(task(p, t) for t in x), (0, 1))(params, x)
    assert_close(mapped, looped)


@pytest.mark.parametrize("cls", [LayerNorm, RMSNorm])
def test_bfloat16_stays_under_traced_forward_mode(cls):
    module = _module(cls, torch.bfloat16)
    x = torch.randn(3, 5).bfloat16()
    out, tangent = make_fx(lambda x, t: jvp(module, (x,), (t,)))(x, x)(x, x)
    assert out.dtype == tangent.dtype == torch.bfloat16


@pytest.mark.parametrize("options", [{"bias": False}, {"elementwise_affine": False}], ids=lambda o: next(iter(o)))
def test_layer_norm_without_parameters(options):
    module, other = _module(LayerNorm, **options), torch.nn.LayerNorm(5, **options).double()
    other.load_state_dict(module.state_dict())
    x = torch.randn(3, 5, dtype=torch.float64)
    assert_close(module(x), other(x))


def test_rms_norm_without_a_weight():
    x = torch.randn(3, 5, dtype=torch.float64)
    norms = (cls(5, elementwise_affine=False) for cls in (RMSNorm, torch.nn.RMSNorm))
    assert_close(*(norm(x) for norm in norms))
