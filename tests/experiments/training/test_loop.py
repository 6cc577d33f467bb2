"""The outer loop; test_cli.py tests whole runs."""

import itertools

import pytest

from experiments.training.config import Config, Schedule
from experiments.training.loop import learning_rate


def test_schedule():
    c = Config()
    c.train.steps, c.train.warmup, c.train.learning_rate = 100, 10, 1.0
    rates = [learning_rate(c, s) for s in range(101)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == rates[10] == pytest.approx(1.0)
    assert rates[100] == pytest.approx(0.01)
    assert all(a >= b for a, b in itertools.pairwise(rates[10:]))
    c.train.schedule = Schedule.constant
    assert learning_rate(c, 99) == 1.0
