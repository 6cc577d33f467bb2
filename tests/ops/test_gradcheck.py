"""PyTorch's gradcheck and gradgradcheck, with every check that they have, on every backend."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from tests.ops.cases import CASES

pytestmark = pytest.mark.usefixtures("small_tiles")
# The rules are the same for every backend, and test_exactness has all of their nestings on blockwise.
BACKENDS = ["reference", pytest.param("blockwise", marks=pytest.mark.exhaustive)]
NAMES = ["causal", "gqa_uneven", "mask", "bias", "bias_column", "window_causal", "dropout", "broadcast", "strided"]


def _call(name, backend):
    case = CASES[name]
    inputs = tuple(x.requires_grad_() for x in case.inputs())
    attention = case.attention(backend)

    def f(*x):
        out, lse = attention(*x)
        return out, torch.where(torch.isinf(lse), 0.0, lse)

    return f, inputs


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
def test_gradcheck(name, backend):
    f, inputs = _call(name, backend)
    assert gradcheck(
        f,
        inputs,
        check_forward_ad=True,
        check_backward_ad=True,
        # The legacy vmap behind the batched checks allows no random operation.
        check_batched_grad=True,
        check_batched_forward_grad=name != "dropout",
        check_undefined_grad=True,
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
def test_gradgradcheck(name, backend):
    f, inputs = _call(name, backend)
    assert gradgradcheck(
        f,
        inputs,
        check_fwd_over_rev=True,
        check_rev_over_rev=True,
        check_batched_grad=True,
        check_undefined_grad=True,
    )
