"""Meta-gradients against finite differences, a hand-written unroll, a loop over tasks and their definitions.

Tests maml, anil and meta_sgd, the base class in _learner, and the argument checks in _checks.
"""

import itertools
import math

import pytest
import torch
from torch.func import functional_call, grad

import metaattn
from metaattn.meta import GradientBased, adam, adapt, anil, first_order_maml, maml, meta_sgd, momentum, sgd, trajectory
from tests.helpers import assert_close, error

F64 = {"dtype": torch.float64}
MODEL = metaattn.Transformer(
    input="continuous", in_features=2, output="pooled", out_features=1, dim=4, heads=2, depth=1
).double()
TASKS = 3
ONE = torch.tensor(1.0)


@pytest.fixture
def params():
    g = torch.Generator().manual_seed(7)
    return {k: 0.5 * torch.randn(p.shape, generator=g, **F64) for k, p in MODEL.named_parameters()}


@pytest.fixture
def tasks():
    """Support and query sets of three tasks: four sequences of three vectors, with a target number for each."""
    g = torch.Generator().manual_seed(8)
    return [
        (torch.randn(TASKS, 4, 3, 2, generator=g, **F64), torch.randn(TASKS, 4, 1, generator=g, **F64)) for _ in "sq"
    ]


def _loss(params, x, y):
    return (functional_call(MODEL, params, (x,)) - y).square().mean()


LEARNERS = {
    "maml": lambda **s: maml(_loss, steps=2, learning_rate=0.1, **s),
    "momentum": lambda **s: maml(_loss, steps=2, optimizer=momentum(0.8), **s),
    "adam": lambda **s: maml(_loss, steps=2, learning_rate=0.02, optimizer=adam(eps_root=1e-2), **s),
    "anil": lambda **s: anil(_loss, steps=2, **s),
    "meta_sgd": lambda **s: meta_sgd(_loss, steps=2, **s),
    "rates_per_step": lambda **s: maml(_loss, steps=2, learns="tensor", per_step=True, **s),
    "rate": lambda **s: maml(_loss, steps=2, learns="scalar", **s),
}


def _mean(learner, meta, tasks):
    return torch.stack([learner.task_loss(meta, *_task(tasks, i)) for i in range(TASKS)]).mean()


def _task(tasks, i):
    return tuple(tuple(t[i] for t in part) for part in tasks)


@pytest.mark.parametrize("name", LEARNERS)
def test_finite_differences(name, params, tasks):
    learner = LEARNERS[name]()
    meta = learner.init(params)
    _, gradient = learner.value_and_grad(meta, *tasks)
    assert gradient.keys() == meta.keys()
    t = {g: {k: torch.randn_like(p) for k, p in group.items()} for g, group in meta.items()}

    def at(h):
        moved = {g: {k: (p + h * t[g][k]).detach() for k, p in group.items()} for g, group in meta.items()}
        return _mean(learner, moved, tasks)

    h = 1e-5
    slope = (at(-2 * h) - 8 * at(-h) + 8 * at(h) - at(2 * h)) / (12 * h)
    along = sum((gradient[g][k] * v).sum() for g, group in t.items() for k, v in group.items())
    assert error(along, slope) < 1e-7


@pytest.mark.parametrize("backend", ["reference", "blockwise"])
def test_hand_written_unroll(params, tasks, backend):
    """Two steps of MAML in plain autograd, in a loop over tasks."""
    total = {k: torch.zeros_like(p) for k, p in params.items()}
    for i in range(TASKS):
        support, query = _task(tasks, i)
        theta = {k: p.clone().requires_grad_() for k, p in params.items()}
        w = theta
        for _ in range(2):
            g = torch.autograd.grad(_loss(w, *support), list(w.values()), create_graph=True)
            w = {k: p - 0.1 * d for (k, p), d in zip(w.items(), g, strict=True)}
        g = torch.autograd.grad(_loss(w, *query), list(theta.values()))
        total = {k: t + d / TASKS for (k, t), d in zip(total.items(), g, strict=True)}
    learner = LEARNERS["maml"]()
    with metaattn.use_backend(backend):
        _, gradient = learner.value_and_grad(learner.init(params), *tasks)
    assert_close(gradient["params"], total)


