"""Compiled meta-steps equal eager ones, whatever changes between calls; or they run eagerly, and a warning says why."""

import warnings

import pytest
import torch
from torch._dynamo.utils import counters
from torch.func import functional_call
from torch.nn import functional as F

import metaattn
from metaattn.compile import capture, compiler
from metaattn.compile.passes import matmul_fusion
from metaattn.compile.piecewise import as_recorded
from metaattn.meta import Mixed, Truncated, adam, maml, maml_plus_plus, momentum, reptile, sgd
from tests.helpers import assert_close

GPU = pytest.param("cuda", marks=pytest.mark.gpu)
PARAMS = {"w": torch.linspace(-1, 1, 12, dtype=torch.float64).view(3, 4), "v": torch.ones(4, dtype=torch.float64)}


def loss(params, x, y):
    return ((x @ params["w"]).tanh() @ params["v"] - y).square().mean()


def tasks(count=2, seed=0, device="cpu", dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    shapes = ((count, 5, 3), (count, 5))
    return tuple(tuple(torch.randn(s, generator=g, dtype=dtype).to(device) for s in shapes) for _ in range(2))


def recorded(step):
    """Return the captured step, with its pieces recorded and split but not compiled, which is quick."""
    captured = capture(step, mode="inductor")
    captured.modules = []

    def compile_piece(module, inputs):
        captured.modules.append(module)
        return as_recorded(module)

    captured.compiler.compile_piece = compile_piece
    return captured


def transformer(depth=1, **changes):
    model = metaattn.Transformer(
        **{"input": "continuous", "in_features": 3, "output": "pooled", "out_features": 2, "dim": 8, "heads": 2}
        | {"depth": depth, **changes}
    ).double()
    torch.nn.init.normal_(model.get_parameter("head.weight"))

    def classify(params, x, y):
        out = functional_call(model, params, (x,))
        return F.cross_entropy(out, y), {"accuracy": (out.argmax(-1) == y).double().mean()}

    return model, classify


def sequences(seed=0):
    g = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(2, 2, 4, 5, 3, generator=g, dtype=torch.float64), torch.randint(2, (2, 2, 4), generator=g))
    return (x[0], y[0]), (x[1], y[1])


def two_layers(params, x, y):
    h = x @ params["w"] + x.flip(-1) @ params["u"]
    return ((h.tanh() @ params["w"].mT @ params["u"]).tanh() @ params["v"] - y).square().mean()


@pytest.mark.parametrize("gradient", ["reverse", "mixed"])
@pytest.mark.parametrize("name", ["two layers", "transformer"])
def test_fused_matmuls_are_the_same(name, gradient, monkeypatch):
    """Fuse them as on a GPU, where our kernel computes them together."""
    monkeypatch.setattr(matmul_fusion, "supported", lambda like: True)
    model, classify = transformer(2)
    if name == "transformer":
        learner, params, data = (
            maml(classify, steps=2, gradient=gradient, has_aux=True),
            dict(model.named_parameters()),
            sequences(),
        )
    else:
        learner, params, data = maml(two_layers, steps=2, gradient=gradient), PARAMS | {"u": PARAMS["w"].sin()}, tasks()
    fast, meta = recorded(learner.value_and_grad), learner.init(params)
    assert_close(fast(meta, *data), learner.value_and_grad(meta, *data))
    assert not fast.compiler.reasons
    names = [str(n.target) for module in fast.modules for n in module.graph.nodes]
    assert "metaattn._fused_matmuls.default" in names


@pytest.mark.parametrize("optimizer", [sgd(), adam()], ids=["sgd", "adam"])
@pytest.mark.parametrize(
    ("gradient", "learns"),
    [(g, rates) for g in ("reverse", "mixed", "first_order") for rates in ("nothing", "element")]
    # With the first steps cut off only the rates have a derivative; with implicit gradients nothing has one.
    + [(Mixed(2), "nothing"), (Truncated(2), "element"), ("implicit", "nothing")],
    ids=str,
)
def test_recorded_steps_equal_eager_ones(gradient, learns, optimizer):
    learner = maml(
        loss,
        steps=3,
        learning_rate=0.1,
        gradient=gradient,
        learns=learns,
        optimizer=optimizer,
        per_step=learns != "nothing",
    )
    meta = learner.init(PARAMS)
    fast = recorded(learner.value_and_grad)
    for seed in range(2):
        assert_close(fast(meta, *tasks(seed=seed)), learner.value_and_grad(meta, *tasks(seed=seed)))
    assert not fast.compiler.reasons


