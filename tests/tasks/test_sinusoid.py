"""Sinusoids: ranges, seeds, and one function for support and query set."""

import math

import pytest
import torch

from metaattn.tasks import Sinusoids, stack
from tests.helpers import assert_close


def test_sinusoids():
    episodes = Sinusoids(shot=5, queries=10, seed=1)
    e = stack(episodes, 0, 200)
    assert e.support.inputs.shape == (200, 5, 1)
    assert e.query.targets.shape == (200, 10, 1)
    assert e.query.inputs.min() >= -5
    assert e.query.inputs.max() <= 5
    assert e.query.inputs.max() > 4.9
    assert_close(episodes[3], Sinusoids(shot=5, queries=10, seed=1)[3])
    for i in range(20):  # support and query share a sinusoid: a fit on one is exact on the other
        (x, y), (u, v) = (tuple(t.double() for t in part) for part in episodes[i])
        fit = torch.linalg.lstsq(torch.cat([x.sin(), x.cos()], 1), y).solution
        assert torch.allclose(torch.cat([u.sin(), u.cos()], 1) @ fit, v, atol=1e-4)
        amplitude, phase = fit.norm(), math.atan2(fit[1], fit[0])
        assert 0.1 <= amplitude <= 5
        assert -1e-3 <= phase <= math.pi + 1e-3


def test_sinusoid_errors():
    with pytest.raises(ValueError, match="shot must be at least 1"):
        Sinusoids(shot=0, queries=1)
    with pytest.raises(IndexError, match="must be from 0 to 1; got 2"):
        Sinusoids(shot=1, queries=1, length=2)[2]
