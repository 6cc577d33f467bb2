"""Modes of differentiating the inner loop, each against its definition in plain autograd.

Tests gradients, _inner_loop, _mixed_mode, _hvp, _implicit and _closure_checks; _compiled_step is tested in
tests/compile.
"""

import itertools
import math

import pytest
import torch
from torch.func import functional_call, grad, jvp, vmap
from torch.utils._pytree import tree_leaves, tree_map

import metaattn
from metaattn.meta import FirstOrder, Implicit, Mixed, Reverse, Truncated, adam, adapt, momentum, sgd, trajectory
from tests.helpers import assert_close, error

F64 = {"dtype": torch.float64}
OPTIMIZERS = {
    "sgd": sgd(),
    "momentum": momentum(0.8),
    "nesterov": momentum(0.8, nesterov=True),
    "adam": adam(eps_root=1e-2),
}
MIXED = {"mixed": "mixed", "two_segments": Mixed(segments=2), "a_segment_a_step": Mixed(segments=9)}
RATES = {
    "scalar": lambda p: torch.tensor(0.1, **F64),
    "per_step": lambda p: torch.tensor([0.1, 0.05, 0.2], **F64),
    "per_tensor": lambda p: {k: torch.tensor(0.1 + 0.02 * i, **F64) for i, k in enumerate(p)},
    "per_tensor_per_step": lambda p: {k: torch.linspace(0.05, 0.2, 3, **F64) for k in p},
    "element": lambda p: {k: 0.1 * torch.rand(1, *v.shape, **F64) for k, v in p.items()},
}
TASKS, N = 3, 5


def _net(p, x):
    return torch.tanh(x @ p["in"] + p["bias"]) @ p["out"]


def _learned_loss(p, x, y, learned):
    """Squares with a weight for each sample, a penalty of learned strength and a learned function of the residual."""
    r = _net(p, x) - y
    data = (torch.sigmoid(learned["data"]) * r.square()).mean()
    return data + learned["loss"][0].exp() * p["in"].square().sum() + (learned["loss"][1] * r).cos().mean()


def _start():
    return {"in": torch.randn(2, 3, **F64), "bias": torch.randn(3, **F64), "out": torch.randn(3, 1, **F64)}


def _learned():
    return {"data": torch.randn(N, 1, **F64), "loss": [torch.tensor(-2.0, **F64), torch.randn(1, **F64)]}


def _batch(*lead):
    return torch.randn(*lead, N, 2, **F64), torch.randn(*lead, N, 1, **F64)


def _outer(how, params, rates, learned, x, y, optimizer="sgd", steps=3):
    """Query loss after adaptation, as a function of everything that can be meta-learned."""
    adapted = adapt(
        _learned_loss, params, (x, y, learned), optimizer=OPTIMIZERS[optimizer], rates=rates, steps=steps, gradient=how
    )
    return (_net(adapted, x.flip(-2)) - y).square().mean()


def _gradient(function, *meta):
    """Gradient by torch.autograd with respect to all tensors in all arguments."""
    fresh = tree_map(lambda t: t.detach().clone().requires_grad_(), meta)
    return torch.autograd.grad(function(*fresh), tree_leaves(fresh), materialize_grads=True)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("rates", RATES)
@pytest.mark.parametrize("how", MIXED)
def test_mixed_is_reverse(how, rates, optimizer):
    """Derivatives of initial parameters, rates, and weights of data and losses, for one task and under vmap."""
    params, learned = _start(), _learned()
    meta = (params, RATES[rates](params), learned)
    one, many = _batch(), _batch(TASKS)

    def task(way):
        return lambda *meta: _outer(way, *meta, *one, optimizer)

    def tasks(way):
        return lambda *meta: vmap(lambda x, y: _outer(way, *meta, x, y, optimizer))(*many).mean()

    for outer in (task, tasks):
        want = _gradient(outer("reverse"), *meta)
        assert all(g.norm() > 0 for g in want)
        assert_close(_gradient(outer(MIXED[how]), *meta), want)


