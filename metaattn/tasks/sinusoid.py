"""Sinusoid regression: the first task of MAML."""

from __future__ import annotations

import math

import torch
from torch.utils.data import Dataset

from .episodes import Batch, Episode, checked_index, generator


class Sinusoids(Dataset[Episode]):
    """Regression to ``y = amplitude * sin(x + phase)`` from a few points.

    Amplitudes are uniform in ``[0.1, 5]``, phases in ``[0, π]``, inputs in ``[-5, 5]``. Episode ``i``
    depends on the seed and on ``i`` alone. Inputs and targets are ``[samples, 1]``.

    Args:
        shot: Points in the support set.
        queries: Points in the query set.
        seed: Which sequence of episodes.
        length: How many there are.

    Raises:
        ValueError: A number below 1.
        IndexError: An index that is not below ``length``.
        TypeError: An index that is no integer.

    Source:
        Finn, Abbeel and Levine 2017 (arXiv 1703.03400), section 5.1.

    Example:
        >>> from metaattn.tasks import Sinusoids
        >>> Sinusoids(shot=5, queries=10)[0].support.inputs.shape
        torch.Size([5, 1])
    """

    def __init__(self, *, shot: int, queries: int, seed: int = 0, length: int = 2**31) -> None:
        for name, value in (("shot", shot), ("queries", queries), ("length", length)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1; got {value}")
        self.shot, self.queries, self.seed, self.length = shot, queries, seed, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Episode:
        g = generator(self.seed, checked_index(index, self.length))
        amplitude, phase = torch.rand(2, generator=g).tolist()
        x = 10 * torch.rand(self.shot + self.queries, 1, generator=g) - 5
        y = (0.1 + 4.9 * amplitude) * torch.sin(x + math.pi * phase)
        return Episode(Batch(x[: self.shot], y[: self.shot]), Batch(x[self.shot :], y[self.shot :]))
