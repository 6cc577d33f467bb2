"""Reference cycles: no call leaves an object of ours, or a tensor, to the garbage collector."""

import collections
import gc

import pytest
import torch
from torch.func import grad, jvp, linearize, vmap

import metaattn
from metaattn.autodiff import split_tensors

F64 = {"dtype": torch.float64}
Q, T = (torch.randn(1, 2, 5, 4, generator=torch.Generator().manual_seed(i), **F64) for i in range(2))


def attention(q):
    return metaattn.sdpa(q, q.sin(), q.cos()).sin().sum()


def plain(q):
    """As many levels and arguments, with none of our functions."""
    return (q * q.sin()).cos().sum()


FUNCTIONS = {"attention": attention, "checkpointed": metaattn.meta.checkpoint(attention)}


def double_backward(f):
    x = Q.clone().requires_grad_()
    (g,) = torch.autograd.grad(f(x), x, create_graph=True)
    torch.autograd.grad(g.square().sum(), x)


NESTINGS = {
    "grad": lambda f: grad(f)(Q),
    "jvp": lambda f: jvp(f, (Q,), (T,)),
    "jvp_grad": lambda f: jvp(grad(f), (Q,), (T,)),
    "grad_grad": lambda f: grad(lambda q: grad(f)(q).square().sum())(Q),
    "grad_jvp": lambda f: grad(lambda q: jvp(f, (q,), (T,))[1])(Q),
    "vmap_grad": lambda f: vmap(grad(f))(torch.stack([Q, T])),
    "linearize": lambda f: linearize(f, Q)[1](T),
}


def garbage(call):
    """Return what a call leaves in reference cycles, after it has run before."""
    call()
    gc.collect()
    gc.freeze()  # so that the second collection takes milliseconds
    gc.disable()
    try:
        gc.set_debug(gc.DEBUG_SAVEALL)
        call()
        gc.collect()
        return list(gc.garbage)
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.unfreeze()
        gc.enable()


def kinds(objects):
    return collections.Counter(type(o).__qualname__ for o in objects)


def is_ours(thing):
    module = getattr(thing, "__module__", None) or type(thing).__module__
    return str(module).startswith("metaattn")


@pytest.mark.parametrize("name", FUNCTIONS)
def test_double_backward_leaves_nothing(name):
    assert not kinds(garbage(lambda: double_backward(FUNCTIONS[name])))


@pytest.mark.parametrize("nesting", [n for n in NESTINGS if n != "linearize"])
def test_transforms_leave_what_they_leave_without_us(nesting):
    """That is PyTorch's: see tests/boundaries."""
    got, want = (garbage(lambda f=f: NESTINGS[nesting](f)) for f in (attention, plain))
    assert kinds(got) == kinds(want)


@pytest.mark.parametrize("nesting", NESTINGS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_nothing_of_ours_and_no_tensor_is_left(name, nesting):
    """A checkpoint runs more transforms than the function itself, and linearize leaves a whole graph."""
    left = garbage(lambda: NESTINGS[nesting](FUNCTIONS[name]))
    assert not kinds(o for o in left if is_ours(o))
    if nesting != "linearize":
        assert not kinds(o for o in left if isinstance(o, torch.Tensor))


def test_split_tensors_leaves_nothing():
    assert not kinds(garbage(lambda: split_tensors({"a": [Q, (T, 1)], "b": None})[1]((Q, T))))
