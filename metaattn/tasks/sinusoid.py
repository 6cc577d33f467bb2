"""Sinusoid regression, the first experiment of the MAML paper."""

from __future__ import annotations

import math

import torch
from torch.utils.data import Dataset

from .episodes import Batch, Episode, checked_index, generator


class Sinusoids(Dataset[Episode]):
    """Dataset of regression tasks ``y = amplitude * sin(x + phase)``, from a few points each.

    Amplitudes are uniform in ``[0.1, 5]``, phases in ``[0, π]``, inputs in ``[-5, 5]``. Episode ``i`` depends only on
    the seed and on ``i``. ``sinusoids[i]`` returns an :class:`Episode`: support inputs and targets ``[shot, 1]``, query
    inputs and targets ``[queries, 1]``.

    Args:
        shot: Number of points in the support set, at least 1.
        queries: Number of points in the query set, at least 1.
        seed: Seed of the sequence of episodes.
        length: Number of episodes, at least 1.

    Raises:
        ValueError: A number is below 1.
        IndexError: An index is not below ``length``.
        TypeError: An index is not an integer.

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
