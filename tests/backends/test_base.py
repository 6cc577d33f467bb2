"""The interface of a backend: its defaults, and the primitives that it consists of."""

import inspect

import pytest
import torch

from metaattn.backends import PRIMITIVES, registry
from metaattn.backends.base import (
    Backend,
    BackwardJvpInputs,
    Operands,
    Problem,
    Rows,
    Tangent,
    empty_packed_qkv,
    pack_qkv,
)
from metaattn.backends.reference import ReferenceBackend

PROBLEM = Problem(0.5)
X = Operands(*torch.randn(3, 1, 2, 4, 8, dtype=torch.float64))
T = Tangent(*torch.randn(3, 1, 2, 4, 8, dtype=torch.float64))
W = Rows(torch.randn(1, 2, 4, 8, dtype=torch.float64))


class Recorded(ReferenceBackend):
    """The reference, with the names of the primitives that ran."""

    def __init__(self):
        self.names = []

    def __getattribute__(self, name):
        if name in PRIMITIVES:
            self.names.append(name)
        return super().__getattribute__(name)


def test_primitives_are_the_methods_that_compute():
    methods = [n for n, f in vars(Backend).items() if inspect.isfunction(f)]
    assert set(PRIMITIVES) == set(methods) - {"unsupported_reason", "fuses_backward_with_jvp"}
    assert len(set(PRIMITIVES)) == len(PRIMITIVES)


def test_a_backend_must_have_the_four_primitives_without_defaults():
    class Incomplete(Backend):
        name = "incomplete"

    with pytest.raises(TypeError, match="abstract"):
        Incomplete()
    assert Incomplete.__abstractmethods__ == {"forward", "backward", "forward_jvp", "backward_jvp"}


def test_by_default_every_call_is_supported_and_nothing_is_fused():
    backend = registry.BACKENDS["reference"]
    assert backend.unsupported_reason(PROBLEM, X) is None
    assert not backend.fuses_backward_with_jvp(X, bias_grad=False)


def test_by_default_two_primitives_run_one_after_the_other():
    backend = Recorded()
    values, values_t = backend.forward_with_jvp(PROBLEM, X, T)
    assert backend.names == ["forward_with_jvp", "forward", "forward_jvp"]
    backend.names.clear()
    inputs = BackwardJvpInputs(values, values_t, W, T)
    gradients, gradients_t = backend.backward_with_jvp(PROBLEM, X, inputs)
    assert backend.names == ["backward_with_jvp", "backward", "backward_jvp"]

    want = backend.backward(PROBLEM, X, values, W, bias_grad=False)
    want_t = backend.backward_jvp(PROBLEM, X, inputs)
    for got, exact in ((gradients, want), (gradients_t, want_t)):
        assert got.bias is None
        assert all(map(torch.equal, got[:3], exact[:3]))


def test_packed_gradients_are_a_view_only_if_they_are_adjacent():
    packed = empty_packed_qkv(X[:3])
    for written, t in zip(packed, X[:3], strict=True):
        written.copy_(t)
    got = pack_qkv(packed)
    assert got.data_ptr() == packed[0].data_ptr()
    assert torch.equal(got, pack_qkv(X[:3]))
    assert pack_qkv(X[:3]).data_ptr() != X.query.data_ptr()


@pytest.mark.parametrize("name", registry.BACKENDS)
def test_a_backend_is_registered_by_its_name(name):
    assert registry.BACKENDS[name].name == name
    assert isinstance(registry.BACKENDS[name], Backend)