def test_reverse_is_a_hand_written_unroll():
    params, learned, (x, y) = _start(), _learned(), _batch()
    rate = torch.tensor(0.1, **F64)

    def unrolled(params, rate, learned):
        w = params
        for _ in range(3):
            g = torch.autograd.grad(_learned_loss(w, x, y, learned), list(w.values()), create_graph=True)
            w = {k: p - rate * d for (k, p), d in zip(w.items(), g, strict=True)}
        return (_net(w, x.flip(-2)) - y).square().mean()

    for how in ("reverse", "mixed"):
        got = _gradient(lambda *meta, how=how: _outer(how, *meta, x, y), params, rate, learned)
        assert_close(got, _gradient(unrolled, params, rate, learned))


NESTINGS = {
    "grad": lambda f, m, x, y: grad(lambda m: f(m, x[0], y[0]))(m),
    "grad_of_vmap": lambda f, m, x, y: grad(lambda m: vmap(lambda x, y: f(m, x, y))(x, y).sum())(m),
    "vmap_of_grad": lambda f, m, x, y: vmap(lambda x, y: grad(lambda m: f(m, x, y))(m))(x, y),
    "vmap_of_vmap": lambda f, m, x, y: grad(
        lambda m: vmap(lambda s: vmap(lambda x, y: f(tree_map(lambda t: s * t, m), x, y))(x, y))(y[:2, 0, 0]).sum()
    )(m),
    "jvp": lambda f, m, x, y: jvp(lambda m: f(m, x[0], y[0]), (m,), (m,)),
    "vmap_of_jvp": lambda f, m, x, y: vmap(lambda x, y: jvp(lambda m: f(m, x, y), (m,), (m,)))(x, y),
    "jvp_of_vmap": lambda f, m, x, y: jvp(lambda m: vmap(lambda x, y: f(m, x, y))(x, y), (m,), (m,)),
    "jvp_of_jvp": lambda f, m, x, y: jvp(lambda m: jvp(lambda m: f(m, x[0], y[0]), (m,), (m,))[1], (m,), (m,)),
    "jvp_of_grad": lambda f, m, x, y: jvp(grad(lambda m: f(m, x[0], y[0])), (m,), (m,)),
    "grad_of_jvp": lambda f, m, x, y: grad(lambda m: jvp(lambda m: f(m, x[0], y[0]), (m,), (m,))[1])(m),
    "grad_of_grad": lambda f, m, x, y: grad(
        lambda m: sum(g.sin().sum() for g in tree_leaves(grad(lambda m: f(m, x[0], y[0]))(m)))
    )(m),
    "double_backward": lambda f, m, x, y: _double_backward(lambda m: f(m, x[0], y[0]), m),
}


def _double_backward(f, m):
    m = tree_map(lambda t: t.detach().clone().requires_grad_(), m)
    first = torch.autograd.grad(f(m), tree_leaves(m), create_graph=True)
    return torch.autograd.grad(sum(g.sin().sum() for g in first), tree_leaves(m))


@pytest.mark.parametrize("nesting", NESTINGS)
@pytest.mark.parametrize("how", ["mixed", "two_segments"])
def test_mixed_in_every_nesting(how, nesting):
    params = _start()
    meta, batch = (params, RATES["per_step"](params), _learned()), _batch(TASKS)
    got, want = (
        NESTINGS[nesting](lambda m, x, y, way=way: _outer(way, *m, x, y, "momentum", steps=2), meta, *batch)
        for way in (MIXED[how], "reverse")
    )
    assert_close(got, want)


def _transformer(**settings):
    model = metaattn.Transformer(
        input="continuous", in_features=2, output="pooled", out_features=1, dim=4, heads=2, depth=1, **settings
    ).double()
    params = {k: 0.5 * torch.randn_like(p) for k, p in model.named_parameters()}
    return (lambda p, x, y: (functional_call(model, p, (x,)) - y).square().mean()), params


