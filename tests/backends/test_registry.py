"""Names, contexts and the choice of a backend."""

import threading

import pytest
import torch

import metaattn
from metaattn.backends import current_backend, registry, select
from metaattn.backends.base import Operands, Problem
from metaattn.ops import operators


def test_the_default_is_auto():
    assert current_backend() == "auto"


def test_blocks_nest_and_end():
    with metaattn.use_backend("reference"):
        with metaattn.use_backend("blockwise"):
            assert current_backend() == "blockwise"
        assert current_backend() == "reference"
    assert current_backend() == "auto"


def test_a_block_ends_on_an_error():
    with pytest.raises(RuntimeError), metaattn.use_backend("reference"):
        raise RuntimeError
    assert current_backend() == "auto"
    assert registry._open == 0


def test_one_object_can_be_entered_again():
    block = metaattn.use_backend("reference")
    with block, block:
        assert current_backend() == "reference"
    assert current_backend() == "auto"


def test_unknown_name():
    with pytest.raises(ValueError, match=r"backend must be one of 'auto', .*; got 'flash'"):
        metaattn.use_backend("flash")


def test_each_thread_has_its_own_blocks():
    """Blocks of two threads interleave: each thread sees its own, and a third without a block sees the default."""
    seen, barrier = {}, threading.Barrier(3)

    def work(name):
        if name:
            with metaattn.use_backend(name):
                barrier.wait()
                seen[name] = current_backend()
                barrier.wait()
        else:
            barrier.wait()
            seen[name] = current_backend()
            barrier.wait()

    threads = [threading.Thread(target=work, args=(name,)) for name in ("reference", "blockwise", None)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert seen == {"reference": "reference", "blockwise": "blockwise", None: "auto"}


def _selected(monkeypatch, f):
    """Return the names of the backends that the operators selected."""
    names = []
    monkeypatch.setattr(operators, "select", lambda name, *args: names.append(name) or select(name, *args))
    f()
    return set(names)


X = torch.randn(1, 2, 4, 4, dtype=torch.float64)


def test_the_argument_beats_the_context(monkeypatch):
    def f():
        with metaattn.use_backend("blockwise"):
            metaattn.sdpa(X, X, X, backend="reference")

    assert _selected(monkeypatch, f) == {"reference"}


def test_derivatives_use_the_backend_of_their_call(monkeypatch):
    """Also if they are taken outside the block, or inside another one."""

    def f():
        x = X.clone().requires_grad_()
        with metaattn.use_backend("reference"):
            out = metaattn.sdpa(x, x, x)
        (g,) = torch.autograd.grad(out.sin().sum(), x, create_graph=True)
        with metaattn.use_backend("blockwise"):
            g.sin().sum().backward()

    assert _selected(monkeypatch, f) == {"reference"}


def test_a_named_backend_is_never_replaced():
    for name in ("reference", "blockwise"):
        assert select(name, Problem(1.0), Operands(X, X, X)).name == name
    assert select("auto", Problem(1.0), Operands(X, X, X)).name in registry.BACKENDS
