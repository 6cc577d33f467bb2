"""One suite for all algorithms: each learns, and has the meta-gradient of its definition in plain autograd.

Tests all constructors, and cavia, imaml, maml_plus_plus, prototypes and reptile in particular.
"""

import dataclasses
import inspect
import math

import pytest
import torch
from torch.nn import functional as F

import metaattn.meta.algorithms
from metaattn.meta import (
    GradientBased,
    Implicit,
    Learner,
    anil,
    boil,
    cavia,
    first_order_maml,
    imaml,
    maml,
    maml_plus_plus,
    meta_sgd,
    momentum,
    proto_maml,
    prototypical,
    reptile,
)
from tests.helpers import assert_close

F64 = {"dtype": torch.float64}
TASKS, SAMPLES, WIDTH, WAY, STEPS = 4, 6, 5, 3, 2


def _embed(p, x):
    return torch.tanh(x @ p["embed.weight"] + p["embed.bias"])


def _net(p, x):
    return _embed(p, x) @ p["head.weight"].mT + p["head.bias"]


def _regression(p, x, y):
    return (_net(p, x) - y).square().mean()


def _classification(p, x, y):
    return F.cross_entropy(_net(p, x), y)


def _params(inputs, outputs):
    return {
        "embed.weight": torch.randn(inputs, WIDTH, **F64),
        "embed.bias": torch.randn(WIDTH, **F64),
        "head.weight": 0.5 * torch.randn(outputs, WIDTH, **F64),
        "head.bias": torch.randn(outputs, **F64),
    }


def _sinusoids():
    """Support and query sets of ``a sin(x + b)``."""
    a, b = torch.rand(TASKS, 1, 1, **F64) + 0.5, math.pi * torch.rand(TASKS, 1, 1, **F64)
    x = [6 * torch.rand(TASKS, SAMPLES, 1, **F64) - 3 for _ in "sq"]
    return [(t, a * torch.sin(t + b)) for t in x]


def _episodes():
    """Support and query sets of noisy classes, two samples of each."""
    centres = torch.randn(TASKS, WAY, 1, 2, **F64)
    targets = torch.arange(WAY).repeat_interleave(2).expand(TASKS, -1)
    return [((centres + 0.5 * torch.randn(TASKS, WAY, 2, 2, **F64)).flatten(1, 2), targets) for _ in "sq"]


def _descend(loss, w, names, rate, batch, steps=STEPS, constant=False, passed=None):
    """Gradient steps in plain autograd; the learning rate is ``rate(name, step)``."""
    for step in range(steps):
        g = torch.autograd.grad(loss(w, *batch), [w[k] for k in names], create_graph=True)
        g = [t.detach() if constant else t for t in g]
        w = {**w, **{k: w[k] - rate(k, step) * d for k, d in zip(names, g, strict=True)}}
        if passed is not None:
            passed.append(w)
    return w


ALL = ("embed.weight", "embed.bias", "head.weight", "head.bias")
RATE = 0.1


def _unrolled(names=ALL, constant=False):
    def definition(meta, support, query):
        w = _descend(_regression, meta["params"], names, lambda k, s: RATE, support, constant=constant)
        return _regression(w, *query)

    return definition


def _meta_sgd(meta, support, query):
    w = _descend(_regression, meta["params"], ALL, lambda k, s: meta["rates"][k][0], support)
    return _regression(w, *query)


def _plus_plus(weights, constant):
    def definition(meta, support, query):
        passed = []
        _descend(
            _regression,
            meta["params"],
            ALL,
            lambda k, s: meta["rates"][k][s],
            support,
            constant=constant,
            passed=passed,
        )
        return sum(v * _regression(w, *query) for v, w in zip(weights, passed, strict=True))

    return definition


def _reptile(meta, support, query):
    """A surrogate objective whose gradient is the initial parameters minus the adapted ones."""
    both = [torch.cat(pair) for pair in zip(support, query, strict=True)]
    end = _descend(_regression, meta["params"], ALL, lambda k, s: RATE, both)
    gradient = {k: (p - end[k]).detach() for k, p in meta["params"].items()}
    return sum((gradient[k] * p).sum() for k, p in meta["params"].items())


PULL = 6.0