@pytest.mark.parametrize("name", LEARNERS)
@pytest.mark.parametrize("chunk_size", [None, 1, 2])
def test_a_loop_over_tasks_equals_vmap(name, chunk_size, params, tasks):
    learner = LEARNERS[name]()
    meta = learner.init(params)
    losses, gradient = learner.value_and_grad(meta, *tasks, chunk_size=chunk_size)
    assert_close(losses, torch.stack([learner.task_loss(meta, *_task(tasks, i)) for i in range(TASKS)]))
    assert_close(learner.losses(meta, *tasks, chunk_size=chunk_size), losses)
    leaves = [p for group in meta.values() for p in group.values()]
    want = torch.autograd.grad(_mean(learner, meta, tasks), leaves, materialize_grads=True)
    assert_close([p for group in gradient.values() for p in group.values()], want)


@pytest.mark.parametrize("name", LEARNERS)
def test_first_order_is_the_detached_formula(name, params, tasks):
    """Gradient of the query loss at the adapted parameters, with constant inner gradients."""
    learner = LEARNERS[name](gradient="first_order")
    meta = learner.init(params)
    _, gradient = learner.value_and_grad(meta, *tasks)
    leaves = [p for group in meta.values() for p in group.values()]
    total = [torch.zeros_like(p) for p in leaves]
    names = learner.adapted(params)
    for i in range(TASKS):
        support, query = _task(tasks, i)
        w, state = meta["params"], learner.optimizer.init({k: params[k] for k in names})
        for step in range(learner.steps):
            g = grad(_loss)({k: p.detach() for k, p in w.items()}, *support)
            new, state = learner.optimizer.update(
                {k: g[k] for k in names}, state, {k: w[k] for k in names}, learner.rates(meta), step
            )
            w = {**w, **new}
        g = torch.autograd.grad(_loss(w, *query), leaves, materialize_grads=True)
        total = [t + d / TASKS for t, d in zip(total, g, strict=True)]
    assert_close([p for group in gradient.values() for p in group.values()], total)


def test_first_order_differs_from_second(params, tasks):
    second, first = LEARNERS["maml"](), first_order_maml(_loss, steps=2, learning_rate=0.1)
    a, b = (x.value_and_grad(x.init(params), *tasks)[1]["params"] for x in (second, first))
    flat = lambda g: torch.cat([t.flatten() for t in g.values()])
    assert (flat(a) - flat(b)).norm() > 0.01 * flat(a).norm()


def test_first_order_at_a_rate_of_zero_is_the_plain_gradient(params, tasks):
    learner = first_order_maml(_loss, learning_rate=0)
    _, gradient = learner.value_and_grad(learner.init(params), *tasks)
    want = grad(lambda p: torch.stack([_loss(p, *_task(tasks, i)[1]) for i in range(TASKS)]).mean())(params)
    assert_close(gradient["params"], want)


def test_first_order_under_torch_func(params, tasks):
    """A detached tensor is a constant for torch.func.grad too, and under vmap."""
    support, query = _task(tasks, 0)

    def f(params, way):
        adapted = adapt(_loss, params, support, optimizer=sgd(), rates=0.1, steps=2, gradient=way)
        return _loss(adapted, *query)

    learner = first_order_maml(_loss, steps=2, learning_rate=0.1)
    one = [[t[:1] for t in part] for part in tasks]
    assert_close(grad(f)(params, "first_order"), learner.value_and_grad(learner.init(params), *one)[1]["params"])
    stacked = {k: torch.stack([p, p]) for k, p in params.items()}
    got = torch.func.vmap(lambda p: grad(f)(p, "first_order"))(stacked)
    assert_close({k: g[1] for k, g in got.items()}, grad(f)(params, "first_order"))


