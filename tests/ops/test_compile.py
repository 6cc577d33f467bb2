"""torch.compile and make_fx: the compiled or replayed result equals the eager one, or there is a clear error."""

import pytest
import torch
from torch._dynamo.utils import counters
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx

import metaattn
from metaattn.ops import _rules
from tests.helpers import assert_close

pytestmark = pytest.mark.filterwarnings("ignore")  # Dynamo and Inductor warn about themselves


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


Q, K, V, T = (
    torch.randn(2, 4, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(i)) for i in range(4)
)
BIAS = torch.linspace(-1, 1, 25, dtype=torch.float64).view(5, 5)

CALLS = {
    "plain": {},
    "bias": {"attn_mask": BIAS},
    "bool": {"attn_mask": torch.arange(25).view(5, 5) % 3 > 0},
    "window": {"is_causal": True, "window": (2, None)},
    "dropout": {"dropout_p": 0.3},
    "reference": {"backend": "reference"},
}


def _loss(options):
    def loss(q):
        out, lse = metaattn.sdpa(q, K, V, **options, return_lse=True)
        return out.sin().sum() + lse.cos().sum()

    return loss


TRANSFORMS = {
    "value": lambda f: f,
    "grad": lambda f: grad(f),
    "jvp": lambda f: lambda q: jvp(f, (q,), (T,))[1],
    "hvp": lambda f: lambda q: jvp(grad(f), (q,), (T,))[1],
    "grad_grad": lambda f: grad(lambda q: grad(f)(q).square().sum()),
    "grad_jvp": lambda f: grad(lambda q: jvp(f, (q,), (T,))[1]),
    "step": lambda f: lambda q: f(q - 0.1 * grad(f)(q)),
    "meta_step": lambda f: grad(lambda q: f(q - 0.1 * grad(f)(q))),
    "vmap": lambda f: lambda q: vmap(grad(f), randomness="same")(torch.stack([q, q.sin()])),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("call", CALLS)
def test_transforms_inside_a_compiled_region(call, transform):
    """Compiled as one graph, without a break; the rules run, and no result is silently zero."""
    f = TRANSFORMS[transform](_loss(CALLS[call]))
    torch.manual_seed(1)
    want = f(Q)
    torch.manual_seed(1)
    got = torch.compile(f, backend="aot_eager", fullgraph=True)(Q)
    assert want.norm() > 1e-3
    assert_close(got, want)


def test_hessian_inside_a_compiled_region():
    q = Q[0, 0, :2, :2].clone()
    f = hessian(lambda q: metaattn.sdpa(q, K[0, 0, :, :2], V[0, 0]).sin().sum())
    assert_close(torch.compile(f, backend="aot_eager", fullgraph=True)(q), f(q))


@pytest.mark.parametrize("transform", ["grad", "hvp", "meta_step"])
def test_inductor(transform):
    f = TRANSFORMS[transform](_loss({"is_causal": True}))
    assert_close(torch.compile(f, fullgraph=True)(Q), f(Q))


def test_the_rules_run_and_are_not_differentiated_past(monkeypatch):
    """A compiled gradient contains our backward, one operator per direction, and no softmax that could be split up."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    torch.compile(grad(_loss({})), backend=backend, fullgraph=True)(Q)
    called = [n.target for graph in graphs for n in graph.graph.nodes if n.op == "call_function"]
    assert _rules._forward in called


def test_a_gradient_beside_its_tangent():
    """Results of one operator are separate fake tensors: a tracer takes one that is returned twice for the last."""
    gradient = grad(lambda *x: metaattn.sdpa(*x).sin().sum(), (0, 1, 2))
    x = (Q, K, V, T, T.sin(), T.cos())

    def f(*x):
        return jvp(gradient, x[:3], x[3:])

    traced = make_fx(f, tracing_mode="fake")(*x)
    assert torch.ops.metaattn._backward_with_jvp.default in [n.target for n in traced.graph.nodes]
    assert_close(traced(*x), f(*x))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_training_step_without_graph_break(dtype):
    linear, q = torch.nn.Linear(4, 4, dtype=dtype), Q.to(dtype)

    def step(x):
        return metaattn.sdpa(linear(x), x, x).square().sum()

    want = torch.autograd.grad(step(q), list(linear.parameters()))
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    assert_close(torch.autograd.grad(compiled(q), list(linear.parameters())), want, dtype)
    assert sum(counters["graph_break"].values()) == 0


@pytest.mark.parametrize(
    ("device", "compiler"),
    [
        ("cpu", "aot_eager"),
        pytest.param("cpu", "inductor", marks=pytest.mark.slow),
        pytest.param("cuda", "inductor", marks=pytest.mark.gpu),
    ],
)
def test_training_steps_of_a_transformer(device, compiler):
    """Losses and updated parameters of three ordinary training steps, each one graph; in float32 on a GPU."""
    dtype = torch.float64 if device == "cpu" else torch.float32
    shape = {"dim": 8, "heads": 2, "depth": 1, "input": "token", "vocab_size": 11, "causal": True}
    x = torch.randint(11, (2, 7), device=device)

    def train(compile):
        torch.manual_seed(4)
        model = metaattn.Transformer(**shape, output="per_token", out_features=11).to(device, dtype)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        step = compile(lambda x: torch.nn.functional.cross_entropy(model(x[:, :-1]).mT, x[:, 1:]))
        losses = []
        for _ in range(3):
            optimizer.zero_grad()
            losses.append(step(x))
            losses[-1].backward()
            optimizer.step()
        return losses, list(model.parameters())

    got = train(lambda f: torch.compile(f, backend=compiler, fullgraph=True))
    want = train(lambda f: f)
    assert want[0][2] < want[0][0]
    assert_close(got, want, dtype, factor=1 if device == "cpu" else 1e3)  # AdamW divides by small gradients


def test_double_backward_through_a_compiled_function_raises():
    """A limit of AOTAutograd: an error, as for every other operation, and never zeros."""
    x = Q.clone().requires_grad_()
    (g,) = torch.autograd.grad(torch.compile(_loss({}), backend="inductor")(x), x, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        g.square().sum().backward()


def test_dynamic_shapes():
    f = torch.compile(grad(lambda q: metaattn.sdpa(q, q, q).sin().sum()), backend="aot_eager", dynamic=True)
    for n in (3, 5, 8):
        q = torch.randn(1, 2, n, 4, dtype=torch.float64)
        assert_close(f(q), grad(lambda q: metaattn.sdpa(q, q, q).sin().sum())(q))


def test_use_backend_is_seen_by_compiled_functions(monkeypatch):
    """A block that is opened after compilation causes recompilation: the choice of backend is never stale."""
    used = []
    forward = _rules._forward

    def spy(*args):
        used.append(args[4])
        return forward(*args)

    monkeypatch.setattr(_rules, "_forward", torch.compiler.allow_in_graph(spy))
    f = torch.compile(lambda q: metaattn.sdpa(q, K, V), backend="eager")
    for name in ("auto", "reference", "auto", "blockwise"):
        used.clear()
        with metaattn.use_backend(name):
            assert_close(f(Q), metaattn.sdpa(Q, K, V))
        assert set(used) == {name}, (name, used)


def test_errors_reach_the_caller():
    with pytest.raises(ValueError, match="one head size"):
        torch.compile(lambda q: metaattn.sdpa(q[..., :3], K, V), backend="eager")(Q)


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("call", sorted(CALLS.keys() - {"dropout"}))
def test_make_fx_replays(call, transform):
    f = TRANSFORMS[transform](_loss(CALLS[call]))
    graph = make_fx(f)(Q)
    operators = {n.target for n in graph.graph.nodes if "metaattn" in str(n.target)}
    assert operators  # each primitive is one node
    for x in (Q, Q.cos(), 2 * Q):  # not only the inputs it was traced with
        assert_close(graph(x), f(x))


def _along(f):
    return jvp(f, (Q,), (T,))[1]


def _dual(f):
    with forward_ad.dual_level():
        return f(forward_ad.make_dual(Q, T))


def _reverse(f):
    return grad(lambda q: f(q).sum())(Q)


@pytest.mark.parametrize("derivative", [_along, _dual, _reverse], ids=["jvp", "dual", "grad"])
@pytest.mark.parametrize("transform", ["value", "grad"])
def test_a_traced_graph_has_lost_its_rules_and_says_so(transform, derivative):
    graph = make_fx(TRANSFORMS[transform](_loss({})))(Q)
    with pytest.raises(NotImplementedError, match="in a graph that was traced has no derivative: trace the derivative"):
        derivative(graph)


def test_a_traced_graph_gives_its_value_where_gradients_are_on():
    q = Q.clone().requires_grad_()
    assert_close(make_fx(_loss({}))(Q)(q), _loss({})(Q))


def test_a_compiled_function_in_forward_mode_says_so():
    with pytest.raises(NotImplementedError, match="has no derivative"):
        _dual(torch.compile(lambda q: metaattn.sdpa(q, K, V), backend="aot_eager"))


def test_a_traced_graph_is_mapped():
    f = grad(_loss({}))
    assert_close(vmap(make_fx(f)(Q))(torch.stack([Q, T])), torch.stack([f(Q), f(T)]))


def test_make_fx_replay_draws_new_dropout():
    graph = make_fx(_loss({"dropout_p": 0.5}))(Q)
    assert graph(Q) != graph(Q)
    torch.manual_seed(2)
    a = graph(Q)
    torch.manual_seed(2)
    assert graph(Q) == a


def test_make_fx_with_fake_tensors():
    """Reverse mode is traced symbolically; PyTorch 2.13 traces forward mode with real tensors only."""

    def step(q, k, v):
        def loss(q):
            return metaattn.sdpa(q, k, v).sin().sum()

        return grad(lambda q: loss(q - 0.1 * grad(loss)(q)))(q)

    assert_close(make_fx(step, tracing_mode="fake")(Q, K, V)(Q.cos(), V, K), step(Q.cos(), V, K))


def test_operators_declare_their_results():
    """Shapes, dtypes and strides under fake tensors are those of the real operator."""
    from torch._subclasses import FakeTensorMode

    calls = [lambda q: metaattn.sdpa(q, K[:, :2], V[:, :2], enable_gqa=True, return_lse=True), jacfwd(_loss({}))]
    calls += [TRANSFORMS[name](_loss(CALLS[call])) for name in ("grad", "hvp") for call in ("plain", "bias")]
    for f in calls:
        want = torch.utils._pytree.tree_leaves(f(Q))
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            got = torch.utils._pytree.tree_leaves(f(mode.from_tensor(Q)))
        for g, w in zip(got, want, strict=True):
            assert (g.shape, g.dtype, g.stride()) == (w.shape, w.dtype, w.stride())