def _implicit(meta, support, query):
    """``(I + H / pull)^-1`` times the query's gradient, with the dense Hessian at the end of the steps."""
    start = {k: p.detach() for k, p in meta["params"].items()}
    shapes = [start[k].shape for k in ALL]

    def as_dict(flat):
        parts = flat.split([s.numel() for s in shapes])
        return {k: t.view(s) for k, t, s in zip(ALL, parts, shapes, strict=True)}

    def pulled(w, *batch):
        return _regression(w, *batch) + PULL / 2 * sum((w[k] - start[k]).square().sum() for k in ALL)

    leaves = {k: p.clone().requires_grad_() for k, p in start.items()}
    end = _descend(pulled, leaves, ALL, lambda k, s: RATE, support)
    flat = torch.cat([end[k].detach().flatten() for k in ALL])
    hessian = torch.autograd.functional.hessian(lambda f: _regression(as_dict(f), *support), flat)
    g = torch.autograd.functional.jacobian(lambda f: _regression(as_dict(f), *query), flat)
    solution = torch.linalg.solve(torch.eye(len(flat), **F64) + hessian / PULL, g)
    return solution @ torch.cat([meta["params"][k].flatten() for k in ALL])


def _centres(meta, support):
    f = _embed(meta["params"], support[0])
    return torch.stack([f[support[1] == c].mean(0) for c in range(WAY)])


def _distances(meta, support, query):
    f, c = _embed(meta["params"], query[0]), _centres(meta, support)
    return F.cross_entropy(-(f[:, None] - c).square().sum(-1), query[1])


def _proto_maml(meta, support, query):
    c = _centres(meta, support)
    # Aliases, so that the inner gradient of the body does not include the path through the head made from it.
    body = {k: p.view_as(p) for k, p in meta["params"].items()}
    w = {**body, "head.weight": 2 * c, "head.bias": -c.square().sum(-1)}
    return _classification(_descend(_classification, w, ALL, lambda k, s: RATE, support), *query)


def _cavia(meta, support, query):
    """The context as additional inputs of the first layer, with separate weights."""

    def loss(w, x, y):
        inputs = torch.cat([x, w["context"].expand(len(x), -1)], 1)
        weight = torch.cat([meta["params"]["embed.weight"], meta["context"]["weight"]])
        return _regression({**meta["params"], "embed.weight": weight}, inputs, y)

    zero = torch.zeros(3, **F64, requires_grad=True)
    return loss(_descend(loss, {"context": zero}, ["context"], lambda k, s: RATE, support), *query)


S = {"steps": STEPS, "learning_rate": RATE}
PROTO = {"embed": _embed, "way": WAY}
# The learner, its definition, and True if its tasks are classification.
FAMILY = {
    "maml": (maml(_regression, **S), _unrolled(), False),
    "maml_mixed": (maml(_regression, gradient="mixed", **S), _unrolled(), False),
    "first_order_maml": (first_order_maml(_regression, **S), _unrolled(constant=True), False),
    "anil": (anil(_regression, **S), _unrolled(ALL[2:]), False),
    "boil": (boil(_regression, **S), _unrolled(ALL[:2]), False),
    "meta_sgd": (meta_sgd(_regression, **S), _meta_sgd, False),
    "maml_plus_plus": (maml_plus_plus(_regression, **S), _plus_plus([0.0, 1.0], False), False),
    "maml_plus_plus_at_first": (
        maml_plus_plus(_regression, multi_step_until=0.2, first_order_until=0.3, **S).at(0.05),
        _plus_plus([0.375, 0.625], True),
        False,
    ),
    "maml_plus_plus_midway": (
        maml_plus_plus(_regression, multi_step_until=1.0, first_order_until=0.3, **S).at(0.5),
        _plus_plus([0.25, 0.75], False),
        False,
    ),
    "reptile": (reptile(_regression, **S), _reptile, False),
    "imaml": (imaml(_regression, proximal=PULL, iterations=40, tolerance=0.0, **S), _implicit, False),
    "prototypical": (prototypical(_classification, **PROTO), _distances, True),
    "proto_maml": (proto_maml(_classification, **PROTO, **S), _proto_maml, True),
    "cavia": (cavia(_regression, size=3, **S), _cavia, False),
}


@pytest.fixture(params=FAMILY)
def case(request):
    """A learner, its definition, meta-parameters and tasks."""
    learner, definition, classify = FAMILY[request.param]
    meta = learner.init(_params(2, WAY) if classify else _params(1, 1))
    return learner, definition, meta, _episodes() if classify else _sinusoids()