@pytest.mark.parametrize(
    "learner",
    [
        maml_plus_plus(loss, steps=2, learning_rate=0.1),
        reptile(loss, steps=2, learning_rate=0.1),
        maml(loss, steps=2, adapts=("v",), gradient="mixed"),
        maml(loss, steps=3, gradient="mixed", optimizer=momentum(nesterov=True)),
    ],
    ids=["maml_plus_plus", "reptile", "anil", "momentum"],
)
def test_algorithms(learner):
    meta, data = learner.init(PARAMS), tasks()
    fast = recorded(learner.value_and_grad)
    assert_close(fast(meta, *data), learner.value_and_grad(meta, *data))
    assert fast.modules


@pytest.mark.parametrize("changes", [{}, {"norm": "rms", "activation": "swiglu", "remat": True}], ids=["layer", "rms"])
def test_a_transformer_with_metrics(changes):
    model, classify = transformer(**changes)
    learner = maml(classify, steps=2, gradient="mixed", has_aux=True)
    meta = learner.init(dict(model.named_parameters()))
    fast = recorded(learner.value_and_grad)
    assert_close(fast(meta, *sequences()), learner.value_and_grad(meta, *sequences()))
    assert fast.modules


@pytest.mark.parametrize(("optimizer", "steps"), [(sgd(), (1, 2, 5)), (adam(), (3, 6))], ids=["sgd", "adam"])
def test_what_is_compiled_does_not_grow_with_the_steps(optimizer, steps):
    """Adam's first step, whose state is constant, and its last, whose state is not used, are compiled separately."""
    counts = set()
    for n in steps:
        learner = maml(loss, steps=n, gradient="mixed", optimizer=optimizer, learns="tensor")
        fast = recorded(learner.value_and_grad)
        fast(learner.init(PARAMS), *tasks())
        counts.add(len(fast.modules))
    assert len(counts) == 1


@pytest.mark.filterwarnings("ignore")  # Inductor's own
@pytest.mark.parametrize("gradient", ["mixed", "reverse"])
def test_inductor(gradient):
    learner = maml(loss, steps=2, learning_rate=0.1, gradient=gradient)
    fast, meta = capture(learner.value_and_grad, mode="inductor"), learner.init(PARAMS)
    for seed in range(2):
        data = tasks(seed=seed)
        assert_close(fast(meta, *data), learner.value_and_grad(meta, *data))
    assert fast.reason is None
    assert not fast.compiler.reasons


