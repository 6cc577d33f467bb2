"""Transformer: each transform of the whole model against the same model on the dense formula of attention."""

import copy

import pytest
import torch
from torch.func import functional_call, grad, hessian, jacrev, jvp, vmap

import metaattn
from metaattn import Transformer, TransformerConfig
from tests.helpers import assert_close, dense

TOKENS = torch.randint(0, 7, (2, 5), generator=torch.Generator().manual_seed(0))
VECTORS = torch.randn(2, 5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(2, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

SMALL = {"dim": 8, "heads": 2, "depth": 2}
MODELS = {
    "tokens": ({"input": "token", "vocab_size": 7, "output": "per_token", "out_features": 7, "causal": True}, TOKENS),
    "patches": (
        {
            "input": "patch",
            "image_size": 4,
            "patch_size": 2,
            "output": "pooled",
            "out_features": 3,
            "position": "learned",
        },
        IMAGES,
    ),
    "vectors": ({"input": "continuous", "in_features": 3, "activation": "swiglu", "norm": "rms"}, VECTORS),
    "features": (
        {
            "input": "features",
            "in_features": 3,
            "feature_tokens": 2,
            "output": "pooled",
            "out_features": 2,
            "position": "none",
        },
        VECTORS,
    ),
    "plain": (
        {"input": "continuous", "in_features": 3, "bias": False, "norm_affine": False, "output": "per_token"}
        | {"out_features": 2},
        VECTORS,
    ),
    "gqa": (
        {"input": "continuous", "in_features": 3, "heads": 4, "kv_heads": 2, "window": (2, 0), "output": "pooled"}
        | {"out_features": 2, "causal": True},
        VECTORS,
    ),
}


def _model(name, dtype=torch.float64, **changes):
    torch.manual_seed(0)
    options, x = MODELS[name]
    model = Transformer(**{**SMALL, **options, **changes}).to(dtype)
    for p in model.parameters():  # a head of zeros would hide the rest of the model
        torch.nn.init.normal_(p, std=0.3)
    return model, x


def _dense_sdpa(query, key, value, *, dropout_p, is_causal, enable_gqa, window, backend):
    assert dropout_p == 0
    return dense(query, key, value, is_causal=is_causal, enable_gqa=enable_gqa, window=window)[0]


def _loss(model, x):
    def loss(params):
        return functional_call(model, params, (x,)).sin().square().sum()

    return loss


def _grad_grad(f, p, t):
    def along(p):
        return sum((a * b).sum() for a, b in zip(grad(f)(p).values(), t.values(), strict=True))

    return grad(along)(p)


def _two(p, t):
    return {k: torch.stack([a, a + t[k]]) for k, a in p.items()}


TRANSFORMS = {
    "value": lambda f, p, t: f(p),
    "grad": lambda f, p, t: grad(f)(p),
    "jvp": lambda f, p, t: jvp(f, (p,), (t,))[1],
    "jvp_grad": lambda f, p, t: jvp(grad(f), (p,), (t,))[1],
    "grad_grad": _grad_grad,
    "jvp_jvp": lambda f, p, t: jvp(lambda p: jvp(f, (p,), (t,))[1], (p,), (t,))[1],
    "vmap_grad": lambda f, p, t: vmap(grad(f), randomness="different")(_two(p, t)),
    "vmap_hvp": lambda f, p, t: vmap(lambda p: jvp(grad(f), (p,), (t,))[1], randomness="different")(_two(p, t)),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("name", MODELS)
def test_transforms_over_the_model(name, transform, backend):
    model, x = _model(name, backend=backend)
    params = {k: p.detach() for k, p in model.named_parameters()}
    t = {k: 0.5 * torch.randn_like(p) for k, p in params.items()}
    written_out, _ = _model(name, attention=_dense_sdpa)
    want = TRANSFORMS[transform](_loss(written_out, x), params, t)
    assert_close(TRANSFORMS[transform](_loss(model, x), params, t), want, factor=10)


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("name", MODELS)
def test_rematerialised_equals_plain(name, transform):
    """With dropout: the random numbers drawn again are those of the first pass."""
    drops = {"dropout": 0.3, "attention_dropout": 0.3}
    (plain, x), (ours, _) = _model(name, **drops), _model(name, remat=True, **drops)
    params = {k: p.detach() for k, p in plain.named_parameters()}
    t = {k: 0.5 * torch.randn_like(p) for k, p in params.items()}

    def loss(model):
        def seeded(params):
            torch.manual_seed(0)
            return _loss(model, x)(params)

        return seeded

    run = TRANSFORMS[transform]
    assert_close(run(loss(ours), params, t), run(loss(plain), params, t), factor=10)


@pytest.mark.parametrize("name", MODELS)
def test_rematerialised_meta_gradients_by_autograd(name):
    """Outermost derivative by autograd, inner derivative by torch.func under vmap."""
    (plain, x), (ours, _) = _model(name), _model(name, remat=True)
    xs = torch.stack([x, x.flip(1)])

    def meta_gradient(model):
        params = dict(model.named_parameters())

        def task(x):
            g = grad(_loss(model, x))(params)
            return _loss(model, x)({k: p - 0.1 * g[k] for k, p in params.items()})

        return torch.autograd.grad(vmap(task)(xs).sum(), list(params.values()))

    assert_close(meta_gradient(ours), meta_gradient(plain), factor=10)


@pytest.mark.parametrize("name", MODELS)
def test_meta_gradients_under_vmap(name, backend):
    """Every operation of the model under vmap and an outer derivative, against a loop over tasks."""
    model, x = _model(name, backend=backend)
    params = {k: p.detach() for k, p in model.named_parameters()}
    xs = torch.stack([x, x.flip(1), x.roll(1, 1)])

    def task(params, x):
        loss = _loss(model, x)
        g = grad(loss)(params)
        out = functional_call(model, {k: p - 0.1 * g[k] for k, p in params.items()}, (x,)).flatten(0, -2)
        return torch.nn.functional.cross_entropy(out, torch.arange(len(out)) % out.shape[-1])

    mapped = grad(lambda p: vmap(task, (None, 0))(p, xs).sum())(params)
    looped = grad(lambda p: sum(task(p, x) for x in xs))(params)
    assert_close(mapped, looped, factor=10)


def test_hessian_of_a_whole_model(backend):
    model, x = _model("vectors", backend=backend, dim=2, heads=1, depth=1)
    params = {k: p.detach() for k, p in model.named_parameters()}
    written_out, _ = _model("vectors", attention=_dense_sdpa, dim=2, heads=1, depth=1)
    want = jacrev(grad(_loss(written_out, x[:1, :3])))(params)
    assert_close(hessian(_loss(model, x[:1, :3]))(params), want, factor=10)


@pytest.mark.parametrize("name", sorted(MODELS.keys() - {"tokens"}))
def test_derivatives_of_the_input(name, backend):
    (model, x), (written_out, _) = _model(name, backend=backend), _model(name, attention=_dense_sdpa)
    hvp = lambda m: jvp(grad(lambda x: m(x).sin().sum()), (x,), (x.cos(),))[1]
    assert_close(hvp(model), hvp(written_out))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_dtypes(name, dtype):
    """Value, gradient and Hessian-vector product stay in the dtype, near float64."""
    model, x = _model(name)
    narrow = copy.deepcopy(model).to(dtype)
    params = {k: p.detach() for k, p in model.named_parameters()}
    t = {k: torch.randn_like(p) for k, p in params.items()}
    cast = lambda tree: {k: p.to(dtype) for k, p in tree.items()}
    x16 = x.to(dtype) if x.is_floating_point() else x
    assert narrow(x16).dtype == dtype
    _, got = jvp(grad(_loss(narrow, x16)), (cast(params),), (cast(t),))
    assert {g.dtype for g in got.values()} == {dtype}
    want = jvp(grad(_loss(model, x)), (params,), (t,))[1]
    flat = lambda tree: torch.cat([g.double().flatten() for g in tree.values()])
    error = (flat(got) - flat(want)).norm() / flat(want).norm()
    assert error < {torch.float32: 1e-6, torch.bfloat16: 0.03}[dtype]  # measured: 4e-7 and 0.016


@pytest.mark.parametrize("name", MODELS)
def test_leading_dimensions(name):
    model, x = _model(name)
    assert_close(model(torch.stack([x, x])), torch.stack([model(x)] * 2))
    assert_close(model(x[0]), model(x)[0])


def test_shapes():
    assert Transformer(input="token", vocab_size=7)(TOKENS).shape == (2, 5, 64)
    colour = Transformer(input="patch", image_size=8, patch_size=4, channels=3, output="per_token", out_features=5)
    assert colour(torch.randn(2, 3, 8, 8)).shape == (2, 4, 5)


def test_patches_are_patches():
    """Each token sees the pixels of one patch, row by row."""
    model = Transformer(input="patch", image_size=4, patch_size=2, dim=4, heads=1)
    image = torch.arange(16.0).view(4, 4)
    rows = model.embed._patches(image)
    assert rows.tolist() == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]
    colour = Transformer(input="patch", image_size=4, patch_size=2, channels=2, dim=4, heads=1)
    assert colour.embed._patches(torch.stack([image, -image]))[1].tolist() == [2, 3, 6, 7, -2, -3, -6, -7]


def test_causal_models_do_not_look_ahead():
    model, x = _model("tokens")
    changed = x.clone()
    changed[:, 3:] = 0
    assert torch.equal(model(x)[:, :3], model(changed)[:, :3])
    assert not torch.equal(model(x)[:, 3:], model(changed)[:, 3:])


@pytest.mark.parametrize("position", ["rope", "learned", "none"])
def test_positions(position):
    """With positions, the mean of the tokens depends on their order; without, it does not."""
    model, x = _model("vectors", position=position, max_length=5, output="pooled", out_features=2)
    same = torch.allclose(model(x), model(x.flip(1)))
    assert same == (position == "none")


def test_dropout_draws_in_training_only():
    model, x = _model("vectors", dropout=0.3, attention_dropout=0.3)
    assert not torch.equal(model(x), model(x))
    torch.manual_seed(0)
    a = model(x)
    torch.manual_seed(0)
    assert torch.equal(model(x), a)
    model.eval()
    assert torch.equal(model(x), model(x))


def test_dropout_is_consistent_across_modes():
    model, x = _model("vectors", dropout=0.3, attention_dropout=0.3)
    params = {k: p.detach() for k, p in model.named_parameters()}
    t = {k: torch.randn_like(p) for k, p in params.items()}

    def loss(p):
        torch.manual_seed(1)
        return _loss(model, x)(p)

    h = 1e-6
    ahead, behind = ({k: p + s * h * t[k] for k, p in params.items()} for s in (1, -1))
    slope = (loss(ahead) - loss(behind)) / (2 * h)
    assert_close(jvp(loss, (params,), (t,))[1], slope, torch.float32)
    assert_close(sum((a * t[k]).sum() for k, a in grad(loss)(params).items()), slope, torch.float32)


def test_the_head_starts_at_zero():
    assert (Transformer(input="token", vocab_size=7, output="pooled", out_features=3)(TOKENS) == 0).all()


def test_biases_and_norm_weights_are_optional():
    plain = Transformer(input="features", in_features=3, bias=False, norm_affine=False)
    assert {p.dim() for p in plain.parameters()} == {2}
    torch.testing.assert_close(plain(torch.zeros(2, 3)), torch.zeros(2, 3, 64))
    names = [name for name, _ in Transformer(input="token", vocab_size=3, depth=1, bias=False).named_parameters()]
    assert "norm.weight" in names
    assert not [name for name in names if "bias" in name]


def test_config_and_changes():
    config = TransformerConfig(input="token", vocab_size=7)
    assert Transformer(config, depth=3).config.depth == 3
    assert metaattn.TransformerConfig is TransformerConfig


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input": "text"}, "input must be one of 'token', 'patch', .*; got 'text'"),
        ({"activation": "relu"}, "activation must be"),
        ({"dim": 10, "heads": 4}, "heads must be a divisor of dim, 10; got 4"),
        ({"heads": 4, "kv_heads": 3}, "kv_heads must be a divisor of heads, 4; got 3"),
        ({"dim": 12, "heads": 4}, "dim / heads must be even for position='rope'; got 3"),
        ({"depth": 0}, "depth must be at least 1; got 0"),
        ({"dropout": 1.0}, "dropout must be at least 0 and below 1; got 1.0"),
        ({"vocab_size": None}, "vocab_size must be given for input='token'; got None"),
        ({"vocab_size": 0}, "vocab_size must be at least 1; got 0"),
        ({"output": "pooled"}, "out_features must be given for output='pooled'; got None"),
        ({"input": "patch", "image_size": 28}, "patch_size must be given for input='patch'; got None"),
        ({"position": "learned", "max_length": 0}, "max_length must be at least 1; got 0"),
        ({"position": "learned"}, "max_length must be given for position='learned'; got None"),
        (
            {"input": "patch", "image_size": 28, "patch_size": 5},
            "patch_size must be a divisor of image_size, 28; got 5",
        ),
        ({"backend": "foo"}, "backend must be one of .*; got 'foo'"),
        ({"window": (-1, 2)}, r"window .*got \(-1, 2\)"),
        ({"mlp_ratio": 0.0}, "mlp_ratio must be positive"),
        ({"mlp_ratio": float("inf")}, "mlp_ratio must be positive and finite"),
        ({"mlp_ratio": 1e-3}, "large enough for a hidden unit at dim=64; got 0.001"),
    ],
)
def test_config_errors(changes, message):
    with pytest.raises(ValueError, match=message):
        TransformerConfig(**{"vocab_size": 7, **changes})


def test_a_window_is_a_pair():
    with pytest.raises(TypeError, match=r"window must be a pair \(left, right\).*; got 3"):
        Transformer(vocab_size=7, window=3)


@pytest.mark.parametrize(
    ("name", "x", "message"),
    [
        ("tokens", VECTORS, "needs integers; got torch.float64"),
        ("patches", IMAGES[:, :3], r"needs images \[..., 4, 4\]; got \[2, 3, 4\]"),
        ("vectors", VECTORS[..., :2], r"needs size in_features=3 in the last dimension; got \[2, 5, 2\]"),
        ("vectors", VECTORS[0, 0, 0], r"needs size in_features=3 in the last dimension; got \[\]"),
        ("vectors", VECTORS[0, 0], r"input='continuous' needs a sequence of tokens, \[..., length, size\]; got \[3\]"),
    ],
)
def test_input_errors(name, x, message):
    with pytest.raises(ValueError, match=message):
        _model(name)[0](x)


def test_too_long_for_learned_positions():
    model = Transformer(input="token", vocab_size=7, position="learned", max_length=4)
    with pytest.raises(ValueError, match="a sequence must have at most max_length=4 tokens; got 5"):
        model(TOKENS)