def _leaves(meta):
    return [t for group in meta.values() for t in group.values()]


@pytest.mark.parametrize("chunk_size", [None, 3])
def test_the_meta_gradient_is_that_of_the_definition(case, chunk_size):
    learner, definition, meta, tasks = case
    _, gradient = learner.value_and_grad(meta, *tasks, chunk_size=chunk_size)
    each = [definition(meta, *([t[i] for t in part] for part in tasks)) for i in range(TASKS)]
    want = torch.autograd.grad(torch.stack(each).mean(), _leaves(meta), materialize_grads=True)
    assert gradient.keys() == meta.keys()
    assert_close(_leaves(gradient), want)
    assert sum(g.norm() for g in want) > 0.01


def test_the_losses_are_those_of_adapted_parameters(case):
    learner, _, meta, tasks = case
    losses = learner.losses(meta, *tasks)
    for i in range(TASKS):
        support, query = ([t[i] for t in part] for part in tasks)
        passed = learner.trajectory(meta, support)
        assert len(passed) == learner.steps + 1
        assert len(learner.trajectory(meta, support, 4)) == 5
        assert passed[-1].keys() == set(ALL)
        assert_close(losses[i], learner.loss(passed[-1], *query))


def test_it_learns(case):
    learner, _, meta, tasks = case
    optimizer = torch.optim.Adam(_leaves(meta), 0.05)
    before = learner.losses(meta, *tasks).mean()
    for _ in range(40):
        _, gradient = learner.value_and_grad(meta, *tasks)
        for p, g in zip(_leaves(meta), _leaves(gradient), strict=True):
            p.grad = g
        optimizer.step()
    assert learner.losses(meta, *tasks).mean() < 0.7 * before


def test_all_are_learners_that_carry_metrics(case):
    plain, _, meta, tasks = case
    learner = type(plain)(
        **{**vars(plain), "loss": lambda *a: (plain.loss(*a), {"twice": 2 * plain.loss(*a)}), "has_aux": True}
    )
    assert isinstance(learner, Learner)
    (losses, metrics), gradient = learner.value_and_grad(meta, *tasks)
    assert_close(metrics["twice"], 2 * losses)
    want_losses, want = plain.value_and_grad(meta, *tasks)
    assert_close((losses, gradient), (want_losses, want))


def test_boil_and_its_rates_leave_the_head():
    learner = boil(_regression, learns="tensor")
    assert learner.init(_params(1, 1))["rates"].keys() == {"embed.weight", "embed.bias"}


def test_cavia_adapts_only_the_context():
    learner = cavia(_regression, size=3, **S)
    meta, (support, _) = learner.init(_params(1, 1)), _sinusoids()
    start, *_, end = learner.trajectory(meta, [t[0] for t in support])
    assert_close(start, {k: p.detach() for k, p in meta["params"].items()})
    assert {k for k in end if not torch.equal(end[k], meta["params"][k])} == {"embed.bias"}


def test_the_head_of_prototypes_is_not_a_meta_parameter():
    meta = prototypical(_classification, **PROTO).init(_params(2, WAY))
    assert meta["params"].keys() == set(ALL[:2])


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (lambda: reptile(_regression, learns="scalar"), ValueError, "learns must be 'nothing'; got 'scalar'"),
        (lambda: maml_plus_plus(_regression, multi_step_until=2.0), ValueError, "multi_step_until must be from 0 to 1"),
        (lambda: maml_plus_plus(_regression).at(-0.1), ValueError, r"progress must be from 0 to 1; got -0.1"),
        (lambda: maml_plus_plus(_regression, first_order_until="x"), TypeError, "first_order_until must be a number"),
        (lambda: cavia(_regression, size=0), ValueError, "size must be at least 1; got 0"),
        (
            lambda: cavia(_regression, into="b").init(_params(1, 1)),
            ValueError,
            "into must be the name of a parameter to add the context to; got 'b'",
        ),
        (lambda: proto_maml(_classification, steps=0, **PROTO), ValueError, "steps must be at least 1; got 0"),
        (lambda: prototypical(_classification, embed=None, way=3), TypeError, "embed must be a function"),
        (lambda: prototypical(_classification, embed=_embed, way=1), ValueError, "way must be at least 2; got 1"),
        (
            lambda: prototypical(_classification, weight="w", **PROTO).init(_params(2, 3)),
            ValueError,
            "weight must be the name of the head's weight; got 'w'",
        ),
        (lambda: imaml(_regression, proximal=0.0), ValueError, "proximal must be positive and finite"),
    ],
)
def test_errors(make, kind, message):
    with pytest.raises(kind, match=message):
        make()


