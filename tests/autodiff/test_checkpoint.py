"""Checkpointed functions against the functions themselves in every nesting of derivatives, and their errors."""

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import functional_call, grad, jacfwd, jacrev, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

from metaattn.ops import checkpoint, sdpa
from tests.helpers import assert_close

from ..ops import nestings

F64 = {"dtype": torch.float64}
SHAPES = ((3, 4), (4, 4), (4,))


def smooth(x, w, b):
    """Two outputs of three inputs, none of them linear; one input is used twice."""
    h = torch.tanh(x @ w + b)
    return h @ w.mT, (h * x.sin()).sum(-1).exp()


def mixed(x, w, b):
    """Attention inside of a checkpoint: custom functions inside of a custom function."""
    q = (x @ w)[None, None]
    return sdpa(q, x[None, None], q.sin() + b, backend="reference", return_lse=True)


def random(x, w, b):
    h = F.dropout(torch.tanh(x @ w + b), 0.4)
    return F.dropout(h @ w.mT, 0.3), h.square().sum(-1)


FUNCTIONS = {"smooth": smooth, "mixed": mixed, "random": random}


def _inputs(seed=1):
    g = torch.Generator().manual_seed(seed)
    return tuple(0.5 * torch.randn(s, generator=g, **F64) for s in SHAPES)


def _seeded(f):
    def seeded(*x):
        torch.manual_seed(3)
        return f(*x)

    return seeded


def _nestings():
    for name in FUNCTIONS:
        for nesting in (*nestings.FIRST, *nestings.SECOND, *nestings.THIRD):
            # The vmap of is_grads_batched has no random operations, see test_random_numbers_under_batched_gradients.
            if name == "random" and nesting in (*nestings.NOT_RANDOM, nestings.eager_batched):
                continue
            yield pytest.param(name, nesting, id=f"{name}-{nesting.__name__}")


@pytest.mark.parametrize(("name", "nesting"), list(_nestings()))
def test_every_nesting(name, nesting):
    f = FUNCTIONS[name]
    x, ts = _inputs(), [_inputs(seed) for seed in (2, 3, 4)]
    want = nesting(_seeded(f), x, ts)
    assert_close(nesting(_seeded(checkpoint(f)), x, ts), want)


def test_random_numbers_under_batched_gradients():
    x = [t.requires_grad_() for t in _inputs()]
    out, _ = checkpoint(random)(*x)
    with pytest.raises(RuntimeError, match="random operations"):
        torch.autograd.grad(out, x, torch.randn(2, *out.shape, **F64), is_grads_batched=True)