@pytest.mark.filterwarnings("ignore")
def test_a_second_process_finds_what_one_compiled(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    learner = maml(lambda params, x, y: F.cross_entropy(x @ params["w"], y), steps=2, learning_rate=0.1)
    meta = learner.init(PARAMS)
    data = tuple((x, (y > 0).long()) for x, y in tasks())
    found = []
    for _ in range(2):
        torch._inductor.utils.clear_caches()  # those in memory
        counters["inductor"].clear()
        fast = capture(learner.value_and_grad, mode="inductor")
        assert_close(fast(meta, *data), learner.value_and_grad(meta, *data))
        assert not fast.compiler.reasons
        found.append([counters["inductor"][f"fxgraph_cache_{name}"] for name in ("hit", "miss", "bypass")])
    (_, missed, _), after = found
    assert missed > 0
    assert after == [missed, 0, 0]


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("gradient", ["mixed", "reverse", "first_order"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_inductor_in_a_graph(gradient, dtype):
    """Compare a replayed graph with the eager step in float64."""
    model, classify = transformer(2, causal=True)
    model.cuda()
    learner = maml(classify, steps=2, gradient=gradient, has_aux=True)
    meta = learner.init(dict(model.named_parameters()))
    fast = capture(learner.value_and_grad, mode="inductor")
    low = {g: {k: t.detach().to(dtype) for k, t in group.items()} for g, group in meta.items()}
    for seed in range(2):
        (x, y), (u, v) = ((x.cuda(), y.cuda()) for x, y in sequences(seed))
        (want, _), want_grad = learner.value_and_grad(meta, (x, y), (u, v))
        (got, _), got_grad = fast(low, (x.to(dtype), y), (u.to(dtype), v))
        assert fast.reason is None
        assert not fast.compiler.reasons
        names = list(want_grad["params"])
        flat = [torch.cat([g["params"][k].double().flatten() for k in names]) for g in (got_grad, want_grad)]
        # A whole step on weights rounded to the dtype: its roundings, some hundred times over.
        factor = {torch.float64: 1, torch.float32: 100, torch.bfloat16: 10}[dtype]
        assert_close([got.double(), flat[0]], [want, flat[1]], dtype, factor)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore")
def test_another_shape_is_captured_again_on_a_gpu():
    learner = maml(loss, steps=2, learning_rate=0.1, gradient="mixed")
    fast = capture(learner.value_and_grad, mode="inductor")
    meta = {g: {k: t.detach().cuda() for k, t in group.items()} for g, group in learner.init(PARAMS).items()}
    for count in (2, 3, 2):
        data = tasks(count, device="cuda")
        assert_close(fast(meta, *data), learner.value_and_grad(meta, *data))
        assert fast.reason is None


def test_autocast_is_not_applied_to_what_was_recorded_below_it():
    def in_float32(params, x, y):
        with torch.autocast("cpu", enabled=False):
            return loss(params, x, y)

    learner = maml(in_float32, steps=1, learning_rate=1e-9)  # a gradient's own products are under autocast, eagerly too
    meta = learner.init({k: t.float() for k, t in PARAMS.items()})
    data = tasks(dtype=torch.float32)
    fast = capture(learner.value_and_grad, mode="inductor")
    seen = []

    def compile_piece(module, inputs):
        seen.append(torch.is_autocast_enabled("cpu"))
        return as_recorded(module)

    fast.compiler.compile_piece = compile_piece
    with torch.autocast("cpu", torch.bfloat16):
        got = fast(meta, *data)[0]
    assert_close(got, learner.value_and_grad(meta, *data)[0], torch.float32)
    assert seen
    assert not any(seen)


def test_another_default_dtype_is_compiled_again():
    fast = recorded(maml(loss, steps=1, learning_rate=0.1).value_and_grad)
    meta = maml(loss, steps=1, learning_rate=0.1).init(PARAMS)
    fast(meta, *tasks())
    count = len(fast.modules)
    torch.set_default_dtype(torch.float64)
    try:
        fast(meta, *tasks())
    finally:
        torch.set_default_dtype(torch.float32)
    assert len(fast.modules) == 2 * count > 0


def test_another_shape_is_recorded_again():
    learner = maml(loss, steps=2, learning_rate=0.1)
    fast, meta = recorded(learner.value_and_grad), learner.init(PARAMS)
    counts = []
    for count in (2, 3, 2):
        assert_close(fast(meta, *tasks(count)), learner.value_and_grad(meta, *tasks(count)))
        counts.append(len(fast.modules))
    assert counts[0] < counts[1] == counts[2]


class TestCapturedTensors:
    """Closed-over tensors are inputs: if they are changed in place or exchanged, the next call sees it."""

    def test_changed_in_place(self):
        scale = torch.ones((), dtype=torch.float64)
        learner = maml(lambda p, x, y: scale * loss(p, x, y), learning_rate=0.1)
        fast, meta = recorded(learner.value_and_grad), learner.init(PARAMS)
        for value in (1.0, 3.0):
            scale.fill_(value)
            assert_close(fast(meta, *tasks()), learner.value_and_grad(meta, *tasks()))

    def test_exchanged(self):
        held = {"scale": torch.ones((), dtype=torch.float64)}
        learner = maml(lambda p, x, y: held["scale"] * loss(p, x, y), learning_rate=0.1)
        fast, meta = recorded(learner.value_and_grad), learner.init(PARAMS)
        counts = []
        for value in (1.0, 3.0):
            held["scale"] = torch.tensor(value, dtype=torch.float64)
            assert_close(fast(meta, *tasks()), learner.value_and_grad(meta, *tasks()))
            counts.append(len(fast.modules))
        assert counts[0] == counts[1], "nothing new is compiled"

    def test_numbers_and_globals(self, monkeypatch):
        settings = {"power": 2}
        monkeypatch.setitem(globals(), "SHIFT", torch.zeros((), dtype=torch.float64))
        learner = maml(lambda p, x, y: loss(p, x, y) ** settings["power"] + SHIFT * p["v"].sum(), learning_rate=0.1)  # noqa: F821
        fast, meta = recorded(learner.value_and_grad), learner.init(PARAMS)
        for power, shift in ((2, 0.0), (3, 0.0), (3, 0.5)):
            settings["power"] = power
            monkeypatch.setitem(globals(), "SHIFT", torch.tensor(shift, dtype=torch.float64))
            assert_close(fast(meta, *tasks()), learner.value_and_grad(meta, *tasks()))

    @pytest.mark.parametrize("held", [(torch.relu, torch.tanh), ({1}, {1, 2})], ids=["function", "set"])
    def test_globals_that_are_exchanged(self, held, monkeypatch):
        def global_loss(p, x, y):
            act = HELD if callable(HELD) else torch.relu if 2 in HELD else torch.tanh  # noqa: F821
            return (act(x @ p["w"]).sum(-1) - y).square().mean()

        learner = maml(global_loss, learning_rate=0.1)
        fast, meta = recorded(learner.value_and_grad), learner.init(PARAMS)
        for thing in held:
            monkeypatch.setitem(globals(), "HELD", thing)
            assert_close(fast(meta, *tasks()), learner.value_and_grad(meta, *tasks()))

    def test_buffers_and_modes_of_modules(self):
        model = torch.nn.Sequential(torch.nn.Linear(3, 1), torch.nn.BatchNorm1d(1)).double().eval()

        def batch_loss(p, x, y):
            return (functional_call(model, p, (x,)).squeeze(-1) - y).square().mean()

        learner = maml(batch_loss, learning_rate=0.1)
        fast, meta = recorded(learner.value_and_grad), learner.init(dict(model.named_parameters()))
        for mean in (0.0, 1.0):
            model[1].running_mean.fill_(mean)
            assert_close(fast(meta, *tasks()), learner.value_and_grad(meta, *tasks()))

    def test_a_new_closure_of_the_same_code_is_found_again(self):
        fast = recorded(lambda meta, support, query: step(meta, support, query))

        def step(meta, support, query):
            return maml(lambda p, x, y: loss(p, x, y), steps=2).value_and_grad(meta, support, query)

        meta = maml(loss).init(PARAMS)
        fast(meta, *tasks())
        first = len(fast.modules)
        fast(meta, *tasks(seed=1))
        assert len(fast.modules) == first


def drops(params, x, y):
    return loss(params, F.dropout(x, 0.5), y)


def branches(params, x, y):
    return loss(params, x, y) * (2 if PARAMS["v"].sum().item() > 0 else 1)


@pytest.mark.parametrize("gradient", ["reverse", "mixed"])
@pytest.mark.parametrize(
    ("loss", "reason"), [(drops, "it draws random numbers"), (branches, "it depends on a tensor's numbers")]
)
def test_what_cannot_be_compiled_runs_as_it_is(loss, reason, gradient):
    """It draws the random numbers of an eager step."""
    learner = maml(loss, steps=2, learning_rate=0.1, gradient=gradient)
    fast, meta = recorded(learner.value_and_grad), learner.init(PARAMS)
    torch.manual_seed(1)
    with pytest.warns(UserWarning, match=f"a part of the step is not compiled: {reason}") as caught:
        first = fast(meta, *tasks())
    assert len([w for w in caught if "not compiled" in str(w.message)]) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.manual_seed(1)
        again = fast(meta, *tasks())
    torch.manual_seed(1)
    want = learner.value_and_grad(meta, *tasks())
    assert_close(first, want)
    assert_close(again, want)


def test_a_loss_that_changes_in_every_call_is_not_compiled_for_ever(monkeypatch):
    monkeypatch.setattr(compiler, "MAX_GRAPHS", 4)  # two losses: an inner step and an outer loss of each
    power = [1.0]
    learner = maml(lambda p, x, y: loss(p, x, y) ** power[0], learning_rate=0.1)
    fast, meta, counts = recorded(learner.value_and_grad), learner.init(PARAMS), []

    def compare(value):
        power[0] = value
        assert_close(fast(meta, *tasks()), learner.value_and_grad(meta, *tasks()))
        counts.append(len(fast.modules))

    compare(1.0)
    compare(2.0)
    with pytest.warns(UserWarning, match="there are more than 4 functions like it"):
        compare(3.0)
    compare(1.0)
    assert counts[0] < counts[1] == counts[2] == counts[3]


def test_a_compiler_that_fails_is_a_warning_and_the_step_runs():
    learner = maml(loss, steps=2, learning_rate=0.1)
    fast, meta = recorded(learner.value_and_grad), learner.init(PARAMS)

    def compile_piece(module, inputs):
        raise RuntimeError("no compiler found")

    fast.compiler.compile_piece = compile_piece
    with pytest.warns(UserWarning, match=r"it could not be compiled \(RuntimeError: no compiler found\)"):
        got = fast(meta, *tasks())
    assert_close(got, learner.value_and_grad(meta, *tasks()))


def test_a_piece_that_cannot_be_compiled_runs_as_recorded_and_the_others_compiled():
    model, classify = transformer(depth=2)
    learner = maml(classify, steps=2, learning_rate=0.1, has_aux=True)
    fast, meta = recorded(learner.value_and_grad), learner.init(dict(model.named_parameters()))
    record = fast.compiler.compile_piece

    def second_fails(module, inputs):
        compiled = record(module, inputs)
        if len(fast.modules) == 2:
            raise RuntimeError("no registers left\nTraceback of the compiler\n  line 7: too many")
        return compiled

    fast.compiler.compile_piece = second_fails
    with pytest.warns(UserWarning, match=r"RuntimeError: no registers left … line 7: too many") as caught:
        got = fast(meta, *sequences())
    assert_close(got, learner.value_and_grad(meta, *sequences()))
    assert len(caught) == len(fast.compiler.reasons) == 1
    assert len(fast.modules) > 2


def test_a_differentiable_closure():
    """An eager step in reverse mode differentiates it; mixed mode raises an error."""
    w = torch.ones(3, dtype=torch.float64, requires_grad=True)

    def closed(params, x, y):
        return loss(params, x * w, y)

    def step(gradient):
        learner = maml(closed, learning_rate=0.1, gradient=gradient)
        meta = learner.init(PARAMS)
        return lambda: torch.autograd.grad(learner.losses(meta, *tasks()).sum(), w)[0]

    with pytest.warns(UserWarning, match="closes over a tensor"):
        assert_close(recorded(step("reverse"))(), step("reverse")())
    with pytest.raises(ValueError, match="closes over a tensor"):
        recorded(step("mixed"))()


def test_metrics_have_no_derivative():
    """A derivative of them is an error, not zeros."""

    def with_metrics(params, x, y):
        value = loss(params, x, y)
        return value, {"double": 2 * value}

    learner = maml(with_metrics, learning_rate=0.1, has_aux=True)
    meta = learner.init(PARAMS)

    def step(support, query):
        return torch.autograd.grad(
            learner.losses(meta, support, query)[1]["double"].sum(), list(meta["params"].values())
        )

    with pytest.raises(NotImplementedError, match="beside its value has no derivative"):
        recorded(step)(*tasks())