@pytest.mark.parametrize("how", MIXED)
def test_mixed_draws_the_same_dropout_again(how):
    """With one seed, the meta-gradient is that of reverse mode, which draws once in each step."""
    loss, params = _transformer(dropout=0.3, attention_dropout=0.3)
    x, y = torch.randn(TASKS, 4, 3, 2, **F64), torch.randn(TASKS, 4, 1, **F64)

    def outer(way):
        def task(params, x, y):
            return loss(adapt(loss, params, (x, y), optimizer=sgd(), rates=0.1, steps=3, gradient=way), x, y)

        def function(params):
            torch.manual_seed(5)
            return vmap(task, (None, 0, 0), randomness="different")(params, x, y).mean()

        return function

    assert_close(_gradient(outer(MIXED[how]), params), _gradient(outer("reverse"), params))
    torch.manual_seed(5)
    passed = trajectory(loss, params, (x[0], y[0]), optimizer=sgd(), rates=0.1, steps=2)
    torch.manual_seed(5)
    again = trajectory(loss, params, (x[0], y[0]), optimizer=sgd(), rates=0.1, steps=2, gradient=MIXED[how])
    assert_close(again, passed)
    first, second = ((b["head.bias"] - a["head.bias"]) for a, b in itertools.pairwise(passed))
    assert error(first, second) > 0.01


def test_mixed_under_a_vmap_that_would_draw_for_each_task_and_maps_nothing():
    loss, params = _transformer(dropout=0.3)
    batch = torch.randn(4, 3, 2, **F64), torch.randn(4, 1, **F64)
    run = lambda s: s * adapt(loss, params, batch, optimizer=sgd(), rates=0.1, steps=1, gradient="mixed")["head.bias"]
    with pytest.raises(NotImplementedError, match=r"a vmap that maps none of its arguments; pass one that is mapped"):
        vmap(run, randomness="different")(torch.ones(2, **F64))
    same = vmap(run, randomness="same")(torch.ones(2, **F64))
    assert torch.equal(same[0], same[1])


@pytest.mark.parametrize("name", ["mse_loss", "l1_loss", "smooth_l1_loss", "cross_entropy"])
@pytest.mark.parametrize("how", ["mixed", Implicit(proximal=20.0, iterations=20, tolerance=0.0)])
def test_pytorch_losses(how, name):
    """Losses of torch.nn.functional, whose second derivatives PyTorch implements by separate formulas."""
    params, (x, y) = _start(), _batch()
    target = torch.cat([y, -y], 1).softmax(1)

    def loss(p, x, y):
        out = _net(p, x)
        return getattr(torch.nn.functional, name)(torch.cat([out, -out], 1), y)

    def outer(way):
        def function(params, target):
            end = adapt(loss, params, (x, target), optimizer=sgd(), rates=0.02, steps=3, gradient=way)
            return (_net(end, x) - y).square().mean()

        return function

    got = _gradient(outer(how), params, target)
    if how == "mixed":
        assert_close(got, _gradient(outer("reverse"), params, target))
    else:
        assert all(g.isfinite().all() for g in got)


def test_frozen_parameters_and_trajectories():
    """Parameters that are not in ``adapts`` have gradients too, and those after every step are differentiable."""
    params, learned, (x, y) = _start(), _learned(), _batch()

    def total(way):
        def function(params, learned):
            passed = trajectory(
                _learned_loss,
                params,
                (x, y, learned),
                optimizer=sgd(),
                rates=0.1,
                steps=4,
                adapts=["bias"],
                gradient=way,
            )
            assert len(passed) == 5
            assert all(list(p) == list(params) for p in passed)
            return sum((_net(p, x) - y).square().mean() for p in passed)

        return function

    want = _gradient(total("reverse"), params, learned)
    for way in MIXED.values():
        assert_close(_gradient(total(way), params, learned), want)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_first_order_is_the_detached_formula(optimizer):
    params, learned, (x, y) = _start(), _learned(), _batch()
    rate = torch.tensor(0.1, **F64)

    def definition(params, rate, learned):
        w, state = params, OPTIMIZERS[optimizer].init(params)
        for step in range(3):
            at = {k: p.detach() for k, p in w.items()}
            g = grad(_learned_loss)(at, x, y, tree_map(torch.Tensor.detach, learned))
            w, state = OPTIMIZERS[optimizer].update(g, state, w, rate, step)
        return (_net(w, x.flip(-2)) - y).square().mean()

    want = _gradient(definition, params, rate, learned)
    for how in ("first_order", FirstOrder()):
        assert_close(_gradient(lambda *m, how=how: _outer(how, *m, x, y, optimizer), params, rate, learned), want)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("last", [1, 2, 3, 5])
