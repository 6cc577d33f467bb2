"""Episodes: their contents, disjoint sets, seeds, and the same result in every worker."""

import functools
import operator
import re

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, TensorDataset

from metaattn.tasks import Episodes, Sinusoids, split_classes, stack
from tests.helpers import assert_close

CLASSES, EACH = 12, 8
# The value of a sample is its index, so that tests can tell where it went.
DATA = torch.arange(CLASSES * EACH).float()[:, None]
LABELS = torch.arange(CLASSES * EACH) % CLASSES


def _episodes(**changes):
    return Episodes(DATA, LABELS, **{"way": 5, "shot": 2, "queries": 3, **changes})


def test_shapes_and_targets():
    support, query = _episodes()[0]
    assert support.inputs.shape == (10, 1)
    assert query.inputs.shape == (15, 1)
    assert support.targets.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert query.targets.bincount().tolist() == [3] * 5


def test_targets_name_one_class_each():
    for i in range(20):
        support, query = _episodes()[i]
        classes = [set() for _ in range(5)]
        for x, y in zip(
            torch.cat([support.inputs, query.inputs]), torch.cat([support.targets, query.targets]), strict=True
        ):
            classes[y].add(LABELS[int(x)].item())
        assert [len(c) for c in classes] == [1] * 5
        assert len(set.union(*classes)) == 5


def test_support_and_query_are_disjoint():
    for i in range(50):
        support, query = _episodes()[i]
        samples = torch.cat([support.inputs, query.inputs]).flatten().tolist()
        assert len(set(samples)) == len(samples)


def test_seeded():
    assert_close(_episodes()[3], _episodes()[3])
    first, other = (_episodes(seed=s)[3].support.inputs for s in (0, 1))
    assert not torch.equal(first, other)
    assert not torch.equal(_episodes()[3].support.inputs, _episodes()[4].support.inputs)


def test_neither_reads_nor_moves_the_global_generator():
    state = torch.get_rng_state()
    a = _episodes()[0]
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    assert_close(_episodes()[0], a)


def test_all_classes_and_samples_come():
    seen = torch.cat([_episodes()[i].query.inputs for i in range(200)]).unique()
    assert len(seen) == len(DATA)


def test_classes_restrict():
    train, test = split_classes(range(CLASSES), (0.5, 0.5))
    assert not set(train) & set(test)
    for classes in (train, test):
        episodes = _episodes(classes=classes)
        seen = {LABELS[int(x)].item() for i in range(50) for x in episodes[i].query.inputs}
        assert seen == set(classes)


def test_workers_give_the_same():
    episodes = _episodes(length=6)
    alone = [e.query.inputs for e in DataLoader(episodes, batch_size=2)]
    together = [e.query.inputs for e in DataLoader(episodes, batch_size=2, num_workers=2)]
    assert_close(together, alone)
    assert_close(stack(episodes, 2, 2).query.inputs, alone[1])


def test_augment():
    changed = _episodes(augment=lambda x, g: x + torch.rand(x.shape, generator=g))
    plain, moved, again = _episodes()[0], changed[0], changed[0]
    assert_close(moved, again)
    assert not torch.equal(plain.query.inputs, moved.query.inputs)
    assert torch.equal(plain.query.inputs, moved.query.inputs.floor())


class _WithTargets(Dataset):
    targets = LABELS.tolist()

    def __len__(self):
        return len(DATA)

    def __getitem__(self, i):
        assert i >= 0
        return DATA[i], self.targets[i]


PAIRS = list(zip(DATA, LABELS.tolist(), strict=True))


@pytest.mark.parametrize(
    "source", [_WithTargets(), TensorDataset(DATA, LABELS), PAIRS], ids=["targets", "read_through", "list"]
)
def test_any_dataset(source):
    assert_close(Episodes(source, way=5, shot=2, queries=3)[7], _episodes()[7])


def test_numpy_arrays_are_like_tensors():
    data, labels = DATA.numpy(), LABELS.numpy()
    data.flags.writeable = False  # as in a memory-mapped file; must not raise a warning
    got = Episodes(data, labels, way=5, shot=2, queries=3)[7]
    assert_close(got, _episodes()[7])
    assert got.support.inputs.shape == (10, 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"way": 13}, "13-way episodes need at least 13 classes; got 12"),
        ({"shot": 6}, "need 9 samples of each class; class 0 has 8"),
        ({"shot": 0}, "shot must be at least 1; got 0"),
        ({"classes": [0, 1, 2, 3, 99]}, "classes must be labels of the data; got 99, which is none of its 12 labels"),
        ({"labels": LABELS[:5]}, r"labels must be one for each of the 96 samples; got shape \[5\]"),
        ({"labels": None}, "a tensor or an array needs labels"),
        ({"data": DATA.numpy(), "labels": None}, "a tensor or an array needs labels"),
        ({"classes": [0, 1, 2, 3, 3]}, r"each class must appear once; got \[0, 1, 2, 3, 3\]"),
    ],
)
def test_errors(changes, message):
    with pytest.raises(ValueError, match=message):
        Episodes(**{"data": DATA, "labels": LABELS, "way": 5, "shot": 2, "queries": 3, **changes})


class _Dicts(_WithTargets):
    def __getitem__(self, i):
        return {"image": DATA[i]}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": list(DATA)}, "its sample 0 is a Tensor. Stack a list of tensors: torch.stack"),
        ({"data": DATA.tolist()}, "its sample 0 is a list"),
        ({"data": [(x, y, 0) for x, y in PAIRS]}, "its sample 0 is a tuple of 3"),
        ({"data": _Dicts(), "labels": None}, "its sample 0 is a dict"),
        ({"labels": [f"c{y}" for y in LABELS]}, "labels must be integers .*; number the classes first"),
        ({"labels": LABELS.numpy().astype(str)}, "labels must be integers .*; number the classes first"),
        ({"labels": LABELS.double()}, "labels must be integers; got torch.float64"),
        ({"data": [(x, f"c{y}") for x, y in PAIRS], "labels": None}, "labels must be integers"),
    ],
)
def test_type_errors(changes, message):
    with pytest.raises(TypeError, match=message):
        Episodes(**{"data": DATA, "labels": LABELS, "way": 5, "shot": 2, "queries": 3, **changes})


@pytest.mark.parametrize("episodes", [_episodes(length=4), Sinusoids(shot=1, queries=1, length=4)])
def test_index_errors(episodes):
    for i in (-1, 4):
        with pytest.raises(IndexError, match="index of an episode must be from 0 to 3; got"):
            episodes[i]
    for i in (slice(0, 2), "0", 1.0):
        with pytest.raises(TypeError, match=rf"index of an episode must be an integer; got {re.escape(repr(i))}"):
            episodes[i]
    assert_close(episodes[np.int64(3)], episodes[3])
    assert len(episodes) == 4
    with pytest.raises(ValueError, match="count must be at least 1; got 0"):
        stack(episodes, 0, 0)


def test_split_classes():
    parts = split_classes(range(100), (0.7, 0.1, 0.2), seed=3)
    assert [len(p) for p in parts] == [70, 10, 20]
    assert sorted(functools.reduce(operator.iadd, parts, [])) == list(range(100))
    assert parts == split_classes(range(100), (0.7, 0.1, 0.2), seed=3)
    assert parts != split_classes(range(100), (0.7, 0.1, 0.2), seed=4)
    with pytest.raises(ValueError, match="sum to 1"):
        split_classes(range(10), (0.5, 0.2))
    with pytest.raises(ValueError, match=r"must appear once; got \[1, 1\]"):
        split_classes([1, 1], (1.0,))
