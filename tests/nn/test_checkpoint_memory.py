"""A Transformer with ``remat=True`` stores less: tests count bytes, which no timing disturbs."""

import weakref

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call, grad, jvp

from metaattn import Transformer
from metaattn.cli._metrics import peak_bytes

X = torch.randn(4, 32, 8, generator=torch.Generator().manual_seed(0))


def _model(depth, **options):
    torch.manual_seed(0)
    return Transformer(input="continuous", in_features=8, dim=16, heads=2, depth=depth, **options)


class _Saved:
    """Handle of a saved tensor, which lives as long as its graph."""

    def __init__(self, t):
        self.t = t


def _saved_bytes(model, order):
    """Bytes of distinct storages that autograd keeps for another backward pass, parameters excluded."""
    params = list(model.parameters())
    alive = weakref.WeakSet()

    def pack(t):
        saved = _Saved(t)
        alive.add(saved)
        return saved

    with saved_tensors_hooks(pack, lambda saved: saved.t):
        out = model(X).square().mean()
        if order == 2:
            out = torch.autograd.grad(out, params, create_graph=True)
    storages = {s.t.untyped_storage().data_ptr(): s.t.untyped_storage().nbytes() for s in alive}
    del out
    return sum(n for pointer, n in storages.items() if pointer not in {p.untyped_storage().data_ptr() for p in params})


@pytest.mark.parametrize("order", [1, 2])
def test_saved_for_backward(order):
    plain, remat = (_saved_bytes(_model(6, remat=r), order) for r in (False, True))
    assert remat < plain / 4


def test_a_block_adds_only_its_input():
    added = _saved_bytes(_model(6, remat=True), 1) - _saved_bytes(_model(5, remat=True), 1)
    assert added == 4 * X.shape[0] * X.shape[1] * 16  # float32 tokens of size 16


def _gradient(model):
    params = {k: p.detach() for k, p in model.named_parameters()}
    return params, grad(lambda p: functional_call(model, p, (X,)).square().mean())


def _hessian_product(model):
    params, gradient = _gradient(model)
    return jvp(gradient, (params,), (params,))


def _meta_gradient(model):
    """Through one inner step, the outermost derivative by autograd."""
    params, gradient = _gradient(model)
    leaves = {k: p.clone().requires_grad_() for k, p in params.items()}
    g = gradient(leaves)
    out = functional_call(model, {k: p - 0.1 * g[k] for k, p in leaves.items()}, (X,)).square().mean()
    return torch.autograd.grad(out, list(leaves.values()))


@pytest.mark.slow
@pytest.mark.parametrize("derivative", [_hessian_product, _meta_gradient])
def test_peak(derivative):
    plain, remat = (peak_bytes(lambda r=r: derivative(_model(6, remat=r))) for r in (False, True))
    assert remat < plain / 2