OPTIONS = {  # in addition to those of GradientBased
    imaml: {"proximal", "damping", "iterations", "tolerance"},
    maml_plus_plus: {"multi_step_until", "first_order_until", "progress"},
    cavia: {"size", "into"},
    prototypical: {"embed", "way", "weight", "bias"},
    proto_maml: {"embed", "way", "weight", "bias"},
}
FIXED = {  # options of GradientBased that an algorithm does not have
    first_order_maml: {"gradient"},
    imaml: {"gradient"},
    cavia: {"adapts"},
    prototypical: {"steps", "learning_rate", "optimizer", "gradient", "adapts", "learns", "per_step"},
}
DEFAULTS = {  # where they differ from those of GradientBased
    anil: {"adapts": ("head.*",)},
    boil: {"adapts": ("*", "!head.*")},
    meta_sgd: {"learns": "element"},
    maml_plus_plus: {"learns": "tensor", "per_step": True},
    reptile: {"gradient": "first_order"},
}
CONSTRUCTORS = [
    anil,
    boil,
    cavia,
    first_order_maml,
    imaml,
    maml,
    maml_plus_plus,
    meta_sgd,
    proto_maml,
    prototypical,
    reptile,
]


@pytest.mark.parametrize("make", CONSTRUCTORS, ids=lambda f: f.__name__)
def test_options_are_spelled_out(make):
    """Each constructor names its options, so that editors show them, and passes all of them on."""
    shared = {f.name: f.default for f in dataclasses.fields(GradientBased)} | {"optimizer": None}
    parameters = inspect.signature(make).parameters
    assert set(parameters) == (set(shared) | OPTIONS.get(make, set())) - FIXED.get(make, set())
    assert next(iter(parameters)) == "loss"
    assert all(p.kind is p.KEYWORD_ONLY for name, p in parameters.items() if name != "loss")
    for name in set(parameters) & set(shared) - {"loss"}:
        assert parameters[name].default == DEFAULTS.get(make, {}).get(name, shared[name])
    values = {
        "steps": 3,
        "learning_rate": 0.7,
        "optimizer": momentum(),
        "gradient": "mixed",
        "adapts": ("w",),
        "per_step": True,
        "has_aux": True,
        "learns": "nothing" if make is reptile else "scalar",
        "multi_step_until": 0.6,
        "first_order_until": 0.7,
        "progress": 0.8,
        "size": 7,
        "into": "b",
        "embed": _embed,
        "way": 4,
        "weight": "w",
        "bias": "b",
    }
    chosen = {k: v for k, v in values.items() if k in parameters}
    learner = make(_regression, **chosen)
    assert {k: getattr(learner, k) for k in chosen} == chosen
    assert make is not imaml or make(_regression, proximal=2.0, damping=0.5, iterations=3, tolerance=0.1).gradient == (
        Implicit(2.0, 0.5, 3, 0.1)
    )


@pytest.mark.parametrize("make", CONSTRUCTORS, ids=lambda f: f.__name__)
def test_an_unknown_option_is_a_type_error_of_the_constructor(make):
    required = PROTO if make in (prototypical, proto_maml) else {}
    with pytest.raises(TypeError, match=rf"^{make.__name__}\(\) got an unexpected keyword argument 'lr'"):
        make(_regression, lr=0.1, **required)


def test_the_old_name_of_samples_works():
    with pytest.warns(DeprecationWarning, match="is now Samples"):
        assert metaattn.meta.algorithms.Batch is metaattn.meta.algorithms.Samples
    with pytest.raises(AttributeError, match="has no attribute 'Task'"):
        metaattn.meta.algorithms.Task  # noqa: B018


def test_meta_parameters_of_another_algorithm_are_rejected():
    meta, tasks = maml(_regression).init(_params(1, 1)), _sinusoids()
    with pytest.raises(TypeError, match="with 'params' and 'context'; got a dict of"):
        cavia(_regression).value_and_grad(meta, *tasks)
    with pytest.raises(TypeError, match="its 'rates' are empty: it is of a learner that learns no rates"):
        meta_sgd(_regression).value_and_grad(meta, *tasks)