def test_truncated_is_a_detach_before_the_last_steps(last, optimizer):
    params, learned, (x, y) = _start(), _learned(), _batch()
    rates = torch.tensor([0.1, 0.05, 0.2], **F64)

    def definition(params, rates, learned):
        w, state = params, OPTIMIZERS[optimizer].init(params)
        for step in range(3):
            if 0 < step == 3 - last:
                w, state = tree_map(torch.Tensor.detach, (w, state))
            w, state = OPTIMIZERS[optimizer].update(grad(_learned_loss)(w, x, y, learned), state, w, rates, step)
        return (_net(w, x.flip(-2)) - y).square().mean()

    want = _gradient(definition, params, rates, learned)
    got = _gradient(lambda *m: _outer(Truncated(last), *m, x, y, optimizer), params, rates, learned)
    assert_close(got, want)
    assert (sum(g.norm() for g in want[: len(params)]) == 0) == (last < 3)


def _quadratic(params, a, b):
    return 0.5 * params["w"] @ a @ params["w"] - b @ params["w"]


@pytest.mark.parametrize("damping", [0.0, 0.3])
def test_implicit_is_the_closed_form(damping):
    """``phi = (A + l)^-1 (b + l theta)`` minimises a quadratic plus its proximal term; only the solution is damped."""
    half, b, theta = torch.randn(TASKS, 4, 4, **F64), torch.randn(TASKS, 4, **F64), torch.randn(4, **F64)
    a, eye, strength, target = half @ half.mT, torch.eye(4, **F64), 0.7, torch.randn(4, **F64)
    w, a_, b_ = (t.clone().requires_grad_() for t in (theta, a, b))

    def outer(w, a, b):
        how = Implicit(proximal=strength, damping=damping, iterations=8, tolerance=0.0)
        rate = 1 / (a.detach().square().sum((-1, -2)).sqrt() + strength)
        end = adapt(_quadratic, {"w": w}, (a, b), optimizer=sgd(), rates=rate, steps=900, gradient=how)
        return (end["w"] - target).square().sum()

    losses = vmap(outer, (None, 0, 0))(w, a_, b_)
    phi = torch.linalg.solve(a + strength * eye, b + strength * theta)
    assert_close(losses, (phi - target).square().sum(-1), factor=100)
    v = torch.linalg.solve(a + (strength + damping) * eye, 2 * (phi - target))
    sym = -0.5 * (v[:, :, None] * phi[:, None] + phi[:, :, None] * v[:, None])  # d/dA of -<v, (A + A^T) phi / 2>
    got = torch.autograd.grad(losses.sum(), (w, a_, b_))
    assert_close(got, (strength * v.sum(0), sym, v), factor=1000)
    one = grad(outer)(theta, a[0], b[0])
    assert_close(one, strength * v[0], factor=1000)


def test_implicit_has_one_derivative_and_says_so():
    a, b, w = torch.eye(4, **F64), torch.randn(4, **F64), torch.randn(4, **F64)
    end = lambda w: adapt(_quadratic, {"w": w}, (a, b), optimizer=sgd(), rates=0.5, steps=3, gradient="implicit")["w"]
    with pytest.raises(NotImplementedError, match=r"one derivative, in reverse mode; .* gradient='mixed'"):
        jvp(end, (w,), (w,))
    with pytest.raises(NotImplementedError, match="one derivative, in reverse mode"):
        grad(lambda w: grad(lambda w: end(w).square().sum())(w).sum())(w)
    x = w.clone().requires_grad_()
    (first,) = torch.autograd.grad(end(x).square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="one derivative, in reverse mode"):
        first.sum().backward()


def test_implicit_is_first_order_where_there_is_no_minimum():
    """Negative curvature beyond the proximal term stops conjugate gradients; a stronger pull makes a minimum."""
    a, b, w = -3 * torch.eye(4, **F64), torch.randn(4, **F64), torch.randn(4, **F64)

    def gradient(proximal):
        how = Implicit(proximal=proximal)
        end = lambda w: adapt(_quadratic, {"w": w}, (a, b), optimizer=sgd(), rates=0.1, steps=1, gradient=how)
        return grad(lambda w: end(w)["w"].sum())(w)

    assert_close(gradient(1.0), torch.ones(4, **F64))
    assert_close(gradient(4.0), torch.full((4,), 4.0, **F64))