@pytest.mark.parametrize("name", ["smooth", "mixed"])
def test_gradcheck(name):
    x = tuple(t[:2, :2].contiguous() if t.dim() == 2 else t[:2] for t in _inputs())
    x = tuple(t.detach().requires_grad_() for t in x)
    f = checkpoint(FUNCTIONS[name])
    assert gradcheck(f, x, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(f, x, check_fwd_over_rev=True, check_batched_grad=True)


class TestArguments:
    def test_containers_constants_and_integers(self):
        def f(tree, *, power, flag):
            assert flag == "on"
            total = tree["a"] * tree["rest"][0].sum() * tree["index"]
            return {"out": total**power, "argmax": total.argmax(-1), "note": "kept", "none": None, "same": tree["a"]}

        def loss(a, b, f=f):
            out = f({"a": a, "rest": (b,), "index": torch.arange(4)}, power=3, flag="on")
            assert out["note"] == "kept"
            assert out["none"] is None
            assert out["argmax"].dtype == torch.int64
            return out["out"].sum() + out["same"].sin().sum() + out["argmax"].sum()

        a, b = torch.randn(3, 4, **F64), torch.randn(2, **F64)
        ours = lambda a, b: loss(a, b, checkpoint(f))
        for transform in (
            lambda f: grad(f, (0, 1))(a, b),
            lambda f: jvp(grad(f, (0, 1)), (a, b), (b.sum() * a, b.cos())),
            lambda f: grad(lambda a, b: grad(f)(a, b).square().sum(), (0, 1))(a, b),
            lambda f: vmap(grad(f, (0, 1)), (0, None))(torch.stack([a, -a]), b),
            lambda f: jacrev(jacfwd(f))(a, b),
        ):
            assert_close(transform(ours), transform(loss))

    def test_absent_gradients_are_none_or_zero(self):
        f = checkpoint(lambda x, y: (x.sin(), y.sin()))
        x, y = (torch.randn(3, **F64, requires_grad=True) for _ in range(2))
        gx, gy = torch.autograd.grad(f(x, y)[0].sum(), (x, y), create_graph=True, allow_unused=True)
        assert_close(gx, x.cos())
        assert gy is None or not gy.any()
        (ggx,) = torch.autograd.grad(gx.sum(), x)
        assert_close(ggx, -x.sin())

    def test_inputs_that_need_no_gradient(self):
        x, y = torch.randn(3, **F64, requires_grad=True), torch.randn(3, **F64)
        out = checkpoint(lambda x, y: x * y.exp())(x, y)
        assert_close(torch.autograd.grad(out.sum(), x), (y.exp(),))
        assert not checkpoint(torch.sin)(y).requires_grad

    def test_no_grad(self):
        x = torch.randn(3, requires_grad=True)
        with torch.no_grad():
            out = checkpoint(lambda y: x * y)(x)  # nothing is lost where nothing is differentiated
        assert not out.requires_grad
        assert torch.equal(out, x * x)

    def test_without_tensors(self):
        assert checkpoint(lambda n, s: (n + 1, s))(1, s="a") == (2, "a")

    def test_not_callable(self):
        message = r"takes a function or a module, and the function that it returns takes the arguments; got tensor"
        with pytest.raises(TypeError, match=message):
            checkpoint(torch.ones(2))


class TestModules:
    def _pieces(self):
        model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).to(torch.float64)
        x = torch.randn(4, 3, **F64)
        return model, x

    def test_parameters_of_a_module_are_arguments(self):
        model, x = self._pieces()
        checkpoint(model)(x).sin().sum().backward()
        got = [p.grad for p in model.parameters()]
        want = torch.autograd.grad(model(x).sin().sum(), list(model.parameters()))
        assert_close(got, want)

    def test_under_functional_call(self):
        class Outer(nn.Module):
            def __init__(self, model, wrap):
                super().__init__()
                self.model, self.wrap = model, wrap

            def forward(self, x):
                return self.wrap(self.model)(x)

        model, x = self._pieces()
        params = {f"model.{k}": p.detach() for k, p in model.named_parameters()}

        def hessian_product(wrap):
            f = lambda p: functional_call(Outer(model, wrap), p, (x,)).sin().square().sum()
            return jvp(grad(f), (params,), ({k: p.cos() for k, p in params.items()},))[1]

        assert_close(hessian_product(checkpoint), hessian_product(lambda m: m))

    def test_a_buffer_changed_in_place_is_refused(self):
        norm = nn.BatchNorm1d(3).to(torch.float64)
        with pytest.raises(ValueError, match=r"changed an argument, or a buffer of its module, in place"):
            checkpoint(norm)(torch.randn(4, 3, **F64))

    def test_a_part_registered_twice_and_a_parameter_of_two_parts(self):
        """PyTorch's functional_call leaves what it was given in a module that it finds at two names."""
        model = nn.Module()
        model.a, model.b = nn.Linear(3, 3), nn.Linear(3, 3)
        model.again, model.b.weight = model.a, model.a.weight
        model.forward = lambda x: model.b(model.again(model.a(x).tanh()))
        model, x, before = model.double(), torch.randn(4, 3, **F64), model.a.weight
        for f in (checkpoint(model), model):
            model.zero_grad()
            f(x).sin().sum().backward()
            assert model.a.weight is model.again.weight is model.b.weight is before
            grads = [p.grad.clone() for p in model.parameters()]
            if f is not model:
                got = grads
        assert_close(got, grads)


