"""Derivatives as calls, and their measurement, on a product of three numbers with known derivatives."""

import pytest
import torch
from torch.utils._pytree import tree_leaves

from metaattn.cli._derivatives import RULES, derivative
from metaattn.cli._metrics import largest_error, milliseconds, peak_bytes, relative_error


def _product(q, k, v):
    return q * k * v


def _expected(rule, x, t, w):
    (q, k, v), (dq, dk, dv) = x, t
    value, tangent = q * k * v, dq * k * v + q * dk * v + q * k * dv
    gradient = [w * k * v, w * q * v, w * q * k]
    hessian = [w * (dk * v + k * dv), w * (dq * v + q * dv), w * (dq * k + q * dk)]
    if rule == "vmap":
        rows = [_expected("hvp", (first, k, v), t, w) for first in (q, dq)]
        return [torch.stack(pair) for pair in zip(*rows, strict=True)]
    return {
        "fwd": [value],
        "bwd": gradient,
        "grad": gradient,
        "jvp": [value, tangent],
        "hvp": gradient + hessian,
        "rof": hessian,
        "dbl": [*hessian, tangent],
    }[rule]


@pytest.mark.parametrize("rule", RULES)
def test_derivative(rule):
    tensors = torch.randn(7, 5, dtype=torch.float64).unbind()
    x, t, w = tensors[:3], tensors[3:6], tensors[6]
    got, want = tree_leaves(derivative(rule, _product, x, t, w)()), _expected(rule, x, t, w)
    assert len(got) == len(want)
    assert relative_error(got, want) < 1e-14


def test_unknown_rule():
    with pytest.raises(ValueError, match=r"rule must be one of fwd, bwd, .*; got 'hessian'"):
        derivative("hessian", _product, [torch.ones(1)] * 3, [torch.ones(1)] * 3, torch.ones(1))


def test_relative_error():
    one = torch.tensor([3.0, 4.0], dtype=torch.float64)
    assert relative_error([one, one], [one, one]) == 0
    assert relative_error([1.1 * one], [one]) == pytest.approx(0.1)
    assert not relative_error([one * torch.nan], [one]) <= 1  # NaN passes no bound


def test_largest_error():
    one = torch.ones(3, dtype=torch.float64)
    assert largest_error([one, 1.1 * one], [one, one]) == pytest.approx(0.1)
    assert not largest_error([one, one * torch.nan], [one, one]) <= 1
    with pytest.raises(ValueError, match="argument 2 is longer"):
        largest_error([one], [one, one])


def test_peak_bytes(capfd):
    """Three tensors of 4,000 bytes are alive at the peak; output of the profiler is discarded."""
    assert peak_bytes(lambda: torch.ones(1000) + torch.ones(1000)) == 12_000
    assert capfd.readouterr().err == ""


def test_milliseconds():
    calls = []
    assert milliseconds(lambda: calls.append(1), 1e-3) > 0
    assert len(calls) > 2