def _saved(outer):
    """Every tensor that the graph of ``outer`` holds, by a walk: torch.func rejects hooks on saved tensors."""
    seen, todo = set(), [outer.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        todo += [n for n, _ in node.next_functions]
        named = [getattr(node, name) for name in dir(node) if name.startswith("_saved_")]
        yield from (t for t in tree_leaves([named, getattr(node, "saved_tensors", ())]) if isinstance(t, torch.Tensor))


def _kept(how, steps, width=64, samples=256):
    """Bytes that the graph of an adaptation holds, each storage once: in activations, and in tensors of the size of
    parameters.
    """
    params = {"in": torch.randn(2, width), "bias": torch.randn(width), "out": torch.randn(width, 1)}
    params = {k: p.requires_grad_() for k, p in params.items()}
    x, y = torch.randn(samples, 2), torch.randn(samples, 1)

    def loss(p, x, y):
        return (_net(p, x) - y).square().mean()

    end = adapt(loss, params, (x, y), optimizer=momentum(), rates=torch.tensor(0.1), steps=steps, gradient=how)
    sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in _saved(loss(end, x, y))}
    limit = 4 * 2 * width  # bytes of the largest parameter
    return sum(n for n in sizes.values() if n > limit), sum(n for n in sizes.values() if n <= limit)


def test_mixed_keeps_no_activations():
    one, twenty = _kept("mixed", 1), _kept("mixed", 20)
    assert 0 < twenty[0] <= 1.2 * one[0]
    assert _kept("reverse", 20)[0] > 10 * one[0]


def test_segments_keep_fewer_parameters():
    """For 36 steps, 6 segments store the parameters at 6 ends."""
    whole, cut = _kept("mixed", 36), _kept(Mixed(segments=6), 36)
    assert cut[0] <= whole[0]
    assert cut[1] < whole[1] / 3


@pytest.mark.parametrize("how", ["mixed", Mixed(segments=2), "implicit"])
def test_a_loss_that_closes_over_a_differentiated_tensor_raises(how):
    params, learned, (x, y) = _start(), _learned(), _batch()
    follows = lambda learned: lambda p, x, y: _learned_loss(p, x, y, learned)
    run = lambda p, l: adapt(follows(l), p, (x, y), optimizer=sgd(), rates=0.1, steps=2, gradient=how)
    size = lambda p: sum(t.square().sum() for t in p.values())
    with pytest.raises(ValueError, match=r"the loss must take all .* a tensor that requires grad. Pass it in data"):
        run(params, tree_map(lambda t: t.clone().requires_grad_(), learned))
    hidden = torch.nn.Linear(1, 1).double()  # used in the loss, but not visible in its closure
    module = lambda p, x, y: (hidden(_net(p, x)) - y).square().mean()
    with pytest.raises(ValueError, match="a tensor that requires grad"):
        adapt(module, params, (x, y), optimizer=sgd(), rates=0.1, steps=2, gradient=how)
    for transform in (
        lambda f: grad(lambda l: size(f(l)))(learned),
        lambda f: jvp(lambda l: size(f(l)), (learned,), (learned,)),
        lambda f: vmap(f)(tree_map(lambda t: torch.stack([t, t]), learned)),
        lambda f: grad(lambda l: vmap(lambda s: size(f(l)))(x[:, 0]).sum())(learned),
    ):
        with pytest.raises(ValueError, match=r"the loss must take .* a torch.func transform .* is following"):
            transform(lambda l: run(params, l))
    rate = torch.tensor(0.9, **F64, requires_grad=True)
    with pytest.raises(ValueError, match=r"the optimizer must take all .* a tensor that requires grad"):
        adapt(_learned_loss, params, (x, y, learned), optimizer=_closing(rate), rates=0.1, steps=1, gradient=how)
    assert run(params, learned).keys() == params.keys()  # a loss may close over constants


HIDDEN = {}  # a global, which no closure shows