class TestCapturedTensors:
    """Tensors that a function captures, whose derivative would be lost."""

    x, c = torch.arange(3.0), torch.ones(3)

    def test_that_requires_grad(self):
        c = self.c.clone().requires_grad_()
        with pytest.raises(ValueError, match=r"is not given and that requires a gradient.*pass it as an argument"):
            checkpoint(lambda x: x * c)(self.x)

    @pytest.mark.parametrize(
        "transform",
        [
            lambda f, c: grad(lambda c: f(c).sum())(c),
            lambda f, c: jvp(f, (c,), (c,)),
            lambda f, c: vmap(f)(c),
            lambda f, c: grad(lambda c: grad(lambda d: f(c * d).sum())(c).sum())(c),
        ],
    )
    def test_under_a_transform(self, transform):
        with pytest.raises(
            ValueError, match=r"the function\.c, \[.*its derivative would be lost; pass it as an argument"
        ):
            transform(lambda c: checkpoint(lambda x: x * c)(self.x), self.c)

    def test_within_a_transform_of_its_own(self):
        """Wrappers of two transforms are of one level, by which they cannot be distinguished."""
        inner = lambda c: checkpoint(lambda x: grad(lambda x: (x * c).sin().sum())(x))(self.x).sum()
        with pytest.raises(ValueError, match=r"the function\.c"):
            grad(inner)(self.c)

    def test_in_a_partial_a_default_a_method_and_a_container(self):
        from functools import partial

        class Holder:
            def __init__(self, c):
                self.c = c

            def times(self, x):
                return x * self.c

        for make in (
            lambda c: partial(torch.mul, c),
            lambda c: lambda x, c=c: x * c,
            lambda c: Holder(c).times,
            lambda c: lambda x, cs=({"c": c},): x * cs[0]["c"],
            lambda c: partial(lambda h, x: h.times(x), Holder(c)),
        ):
            with pytest.raises(ValueError, match="uses a tensor that it is not given"):
                grad(lambda c, make=make: checkpoint(make(c))(self.x).sum())(self.c)

    def test_a_global(self):
        def f(x):
            return x * OUTSIDE["c"]

        def loss(c):
            OUTSIDE["c"] = c
            return checkpoint(f)(self.x).sum()

        with pytest.raises(ValueError, match="uses a tensor that it is not given"):
            grad(loss)(self.c)

    def test_a_global_that_is_returned(self):
        def returns(w):
            global W
            W = w * w
            return checkpoint(lambda x: W)(torch.ones(2)).sum()

        with pytest.raises(ValueError, match="not given"):
            jvp(returns, (torch.ones(2),), (torch.ones(2),))

    def test_a_global_in_a_list(self):
        def loss(c):
            OUTSIDE["c"] = c
            return checkpoint(lambda x: torch.stack([x, OUTSIDE["c"]]))(self.x).sum()

        with pytest.raises(ValueError, match="uses a tensor that it is not given"):
            grad(loss)(self.c)

    def test_a_dual_number(self):
        f = checkpoint(lambda x, y: (x * y) @ c)
        with forward_ad.dual_level():
            c = forward_ad.make_dual(self.c, self.x)
            with pytest.raises(ValueError, match="uses a tensor that it is not given"):
                f(self.x, self.x)
            # Together with tangents of the arguments, that of the captured tensor is not lost.
            x = forward_ad.make_dual(self.x, self.c)
            got = forward_ad.unpack_dual(f(x, self.x)).tangent
        assert_close(got, self.x.sum() + self.x.pow(3).sum(), torch.float32)

    def test_an_opaque_argument(self):
        class Box:
            def __init__(self, c):
                self.c = c

        with pytest.raises(ValueError, match="constant arguments"):
            grad(lambda c: checkpoint(lambda x, box: x * box.c)(self.x, Box(c)).sum())(self.c)

    def test_a_constant_is_welcome(self):
        got = grad(lambda x: checkpoint(lambda x: (x * self.c).sin())(x).sum())(self.x)
        assert_close(got, self.x.cos(), torch.float32)

    def test_modules_closed_over(self):
        model = nn.Linear(3, 3)
        params = {k: p.detach() for k, p in model.named_parameters()}
        f = checkpoint(lambda p, x: functional_call(model, p, (x,)).sum())
        assert_close(grad(f)(params, self.x)["bias"], torch.ones(3), torch.float32)
        with pytest.raises(ValueError, match="the module itself"):
            checkpoint(lambda x: model(x))(self.x)


OUTSIDE = {}


