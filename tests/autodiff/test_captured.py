"""Walks through what a function captures, and the keys that they make."""

import functools
from collections import deque, namedtuple

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

from metaattn.autodiff import visit
from metaattn.compile.cache_key import function_key

W = torch.ones(2)
SCALE = 2.0
Pair = namedtuple("Pair", "a b")


class Holder:
    def __init__(self, **attributes):
        vars(self).update(attributes)

    def method(self, x):
        return x


class Tree(Holder):
    """Registered as a pytree: its leaves are found at any depth."""


pytree.register_pytree_node(
    Tree,
    lambda t: (list(vars(t).values()), list(vars(t))),
    lambda values, names: Tree(**dict(zip(names, values, strict=True))),
)


def uses_globals(x):
    return x * W * SCALE


def found(thing, **options):
    """Paths of the tensors that a walk finds."""
    return [v.path for v in visit(thing, "f", **options) if isinstance(v.thing, torch.Tensor) and v.repeats is None]


def closure_over(c):
    return lambda x: x * c


@pytest.mark.parametrize(
    ("thing", "paths"),
    [
        (lambda x, w=W: x * w, ["f.default 0"]),
        (closure_over(W), ["f.c"]),
        (closure_over(closure_over(W)), ["f.c.c"]),
        (functools.partial(torch.mul, W), ["f.0"]),
        (Holder(w=W).method, ["f.self.w"]),
        (Holder(inner=Holder(w=W)), []),  # attributes of attributes are too many to follow
        (Holder(inner=[{"w": W}]), ["f.inner.0.w"]),
        (Holder(inner=Tree(w=W)), ["f.inner.w"]),
        (Pair(W, deque([W * 2])), ["f.0", "f.1.leaf 0"]),
        ([W, W], ["f.0"]),
        (nn.Linear(2, 2), ["f.weight", "f.bias"]),
        (uses_globals, []),
        (torch, []),
    ],
)
def test_what_is_found(thing, paths):
    assert found(thing) == paths


def test_globals_are_followed_on_request():
    assert found(uses_globals, follow_globals=True) == ["f.global W"]


def test_opaque_types_are_not_looked_into():
    assert found([nn.Linear(2, 2), W], opaque=(nn.Module,)) == ["f.1"]


def test_a_key_does_not_depend_on_which_tensors_are_captured():
    a, b = (function_key(closure_over(t)) for t in (W, W + 1))
    assert a.key == b.key
    assert a.captured[0] is W


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (closure_over(W), closure_over(torch.ones(3))),
        (closure_over(W), closure_over(W.double())),
        (closure_over(1.0), closure_over(2.0)),
        (closure_over(1), closure_over(1.0)),
        (closure_over([W, W]), closure_over([W, W + 1])),  # one tensor twice, and two
        (closure_over({"a": 1}), closure_over({"b": 1})),
        (closure_over([1]), closure_over((1,))),
        (closure_over(nn.Linear(2, 2)), closure_over(nn.Linear(2, 2))),
        (closure_over(Holder(a=1)), closure_over(Holder(a=2))),
        (closure_over(Tree(a=1)), closure_over(Tree(a=2))),
        (closure_over({1, 2}), closure_over({1, 3})),
        (lambda x: x, lambda x: x + 1),
    ],
)
def test_keys_differ(one, other):
    assert function_key(one).key != function_key(other).key
    assert function_key(one).key == function_key(one).key


def test_a_key_follows_modes_of_modules_and_globals(monkeypatch):
    model = nn.Dropout()
    before = function_key(model).key
    assert function_key(model.eval()).key != before
    before = function_key(uses_globals).key
    monkeypatch.setitem(globals(), "SCALE", 3.0)
    assert function_key(uses_globals).key != before
