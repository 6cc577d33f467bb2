"""Inner optimizers against those of PyTorch, and their derivatives."""

import pytest
import torch
from torch.func import grad

from metaattn.meta import adam, momentum, rate, sgd
from tests.helpers import assert_close

F64 = {"dtype": torch.float64}
PAIRS = {
    "sgd": (sgd, lambda p: torch.optim.SGD(p, 0.1)),
    "momentum": (lambda: momentum(0.8), lambda p: torch.optim.SGD(p, 0.1, momentum=0.8)),
    "nesterov": (
        lambda: momentum(0.8, nesterov=True),
        lambda p: torch.optim.SGD(p, 0.1, momentum=0.8, nesterov=True),
    ),
    "adam": (lambda: adam(0.8, 0.95, eps_root=0.0), lambda p: torch.optim.Adam(p, 0.1, betas=(0.8, 0.95))),
}


def _run(optimizer, params, grads, rates=0.1):
    state = optimizer.init(params)
    for step, g in enumerate(grads):
        params, state = optimizer.update(g, state, params, rates, step)
    return params


@pytest.mark.parametrize("name", PAIRS)
def test_like_torch(name):
    ours, theirs = PAIRS[name]
    params = {"a": torch.randn(3, **F64), "b": torch.randn(2, 2, **F64)}
    grads = [{k: torch.randn_like(p) for k, p in params.items()} for _ in range(5)]
    leaves = {k: p.clone().requires_grad_() for k, p in params.items()}
    optimizer = theirs(leaves.values())
    for g in grads:
        for k, leaf in leaves.items():
            leaf.grad = g[k].clone()
        optimizer.step()
    assert_close(_run(ours(), params, grads), leaves)


@pytest.mark.parametrize("name", PAIRS)
def test_differentiable(name):
    """Derivatives with respect to the starting point, the gradients and the rate."""
    optimizer = PAIRS[name][0]()

    def f(p, g, r):
        return _run(optimizer, {"a": p}, [{"a": g}, {"a": g.cos()}, {"a": p * g}], r)["a"]

    inputs = [torch.randn(3, **F64).requires_grad_(), torch.randn(3, **F64).requires_grad_()]
    assert torch.autograd.gradcheck(f, (*inputs, torch.tensor(0.1, **F64, requires_grad=True)))


def test_adam_at_a_zero_gradient():
    """At a zero gradient the derivative is NaN without eps_root."""
    f = lambda optimizer: lambda g: _run(optimizer, {"a": torch.ones(2, **F64)}, [{"a": g}])["a"].sum()
    zero = torch.zeros(2, **F64)
    assert grad(f(adam()))(zero).isfinite().all()
    assert grad(f(adam(eps_root=0.0)))(zero).isnan().all()


def test_rates():
    per_step = torch.tensor([0.1, 0.2])
    each = {"w": torch.arange(6.0).view(2, 3)}
    assert rate(0.5, "w", 7) == 0.5
    assert rate(torch.tensor(0.3), "w", 7) == torch.tensor(0.3)
    assert [rate(per_step, "w", s).item() for s in range(3)] == pytest.approx([0.1, 0.2, 0.2])
    assert rate({"w": torch.tensor(0.3)}, "w", 2) == torch.tensor(0.3)
    assert rate(each, "w", 1).tolist() == [3, 4, 5]
    assert rate(each, "w", 9).tolist() == [3, 4, 5]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: momentum(1.0), "beta must be at least 0 and below 1; got 1.0"),
        (lambda: adam(-0.1), "beta1 must be"),
        (lambda: adam(beta2=1.0), "beta2 must be"),
        (lambda: rate({"v": torch.tensor(0.3)}, "w", 0), r"rates has no entry for 'w'; it has \['v'\]"),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()