def test_anil_adapts_only_the_head(params, tasks):
    learner = LEARNERS["anil"]()
    support, _ = _task(tasks, 0)
    adapted = learner.adapt(learner.init(params), support)
    changed = {k for k, p in adapted.items() if not torch.equal(p, params[k])}
    assert changed == {"head.weight", "head.bias"}
    _, gradient = learner.value_and_grad(learner.init(params), *tasks)
    assert all(g.norm() > 0 for k, g in gradient["params"].items() if "embed" in k)  # all parameters are meta-learned


def test_rates_are_learned(params, tasks):
    meta = LEARNERS["meta_sgd"]().init(params)
    assert {k: r.shape for k, r in meta["rates"].items()} == {k: (1, *p.shape) for k, p in params.items()}
    meta = LEARNERS["rates_per_step"]().init(params)
    assert {r.shape for r in meta["rates"].values()} == {(2,)}
    assert LEARNERS["rate"]().init(params)["rates"]["all"].tolist() == pytest.approx([0.1])
    anil_rates = anil(_loss, learns="tensor").init(params)["rates"]
    assert anil_rates.keys() == {"head.weight", "head.bias"}


def test_trajectory(params, tasks):
    support, _ = _task(tasks, 0)
    passed = trajectory(_loss, params, support, optimizer=sgd(), rates=0.1, steps=3)
    assert len(passed) == 4
    assert passed[0] is params
    for before, after in itertools.pairwise(passed):
        assert _loss(after, *support) < _loss(before, *support)
    assert_close(adapt(_loss, params, support, optimizer=sgd(), rates=0.1, steps=3), passed[-1])


def test_metrics_are_carried(params, tasks):
    def loss(params, x, y):
        out = functional_call(MODEL, params, (x,))
        return (out - y).square().mean(), {"error": (out - y).abs().mean()}

    learner = maml(loss, steps=1, has_aux=True)
    (losses, metrics), gradient = learner.value_and_grad(learner.init(params), *tasks, chunk_size=2)
    assert losses.shape == metrics["error"].shape == (TASKS,)
    assert not losses.requires_grad
    plain = maml(_loss, steps=1)
    assert_close(gradient, plain.value_and_grad(plain.init(params), *tasks)[1])


