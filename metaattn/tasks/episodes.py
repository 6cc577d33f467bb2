"""N-way K-shot episodes from labelled data; each is a pure function of the seed and its index."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

Augment = Callable[[Tensor, torch.Generator], Tensor]


class Batch(NamedTuple):
    """Inputs and targets of the samples in a support or query set.

    Args:
        inputs: ``[samples, ...]``, or ``[tasks, samples, ...]`` for stacked episodes.
        targets: ``[samples]`` integers in classification, ``[samples, ...]`` numbers in regression; after a dimension
            of tasks for stacked episodes.

    Example:
        >>> import torch
        >>> from metaattn.tasks import Batch
        >>> inputs, targets = Batch(torch.randn(5, 1), torch.randn(5, 1))
    """

    inputs: Tensor
    targets: Tensor


class Episode(NamedTuple):
    """Support set and query set of one task, or of several stacked tasks.

    Args:
        support: The samples from which the task is learned.
        query: The samples on which the result is evaluated.

    Example:
        >>> from metaattn.tasks import Sinusoids
        >>> (x, y), (x_query, y_query) = Sinusoids(shot=5, queries=10)[0]
        >>> x.shape, y_query.shape
        (torch.Size([5, 1]), torch.Size([10, 1]))
    """

    support: Batch
    query: Batch


class Indexed(Protocol):
    """Protocol of an object that returns an episode for an index."""

    def __getitem__(self, index: int) -> Episode: ...


def generator(seed: int, index: int) -> torch.Generator:
    """Return a generator of random numbers for a seed and an index, independent even between neighbouring indices."""
    state = int(np.random.SeedSequence([seed, index]).generate_state(1, np.uint64)[0])
    return torch.Generator().manual_seed(state)


def checked_index(index: int, length: int) -> int:
    """Return the index of an episode as an integer from 0 to ``length - 1``.

    Raises:
        TypeError: The index is not an integer.
        IndexError: The index is out of range.
    """
    try:
        index = operator.index(index)
    except TypeError as error:
        raise TypeError(
            f"the index of an episode must be an integer; got {index!r}. For several episodes, use metaattn.tasks.stack"
        ) from error
    if not 0 <= index < length:
        raise IndexError(f"the index of an episode must be from 0 to {length - 1}; got {index}")
    return index


def stack(episodes: Indexed, start: int, count: int) -> Episode:
    """Stack the episodes ``start, …, start + count - 1`` in a new first dimension: a batch of tasks.

    Args:
        episodes: An object with an episode for each index, such as :class:`Episodes`; all episodes of one shape.
        start: Index of the first episode.
        count: Number of episodes, at least 1.

    Returns:
        An episode with inputs ``[count, samples, ...]`` and targets ``[count, samples]`` or ``[count, samples, ...]``,
        in both sets.

    Raises:
        ValueError: ``count`` is below 1.
        IndexError: An episode has no such index.

    Example:
        >>> from metaattn.tasks import Sinusoids, stack
        >>> tasks = stack(Sinusoids(shot=5, queries=10), start=0, count=16)
        >>> tasks.support.inputs.shape, tasks.query.targets.shape
        (torch.Size([16, 5, 1]), torch.Size([16, 10, 1]))
    """
    if count < 1:
        raise ValueError(f"count must be at least 1; got {count}")
    parts = [episodes[i] for i in range(start, start + count)]
    support, query = (Batch(*map(torch.stack, zip(*sets, strict=True))) for sets in zip(*parts, strict=True))
    return Episode(support, query)


def split_classes(classes: Sequence[int], fractions: Sequence[float], *, seed: int = 0) -> list[list[int]]:
    """Split classes at random into disjoint lists, for example for meta-training, validation and test.

    Args:
        classes: The classes, each once.
        fractions: Size of each list as a fraction of all classes; at least 0, with sum 1.
        seed: Seed of the shuffle.

    Returns:
        A list of classes for each fraction.

    Raises:
        ValueError: Fractions are negative or do not sum to 1; a class appears twice.

    Example:
        >>> from metaattn.tasks import split_classes
        >>> [len(part) for part in split_classes(range(10), (0.6, 0.2, 0.2))]
        [6, 2, 2]
    """
    if any(f < 0 for f in fractions) or abs(sum(fractions) - 1) > 1e-9:
        raise ValueError(f"fractions must be at least 0 and sum to 1; got {list(fractions)}")
    if len(set(classes)) != len(classes):
        raise ValueError(f"each class must appear once; got {list(classes)}")
    order = np.random.default_rng(seed).permutation(len(classes))
    ends = np.rint(np.cumsum(fractions) * len(classes)).astype(int)
    return [[classes[i] for i in sorted(part)] for part in np.split(order, ends[:-1])]


class Episodes(Dataset[Episode]):
    """Dataset of N-way K-shot classification episodes.

    Episode ``i`` depends only on the seed and on ``i``: it is the same in any order, process and data-loader worker.
    Its classes are drawn from ``classes`` without replacement, and so are the samples of each class, so that support
    and query set are disjoint. The classes of an episode have targets ``0, …, way - 1`` in random order.

    ``episodes[i]`` returns an :class:`Episode`: support inputs ``[way * shot, ...]`` with targets ``[way * shot]``, and
    query inputs ``[way * queries, ...]`` with targets ``[way * queries]``, both ordered by class.

    Args:
        data: A tensor or NumPy array ``[samples, ...]``, or a map-style dataset of ``(input, label)`` tuples.
        labels: The class of each sample, integers ``[samples]``. By default the dataset's ``targets``; without those
            the labels are read from the samples, once.
        way: Number of classes in an episode.
        shot: Number of samples of each class in the support set.
        queries: Number of samples of each class in the query set.
        classes: The classes to draw from; ``None`` for all. Disjoint lists (:func:`split_classes`) make disjoint
            families of tasks.
        seed: Seed of the sequence of episodes.
        length: Number of episodes.
        augment: ``augment(inputs, generator)`` returns the changed inputs of an episode, ``[samples, ...]``. It draws
            random numbers from the generator only.

    Raises:
        ValueError: There are too few classes or samples; a class appears twice; labels do not match the data.
        TypeError: Samples are not pairs; labels or an index are not integers.
        IndexError: An index is not below ``length``.

    Source:
        Vinyals et al. 2016 (arXiv 1606.04080), section 4.

    Example:
        >>> import torch
        >>> from metaattn.tasks import Episodes
        >>> data, labels = torch.randn(60, 8), torch.arange(60) % 6
        >>> episode = Episodes(data, labels, way=5, shot=1, queries=3)[0]
        >>> episode.support.inputs.shape, episode.query.targets.shape
        (torch.Size([5, 8]), torch.Size([15]))
    """

    def __init__(
        self,
        data: Tensor | np.ndarray | Dataset[Any] | Sequence[tuple[Any, Any]],
        labels: Sequence[int] | Tensor | np.ndarray | None = None,
        *,
        way: int,
        shot: int,
        queries: int,
        classes: Sequence[int] | None = None,
        seed: int = 0,
        length: int = 2**31,
        augment: Augment | None = None,
    ) -> None:
        for name, value in (("way", way), ("shot", shot), ("queries", queries), ("length", length)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1; got {value}")
        self.data, self.way, self.shot, self.queries = data, way, shot, queries
        self.seed, self.length, self.augment = seed, length, augment
        members = _members(data, labels)
        self.classes = sorted(members) if classes is None else list(classes)
        if len(set(self.classes)) != len(self.classes):
            raise ValueError(f"each class must appear once; got {self.classes}")
        if unknown := sorted(set(self.classes) - set(members)):
            raise ValueError(
                f"classes must be labels of the data; got {unknown[0]}, which is none of its {len(members)} labels"
            )
        if len(self.classes) < way:
            raise ValueError(f"{way}-way episodes need at least {way} classes; got {len(self.classes)}")
        self.members = [members[c] for c in self.classes]
        smallest = min(range(len(self.classes)), key=lambda i: len(self.members[i]))
        if len(self.members[smallest]) < shot + queries:
            raise ValueError(
                f"{shot} shots and {queries} queries need {shot + queries} samples of each class; class "
                f"{self.classes[smallest]} has {len(self.members[smallest])}"
            )

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Episode:
        g = generator(self.seed, checked_index(index, self.length))
        chosen = torch.randperm(len(self.classes), generator=g)[: self.way].tolist()
        each = self.shot + self.queries
        rows = torch.stack([self.members[c][torch.randperm(len(self.members[c]), generator=g)[:each]] for c in chosen])
        # All supports, then all queries; within each, class by class.
        inputs = self._inputs(torch.cat([rows[:, : self.shot].flatten(), rows[:, self.shot :].flatten()]))
        if self.augment is not None:
            inputs = self.augment(inputs, g)
        ways, n = torch.arange(self.way), self.way * self.shot
        return Episode(
            Batch(inputs[:n], ways.repeat_interleave(self.shot)),
            Batch(inputs[n:], ways.repeat_interleave(self.queries)),
        )

    def _inputs(self, rows: Tensor) -> Tensor:
        if isinstance(self.data, Tensor):
            return self.data[rows]
        if isinstance(self.data, np.ndarray):
            return torch.from_numpy(self.data[rows.numpy()])
        return torch.stack([torch.as_tensor(_pair(self.data, i)[0]) for i in rows.tolist()])


def _pair(data: Any, i: int) -> tuple[Any, Any]:
    item = data[i]
    if not isinstance(item, tuple) or len(item) != 2:
        got = type(item).__name__ + (f" of {len(item)}" if isinstance(item, tuple) else "")
        raise TypeError(
            f"data must be a tensor, a NumPy array or a dataset of (input, label) tuples; its sample {i} is a {got}. "
            "Stack a list of tensors: torch.stack(data)"
        )
    return item


def _members(data: Any, labels: Any) -> dict[int, Tensor]:
    """Return the indices of the samples of each class."""
    size, is_array = len(data), isinstance(data, Tensor | np.ndarray)
    if size and not is_array:
        _pair(data, 0)
    if labels is None:
        labels = getattr(data, "targets", None)
    if labels is None:
        if is_array:
            raise ValueError("a tensor or an array needs labels; got labels=None. Pass an integer for each sample")
        labels = [_pair(data, i)[1] for i in tqdm(range(size), desc="reading labels", leave=False)]
    try:
        labels = torch.as_tensor(labels)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"labels must be integers ({error}); number the classes first") from error
    if size and (labels.is_floating_point() or labels.is_complex()):
        raise TypeError(f"labels must be integers; got {labels.dtype}")
    if labels.shape != (size,):
        raise ValueError(f"labels must be one for each of the {size} samples; got shape {list(labels.shape)}")
    order = torch.argsort(labels, stable=True)
    values, counts = torch.unique_consecutive(labels[order], return_counts=True)
    return dict(zip(values.tolist(), order.split(counts.tolist()), strict=True))