class TestRandomNumbers:
    """A recomputed function draws the same numbers, and its first run those of the plain function."""

    @pytest.mark.parametrize("randomness", ["same", "different"])
    def test_under_vmap(self, randomness):
        x = torch.ones(3, 20, **F64)
        f = lambda x: F.dropout(x.exp(), 0.5).square().sum()

        def run(f):
            torch.manual_seed(0)
            return vmap(lambda x: jvp(grad(f), (x,), (x,)), randomness=randomness)(x)

        assert_close(run(checkpoint(f)), run(f))
        g, _ = run(checkpoint(f))
        assert torch.equal(g[0], g[1]) == (randomness == "same")

    def test_a_vmap_that_came_later_draws_nothing_anew(self):
        """The whole Jacobian is that of one draw."""
        torch.manual_seed(0)
        jacobian = jacrev(checkpoint(lambda x: F.dropout(x, 0.5)))(torch.ones(50, **F64))
        kept = jacobian.diagonal()
        assert set(kept.tolist()) == {0.0, 2.0}
        assert_close(jacobian, torch.diag(kept))

    def test_error_randomness_stays_an_error(self):
        with pytest.raises(RuntimeError, match="randomness"):
            vmap(checkpoint(lambda x: F.dropout(x, 0.5)))(torch.ones(2, 3))

    def test_a_vmap_that_maps_no_argument(self):
        x = torch.ones(3)
        with pytest.raises(NotImplementedError, match=r"a vmap that maps none of its arguments; pass one that is"):
            vmap(lambda y: y * checkpoint(lambda x: F.dropout(x, 0.5))(x), randomness="different")(torch.ones(2, 3))

    def test_the_generator_goes_on_as_without(self):
        x = torch.ones(5, requires_grad=True)
        torch.manual_seed(0)
        F.dropout(x, 0.5)
        want = torch.rand(3)
        torch.manual_seed(0)
        out = checkpoint(lambda x: F.dropout(x, 0.5))(x)
        out.sum().backward()
        assert torch.equal(torch.rand(3), want)
        assert torch.equal(x.grad, out)

    def test_attention_dropout(self):
        q = torch.randn(1, 2, 5, 4, **F64)
        f = lambda q: sdpa(q, q, q, dropout_p=0.5).square().sum()
        torch.manual_seed(0)
        want = jvp(grad(f), (q,), (q,))
        torch.manual_seed(0)
        assert_close(jvp(grad(checkpoint(f)), (q,), (q,)), want)

    def test_without_their_state_they_differ(self):
        """Without ``preserve_rng_state``, the numbers differ."""
        x = torch.ones(100, requires_grad=True)
        out = checkpoint(lambda x: F.dropout(x, 0.5), preserve_rng_state=False)(x)
        out.sum().backward()
        assert not torch.equal(x.grad, out)


class TestSurroundings:
    def test_autocast(self):
        w = torch.randn(4, 4, requires_grad=True)
        x = torch.randn(3, 4)

        def run(f):
            with torch.autocast("cpu", torch.bfloat16):
                out = f(w, x)
            return out, *torch.autograd.grad(out.float().sum(), w)

        f = lambda w, x: (x @ w).sin() @ w
        (got, got_grad), (want, want_grad) = run(checkpoint(f)), run(f)
        assert got.dtype == torch.bfloat16
        assert torch.equal(got, want)
        assert torch.equal(got_grad, want_grad)

    def test_backend_of_a_block(self):
        import metaattn

        asked = []

        def f(q):
            asked.append(metaattn.explain(q, q, q).forward[0])
            return sdpa(q, q, q)

        q = torch.randn(1, 1, 4, 4, requires_grad=True)
        with metaattn.use_backend("reference"):
            out = checkpoint(f)(q)
        out.sum().backward()
        assert asked == ["reference", "reference"]

    def test_changed_arguments_are_refused(self):
        x = torch.ones(3)
        with pytest.raises(ValueError, match="changed an argument"):
            checkpoint(lambda x: x.add_(1).sin())(x)


class TestTracing:
    def test_replays_exactly(self):
        x, t = _inputs(), _inputs(2)
        f = lambda x, t: jvp(grad(lambda *x: checkpoint(smooth)(*x)[0].sum(), (0, 1, 2)), x, t)
        assert_close(make_fx(f)(t, x)(x, t), f(x, t))

    def test_random_numbers_are_refused(self):
        with pytest.raises(NotImplementedError, match="which a graph of make_fx cannot draw again"):
            make_fx(grad(lambda x: checkpoint(lambda x: F.dropout(x, 0.5))(x).sum()))(torch.ones(3))

    def test_compiled_equals_eager(self):
        x, t = _inputs(), _inputs(2)
        f = lambda x, t: jvp(grad(lambda *x: checkpoint(smooth)(*x)[0].sum(), (0, 1, 2)), x, t)
        assert_close(torch.compile(f, backend="aot_eager", fullgraph=True)(x, t), f(x, t))