def test_learning_reduces_the_loss(params, tasks):
    learner = LEARNERS["meta_sgd"]()
    meta = learner.init(params)
    leaves = [p for group in meta.values() for p in group.values()]
    optimizer = torch.optim.Adam(leaves, 3e-2)
    before = learner.losses(meta, *tasks).mean()
    for _ in range(40):
        _, gradient = learner.value_and_grad(meta, *tasks)
        for group, tensors in gradient.items():
            for k, g in tensors.items():
                meta[group][k].grad = g
        optimizer.step()
    assert learner.losses(meta, *tasks).mean() < 0.7 * before


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: maml(_loss, steps=0), "steps must be at least 1; got 0"),
        (lambda: maml(_loss, learns="all"), "learns must be .*; got 'all'"),
        (
            lambda: maml(_loss, gradient="forward"),
            r"gradient must be one of 'reverse', .*'implicit', or an object .*; got 'forward'",
        ),
        (lambda: maml(_loss, learning_rate=math.nan), "learning_rate must be at least 0 and finite; got nan"),
        (lambda: maml(_loss, learning_rate=-0.1), "learning_rate must be at least 0 and finite; got -0.1"),
        (lambda: maml(_loss).init({}), "params must hold at least one tensor"),
        (
            lambda: maml(_loss, adapts=("tail.*",)).adapted({"head.weight": 0}),
            r"adapts must match the name of a parameter; got \['tail.\*'\], and the parameters are \['head.weight'\]",
        ),
        (
            lambda: adapt(_loss, {"a": ONE}, (), optimizer=sgd(), rates=0.1, steps=1, gradient="forward"),
            r"gradient must be one of 'reverse', .*'implicit', or an object .*; got 'forward'",
        ),
        (
            lambda: adapt(_loss, {"a": ONE}, (), optimizer=sgd(), rates=0.1, steps=1, adapts=["b"]),
            r"no parameter is named \['b'\]; the parameters are \['a'\]",
        ),
        (lambda: adapt(_loss, {"a": ONE}, (), optimizer=sgd(), rates=0.1, steps=-1), "steps must be at least 0"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: maml(_loss, optimizer="adam"), r"optimizer must be an InnerOptimizer, such as .*adam\(\); got 'adam'"),
        (lambda: maml(_loss, optimizer=adam), r"optimizer must be .*adam\(\); got <function adam"),
        (
            lambda: adapt(_loss, {"a": ONE}, (), optimizer=sgd, rates=0.1, steps=1),
            "optimizer must be .* got <function sgd",
        ),
        (lambda: maml(_loss, steps=1.5), "steps must be an integer; got 1.5"),
        (lambda: maml(_loss, learning_rate="0.1"), "learning_rate must be a number; got '0.1'"),
        (lambda: anil(_loss, adapts="head.*"), r"adapts must be a sequence of patterns, such as \('head.\*',\)"),
        (lambda: maml(_loss).init(MODEL), r"got a Transformer. Of a module, pass dict\(module.named_parameters\(\)\)"),
        (lambda: maml(_loss).init(MODEL.named_parameters()), "params must be a dict of tensors; got a generator"),
        (lambda: maml(_loss).init({"a": 1.0}), "params must be a dict of tensors"),
    ],
)
def test_type_errors(call, message):
    with pytest.raises(TypeError, match=message):
        call()


@pytest.mark.parametrize("method", [GradientBased.losses, GradientBased.value_and_grad])
def test_errors_of_a_batch_of_tasks(method, params, tasks):
    learner = maml(_loss)
    meta, (support, query) = learner.init(params), tasks
    for wrong, got in ((params, "a dict of "), (MODEL, "a Transformer"), (list(params.values()), "a list")):
        with pytest.raises(TypeError, match=rf"meta must be what this learner's init\(params\) returns.*got {got}"):
            method(learner, wrong, support, query)
    with pytest.raises(TypeError, match="with 'params' and 'rates'; its 'rates' are empty"):
        method(meta_sgd(_loss), meta, support, query)
    with pytest.raises(TypeError, match=r"support must be a sequence of tensors, .*got a Tensor"):
        method(learner, meta, support[0], query)
    for size in (0, -1, 1.5):
        with pytest.raises(ValueError, match=f"chunk_size must be an integer of at least 1, .*got {size}"):
            method(learner, meta, support, query, chunk_size=size)
    for few in ([t[:0] for t in query], [t[:2] for t in query], [ONE]):
        with pytest.raises(ValueError, match=r"the same number of tasks .*, at least 1; got the shapes"):
            method(learner, meta, support, few)
    none = [[t[:0] for t in part] for part in tasks]
    with pytest.raises(ValueError, match="at least 1; got the shapes"):
        method(learner, meta, *none)


@pytest.mark.parametrize("gradient", ["reverse", "mixed"])
@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        (lambda loss: loss.expand(2, 1), ValueError, r"loss must return a scalar, such as .*; got a tensor \[2, 1\]"),
        (lambda loss: None, TypeError, "loss must return a tensor; got a NoneType"),
    ],
)
def test_a_loss_that_is_not_a_scalar(params, tasks, gradient, wrong, error, message):
    learner = maml(lambda *args: wrong(_loss(*args)), steps=2, gradient=gradient)
    with pytest.raises(error, match=message):
        learner.value_and_grad(learner.init(params), *tasks)