@pytest.mark.parametrize(
    ("how", "name"),
    [(how, name) for how in ("mixed", Mixed(segments=2), "implicit") for name in ("grad", "jvp", "jvp_of_grad")]
    # Functions are watched while they are computed again. "implicit" does so only in its derivative, and PyTorch
    # raises.
    + [(how, name) for how in ("mixed", Mixed(segments=2)) for name in ("vmap", "jvp_of_vmap")],
)
def test_a_loss_that_uses_a_global_raises(how, name):
    def loss(p, x):
        return (p["w"] * x - HIDDEN["c"]).square().sum()

    def run(c):
        HIDDEN["c"] = c
        start = {"w": torch.ones(3, **F64)}
        return adapt(loss, start, (start["w"],), optimizer=sgd(), rates=0.1, steps=2, gradient=how)["w"].sum()

    c = torch.randn(3, **F64)
    transform = {
        "grad": lambda: grad(run)(c),
        "jvp": lambda: jvp(run, (c,), (c,)),
        "jvp_of_grad": lambda: jvp(lambda c: grad(lambda s: run(c) * s.sum())(c.cos()), (c,), (c,)),
        "vmap": lambda: vmap(run)(torch.stack([c, -c])),
        "jvp_of_vmap": lambda: jvp(lambda c: vmap(lambda s: run(s * c))(c[:2]), (c,), (c,)),
    }[name]
    with pytest.raises(ValueError, match=r"not given.*pass it as an argument|must take all .*Pass it in data"):
        transform()


def test_mixed_computes_again_by_the_backend_and_in_the_precision_of_the_first_run():
    """The block of the backend and of autocast has ended when the meta-gradient is taken."""
    seen = []

    def loss(p, x):
        q = (x @ p["w"])[None, None]
        seen.append((metaattn.explain(q, q, q).forward[0], q.dtype))
        return metaattn.sdpa(q, q, q).float().square().mean()

    w = torch.randn(4, 4, requires_grad=True)
    with metaattn.use_backend("reference"), torch.autocast("cpu", torch.bfloat16):
        end = adapt(loss, {"w": w}, (torch.randn(3, 4),), optimizer=sgd(), rates=0.1, steps=1, gradient="mixed")
    before = len(seen)
    end["w"].sum().backward()
    assert len(seen) > before
    assert set(seen) == {("reference", torch.bfloat16)}


def _closing(beta):
    whole = momentum()
    return whole._replace(
        update=lambda g, state, p, rates, step: whole.update(g, state, {k: beta * v for k, v in p.items()}, rates, step)
    )


def test_the_check_draws_nothing():
    loss, params = _transformer(dropout=0.3)
    x, y = torch.randn(4, 3, 2, **F64), torch.randn(4, 1, **F64)
    after = {}
    for how in ("reverse", "mixed", Mixed(segments=2), "implicit"):
        torch.manual_seed(3)
        adapt(loss, params, (x, y), optimizer=sgd(), rates=0.1, steps=3, gradient=how)
        after[str(how)] = torch.rand(1)
    assert len({t.item() for t in after.values()}) == 1


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (lambda: Truncated(0), ValueError, "steps must be at least 1; got 0"),
        (lambda: Truncated(1.5), TypeError, "steps must be an integer; got 1.5"),
        (lambda: Mixed(segments=0), ValueError, "segments must be at least 1; got 0"),
        (lambda: Mixed(segments="two"), TypeError, "segments must be an integer; got 'two'"),
        (lambda: Implicit(iterations=0), ValueError, "iterations must be at least 1; got 0"),
        (lambda: Implicit(proximal=0.0), ValueError, "proximal must be positive and finite; got 0.0"),
        (lambda: Implicit(damping=-1.0), ValueError, "damping must be at least 0 and finite; got -1.0"),
        (lambda: Implicit(tolerance=math.nan), ValueError, "tolerance must be at least 0 and finite; got nan"),
        (lambda: Implicit(damping="much"), TypeError, "damping must be a number; got 'much'"),
    ],
)
def test_errors(make, kind, message):
    with pytest.raises(kind, match=message):
        make()


def test_settings_are_values():
    assert Mixed(segments=2) == Mixed(2) != Mixed()
    assert Reverse() == Reverse()
    assert {Truncated(3), Truncated(3), Truncated(2)} == {Truncated(3), Truncated(2)}
