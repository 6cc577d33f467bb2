"""Algorithms and tasks of learn2learn with metaattn's Transformer and learners: the same meta-gradients."""

import random
from pathlib import Path

import pytest
import torch
from torch.func import functional_call
from torch.nn import functional as F

import metaattn
from metaattn.meta import first_order_maml, maml, meta_sgd
from metaattn.tasks import Batch, Episode, stack
from tests.helpers import assert_close, python_blocks

l2l = pytest.importorskip("learn2learn")

PAGE = Path(__file__).parent.parent.parent / "docs" / "integrations" / "learn2learn.md"
TASKS, STEPS, RATE, WAY = 3, 2, 0.3, 3


@pytest.fixture
def model():
    """A Transformer in float64 with a nonzero head, so that all parameters have gradients from the first step."""
    config = {"input": "continuous", "in_features": 3, "output": "pooled", "out_features": WAY}
    model = metaattn.Transformer(**config, dim=8, depth=1, heads=2).double()
    torch.nn.init.normal_(model.head.weight)
    return model


def _tasks(samples=6):
    """Inputs and targets of support and query sets, ``[tasks, samples, ...]``."""
    return [
        (torch.randn(TASKS, samples, 5, 3).double(), torch.randint(WAY, (TASKS, samples))) for _ in ("support", "query")
    ]


def _loss(model):
    return lambda params, x, y: F.cross_entropy(functional_call(model, params, (x,)), y)


def _backward(algorithm, support, query):
    """Run one meta-batch as in learn2learn, return the tasks' losses, and leave the gradients in ``.grad``."""
    algorithm.zero_grad()
    losses = []
    for (x, y), (xq, yq) in zip(zip(*support, strict=True), zip(*query, strict=True), strict=True):
        clone = algorithm.clone()
        for _ in range(STEPS):
            clone.adapt(F.cross_entropy(clone(x), y))
        losses.append(F.cross_entropy(clone(xq), yq))
        (losses[-1] / len(support[0])).backward()
    return torch.stack(losses)


@pytest.mark.parametrize("first_order", [False, True], ids=["second_order", "first_order"])
def test_maml_is_ours(model, first_order):
    support, query = _tasks()
    learner = (first_order_maml if first_order else maml)(_loss(model), steps=STEPS, learning_rate=RATE)
    meta = learner.init(dict(model.named_parameters()))
    losses, gradient = learner.value_and_grad(meta, support, query)
    assert_close(_backward(l2l.algorithms.MAML(model, lr=RATE, first_order=first_order), support, query), losses)
    assert_close({k: p.grad for k, p in model.named_parameters()}, gradient["params"])


def test_orders_differ(model):
    """First and second order differ, so that the test above can distinguish them."""
    support, query = _tasks()
    gradients = []
    for first_order in (False, True):
        _backward(l2l.algorithms.MAML(model, lr=RATE, first_order=first_order), support, query)
        gradients.append(model.embed.weight.grad.clone())
    assert (gradients[0] - gradients[1]).norm() > 1e-2 * gradients[0].norm()


def test_meta_sgd_is_ours(model):
    """The gradients of learning rates agree too; learn2learn orders them by parameter, metaattn names them."""
    support, query = _tasks()
    learner = meta_sgd(_loss(model), steps=STEPS, learning_rate=RATE)
    losses, gradient = learner.value_and_grad(learner.init(dict(model.named_parameters())), support, query)
    theirs = l2l.algorithms.MetaSGD(model, lr=RATE)
    assert_close(_backward(theirs, support, query), losses)
    assert_close({k: p.grad for k, p in model.named_parameters()}, gradient["params"])
    names = (k for k, _ in model.named_parameters())
    # Rates of metaattn have a first dimension of inner steps, of length 1 if all steps share them.
    assert_close({k: lr.grad[None] for k, lr in zip(names, theirs.lrs, strict=True)}, gradient["rates"])


@pytest.mark.parametrize("name", ["MAML", "MetaSGD"])
def test_training(model, name):
    support, query = _tasks()
    theirs = getattr(l2l.algorithms, name)(model, lr=0.1)
    optimizer = torch.optim.Adam(theirs.parameters(), lr=0.01)
    losses = []
    for _ in range(10):
        losses.append(_backward(theirs, support, query).mean().item())
        optimizer.step()
    assert losses[-1] < 0.9 * losses[0]


def test_rematerialised_model():
    """With ``remat=True`` on clones, whose weights are results of operations rather than parameters."""
    config = {
        "input": "continuous",
        "in_features": 3,
        "output": "pooled",
        "out_features": WAY,
        "dim": 8,
        "depth": 1,
        "heads": 2,
    }
    support, query = _tasks()
    plain, remat = (metaattn.Transformer(**config, remat=remat).double() for remat in (False, True))
    torch.nn.init.normal_(plain.head.weight)
    remat.load_state_dict(plain.state_dict())
    for model in (plain, remat):
        _backward(l2l.algorithms.MAML(model, lr=RATE), support, query)
    assert_close([p.grad for p in remat.parameters()], [p.grad for p in plain.parameters()])


@pytest.mark.filterwarnings("ignore:TaskDataset is deprecated:DeprecationWarning")
@pytest.mark.parametrize("name", ["Taskset", "TaskDataset"])
def test_its_tasks_feed_our_learner(model, name):
    """Tasks of learn2learn as episodes: disjoint sets, one label per class, and the losses of learn2learn."""
    random.seed(0)
    transforms, data = l2l.data.transforms, torch.randn(60, 5, 3).double()
    data[:, 0, 0] = torch.arange(60)  # the value of a sample is its index, and its class is the index modulo 6
    dataset = l2l.data.MetaDataset(torch.utils.data.TensorDataset(data, torch.arange(60) % 6))
    steps = [
        transforms.NWays(dataset, WAY),
        transforms.KShots(dataset, 4),
        transforms.LoadData(dataset),
        transforms.RemapLabels(dataset),
    ]
    tasks = getattr(l2l.data, name)(dataset, steps, num_tasks=TASKS)
    parts = [l2l.data.partition_task(*tasks[i], shots=1) for i in range(TASKS)]
    support, query = stack([Episode(*(Batch(*part) for part in both)) for both in parts], 0, TASKS)
    assert support.inputs.shape == (TASKS, WAY, 5, 3)
    assert query.targets.shape == (TASKS, 3 * WAY)
    for i in range(TASKS):
        samples = torch.cat([support.inputs[i], query.inputs[i]])[:, 0, 0].long().tolist()
        targets = torch.cat([support.targets[i], query.targets[i]]).tolist()
        assert len(set(samples)) == 4 * WAY
        assert len({(s % 6, t) for s, t in zip(samples, targets, strict=True)}) == len(set(targets)) == WAY
    learner = maml(_loss(model), steps=STEPS, learning_rate=1e-3)
    losses, gradient = learner.value_and_grad(learner.init(dict(model.named_parameters())), support, query)
    assert_close(_backward(l2l.algorithms.MAML(model, lr=1e-3), support, query), losses)
    assert_close({k: p.grad for k, p in model.named_parameters()}, gradient["params"])


def test_page():
    """The blocks of the page run as printed: learn2learn trains, and a learner of metaattn continues."""
    session = {}
    for block in python_blocks(PAGE):
        exec(block, session)
    history = torch.tensor(session["history"]).view(10, 4).mean(1)
    assert history[-3:].mean() < 0.9 * history[0]
    assert session["losses"].shape == (16,)
    assert session["losses"].mean() < history[0]
    assert all(g.isfinite().all() for g in session["meta_gradient"]["params"].values())
