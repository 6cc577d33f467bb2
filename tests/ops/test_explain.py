"""The explanation of a call, and the layout of operators' arguments."""

import pytest
import torch

import metaattn
from metaattn.backends import PRIMITIVES
from metaattn.backends.base import Operands, Rows, Tangent, Values
from metaattn.ops import Explanation, operators

Q = torch.randn(1, 2, 4, 8)


def test_fields_are_the_primitives():
    assert Explanation._fields == PRIMITIVES
    assert set(metaattn.explain(Q, Q, Q, backend="reference")) == {("reference", "asked for")}


@pytest.mark.parametrize("backend", ["auto", "blockwise"])
def test_reference_computes_calls_with_one_key(backend):
    found = metaattn.explain(Q, Q[..., :1, :], Q[..., :1, :], backend=backend)
    assert {name for name, _ in found} == {"reference"}
    assert found.forward[1].startswith("one key")


@pytest.mark.parametrize(("old", "new"), [("tangent", "forward_jvp"), ("second", "backward_jvp")])
def test_former_names_are_deprecated(old, new):
    found = metaattn.explain(Q, Q, Q)
    with pytest.warns(DeprecationWarning, match=f"Explanation.{old} is now called {new}"):
        assert getattr(found, old) == getattr(found, new)


def test_it_draws_no_random_numbers():
    torch.manual_seed(0)
    want = torch.rand(3)
    torch.manual_seed(0)
    metaattn.explain(Q, Q, Q, dropout_p=0.5)
    assert torch.equal(torch.rand(3), want)


def _numbered(*structs):
    count = iter(range(100))
    return [struct(*(next(count) for _ in struct._fields)) for struct in structs]


@pytest.mark.parametrize("tangents", [0, 1, 3])
def test_flat_arguments_of_the_gradients(tangents):
    x, values, *rest = _numbered(Operands, Values, Rows, Rows, Rows, *[Tangent] * tangents)
    args = operators.BackwardTensors(x, values, *(rest[:3] if tangents else rest[:1]), tangents=rest[3:])
    flat = args.flatten()
    assert flat == tuple(range(len(flat)))
    assert operators.BackwardTensors.unflatten(flat)._replace(tangents=rest[3:]) == args
    assert flat[: len(args.of_backward.flatten())] == args.of_backward.flatten()


@pytest.mark.parametrize("operator", [operators.backward, operators.backward_jvp, operators.backward_with_jvp])
def test_arguments_of_the_packed_gradients(operator):
    names = [a.name for a in operator._schema.arguments]
    packed = [a.name for a in operators.backward_packed._schema.arguments]
    args = [name != "bias_grad" and name for name in names]
    got = dict(zip(packed, operators.packed_arguments(operator, args), strict=True))
    assert got.pop("both") == (operator is operators.backward_with_jvp)
    assert got == {name: name if name in names else None for name in packed if name != "both"}
    assert operators.packed_arguments(operator, [True] * len(names)) is None
