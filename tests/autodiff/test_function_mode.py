"""Functions are replaced in every pass that belongs to the block, and nowhere else."""

import threading

import pytest
import torch
from torch.func import grad, jvp, vmap
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint as torch_checkpoint

import metaattn
from metaattn.autodiff._context import ambient_settings
from metaattn.autodiff._function_mode import Replacement
from metaattn.meta import checkpoint

X = torch.linspace(0.1, 1.2, 6, dtype=torch.float64)


def replaced():
    """A block with sin in place of exp: each derivative shows which of the two ran."""
    return Replacement({torch.exp: torch.sin}, "replaced")


def function(x):
    return torch.exp(x).square()


def want(x):
    return 2 * x.sin() * x.cos()


@pytest.mark.parametrize("wrap", [lambda f: f, checkpoint])
def test_transforms(wrap):
    f = wrap(function)
    with replaced():
        by_grad, by_vmap = grad(lambda x: f(x).sum())(X), vmap(grad(f))(X)
        second = jvp(grad(lambda x: f(x).sum()), (X,), (torch.ones_like(X),))[1]
    for got in (by_grad, by_vmap):
        torch.testing.assert_close(got, want(X))
    torch.testing.assert_close(second, 2 * torch.cos(2 * X))
    torch.testing.assert_close(grad(lambda x: f(x).sum())(X), 2 * torch.exp(2 * X))


@pytest.mark.parametrize("inside", [True, False])
def test_what_is_computed_again_is_replaced_again(inside):
    x = X.clone().requires_grad_()
    with replaced():
        loss = checkpoint(function)(x).sum()
        if inside:
            loss.backward()
    if not inside:
        loss.backward()
    torch.testing.assert_close(x.grad, want(X))


def test_torch_checkpoint_within_the_block():
    """PyTorch disables a mode while a backward pass runs, and so while that recomputes a function."""
    x = X.clone().requires_grad_()
    with replaced():
        torch_checkpoint(function, x, use_reentrant=False).sum().backward()
    torch.testing.assert_close(x.grad, want(X))


def test_other_threads_are_not_touched():
    results = []
    with replaced():
        thread = threading.Thread(target=lambda: results.append(torch.exp(X)))
        thread.start()
        thread.join()
    assert torch.equal(results[0], X.exp())


@pytest.mark.parametrize("shown", [True, False])
def test_in_a_branch_of_a_higher_order_operator(shown):
    """PyTorch disables a mode while the operator runs, and so while its branches run."""
    x = X.clone().requires_grad_()
    with replaced():
        cond = torch.ops.higher_order.cond
        (out,) = cond(torch.tensor(shown), lambda x: (function(x),), lambda x: (3 * function(x),), (x,))
        (g,) = torch.autograd.grad(out.sum(), x)
    torch.testing.assert_close(out, (1 if shown else 3) * X.sin().square())
    torch.testing.assert_close(g, (1 if shown else 3) * want(X))


def test_a_higher_order_operator_in_one_compiled_graph_is_an_error():
    f = lambda x: torch_checkpoint(function, x, use_reentrant=False)
    with replaced(), pytest.raises(Exception, match="cannot keep replaced on inside of a higher-order operator"):
        torch.compile(f, fullgraph=True, backend="aot_eager")(X)


def test_other_modes_do_not_receive_the_function_again():
    """Only the innermost mode receives a function; those that it calls go through all modes, once."""
    shown = []

    class Outer(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            shown.append(func)
            return func(*args, **(kwargs or {}))

    x = X.clone().requires_grad_()
    with Outer(), replaced():
        y = function(x).sum()
        shown.clear()
        y.backward()
    assert torch.Tensor.backward not in shown
    torch.testing.assert_close(x.grad, want(X))


def test_compiled_equals_eager():
    f = torch.compile(lambda x: jvp(function, (x,), (x,))[1], fullgraph=True, backend="aot_eager")
    with replaced():
        torch.testing.assert_close(f(X), want(X) * X)


def test_ambient_settings_include_what_is_replaced():
    """They are part of the key of a compiled or captured step."""
    outside = ambient_settings()
    seen = []
    for block in (metaattn.replace_sdpa(), metaattn.replace_sdpa(), metaattn.replace_sdpa(backend="reference")):
        with block:
            seen.append(ambient_settings())
    assert ambient_settings() == outside
    assert seen[0] == seen[1]
    assert len({outside, *seen}) == 3
    with metaattn.use_backend("reference"):
        assert ambient_settings() != outside
