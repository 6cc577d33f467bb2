"""Norms of PyTorch in a ``replace_norms`` block against their formulas, in float64."""

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, jvp, vmap
from torch.nn import functional as F

from metaattn.integrations.torch_norms import replace_norms
from tests.helpers import TOLERANCE, assert_close


def formula(x, over):
    centred = x - x.mean(over, keepdim=True)
    return centred / (centred.square().mean(over, keepdim=True) + 1e-5).sqrt()


def channels(t):
    return t[:, None]


CASES = {
    "layer": (nn.LayerNorm(5), lambda x, w, b: formula(x, -1) * w + b),
    "layer, two dimensions": (nn.LayerNorm((4, 5)), lambda x, w, b: formula(x, (-2, -1)) * w + b),
    "instance": (nn.InstanceNorm1d(4, affine=True), lambda x, w, b: formula(x, -1) * channels(w) + channels(b)),
    "batch": (
        nn.BatchNorm1d(4, track_running_stats=False),
        lambda x, w, b: formula(x, (0, 2)) * channels(w) + channels(b),
    ),
}
NAMES = pytest.mark.parametrize("name", CASES)


def along(f, direction):
    return lambda x, *p: jvp(lambda x: f(x, *p), (x,), (direction,))[1]


def meta_step(objective, t, u):
    def task(x, w, b):
        return objective(x.cos(), w - 0.1 * grad(objective, 1)(x, w, b), b)

    mapped = lambda x, w, b: vmap(task, (0, None, None))(torch.stack([x, x.exp()]), w, b).sum()
    return grad(mapped, (0, 1, 2))


DERIVATIVES = {
    "grad of jvp": lambda f, t, u: grad(along(f, t), (0, 1, 2)),
    "jvp of jvp": lambda f, t, u: along(along(f, t), u),
    "third order": lambda f, t, u: along(along(grad(f), t), u),
    "meta-step under vmap": meta_step,
}


def problem(name):
    module, f = CASES[name]
    x, w, b = (torch.randn(s, dtype=torch.float64) for s in ((3, 4, 5), module.weight.shape, module.bias.shape))
    return x, w, b, lambda x, w, b: functional_call(module, {"weight": w, "bias": b}, (x,)), f


@NAMES
@pytest.mark.parametrize("how", DERIVATIVES)
def test_derivatives_are_those_of_the_formula(name, how):
    *at, got, want = problem(name)
    t, u = torch.randn_like(at[0]), torch.randn_like(at[0])
    derivative = lambda f: DERIVATIVES[how](lambda x, w, b: f(x, w, b).sin().sum(), t, u)(*at)
    with replace_norms():
        inside = derivative(got)
    assert_close(inside, derivative(want))


@NAMES
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_values_and_dtypes_are_pytorchs(name, dtype):
    x, w, b, f, _ = problem(name)
    x, w, b = x.to(dtype), w.to(dtype), b.to(dtype)
    want = f(x, w, b)
    with replace_norms():
        got = f(x, w, b)
    assert got.dtype == want.dtype == dtype
    assert_close(got, want, dtype, factor=2)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("name", ["layer", "batch"])
def test_autocast(name, device):
    """Parameters in float32, as with autocast; PyTorch's layer norm then returns float32 on a GPU."""
    x, w, b, f, _ = problem(name)
    x, w, b = x.to(device, torch.bfloat16), w.float().to(device), b.float().to(device)
    with torch.autocast(device, torch.bfloat16):
        want = f(x, w, b)
        with replace_norms():
            got = f(x, w, b)
    assert got.dtype == want.dtype
    assert_close(got, want, torch.bfloat16)


def test_without_weight_and_by_other_names():
    x = torch.randn(3, 4, 5, dtype=torch.float64)
    with replace_norms():
        assert_close(F.layer_norm(x, [5]), formula(x, -1))
        assert_close(torch.layer_norm(x, [5], None, None), formula(x, -1))
        assert_close(F.instance_norm(x), formula(x, -1))


OPERATORS = {
    "aten.layer_norm": lambda x: torch.ops.aten.layer_norm(x, [5]),
    "batch_norm": lambda x: torch.batch_norm(x, None, None, None, None, True, 0.1, 1e-5, True),
    "instance_norm": lambda x: torch.instance_norm(x, None, None, None, None, True, 0.1, 1e-5, True),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_operators(name):
    x, t = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    want = lambda x: formula(x, (0, 2)) if name == "batch_norm" else formula(x, -1)
    with replace_norms():
        got = grad(lambda x: along(OPERATORS[name], t)(x).sum())(x)
    assert_close(got, grad(lambda x: along(want, t)(x).sum())(x))


def test_a_backward_pass_after_the_block():
    *at, got, want = problem("layer")
    t = torch.randn_like(at[0])
    gradients = []
    for f in (got, want):
        x = at[0].clone().requires_grad_()
        with replace_norms():
            loss = along(f, t)(x, *at[1:]).square().sum()
        gradients.append(torch.autograd.grad(loss, x)[0])
    assert_close(*gradients)


def test_functions_that_are_not_replaced():
    """Norms with running statistics, other functions, and calls after the block are PyTorch's own."""
    x = torch.randn(3, 4, 5)
    batch, instance = nn.BatchNorm1d(4).eval(), nn.InstanceNorm1d(4, track_running_stats=True).eval()
    batch.running_mean.normal_()
    instance.running_mean.normal_()
    want = batch(x), instance(x), F.group_norm(x, 2)
    with replace_norms():
        got = batch(x), instance(x), F.group_norm(x, 2)
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))
    batch.train()(x)
    assert batch.num_batches_tracked == 1


def test_mistakes():
    x = torch.randn(3, 4, 5)
    with replace_norms():
        with pytest.raises(NotImplementedError, match=r"batch_norm with running statistics.*track_running_stats=False"):
            nn.BatchNorm1d(4)(x)
        with pytest.raises(NotImplementedError, match="instance_norm with running statistics"):
            nn.InstanceNorm1d(4, track_running_stats=True)(x)
        with pytest.raises(ValueError, match=r"must be normalized_shape, \[4\]; got \[3, 4, 5\]"):
            F.layer_norm(x, (4,))
        with pytest.raises(NotImplementedError, match=r"cannot replace native_layer_norm.*functional.layer_norm"):
            torch.native_layer_norm(x, [5], None, None, 1e-5)
