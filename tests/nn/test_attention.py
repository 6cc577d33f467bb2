"""MultiheadAttention against PyTorch's module, in value and in every derivative; and rotary positions."""

import itertools

import pytest
import torch
from torch.func import functional_call, grad, jvp, vmap

import metaattn
from metaattn.nn.attention import rotate, rotation
from tests.helpers import assert_close

F64 = {"dtype": torch.float64}
MODULES = {
    "plain": {},
    "batch_first": {"batch_first": True},
    "no_bias": {"bias": False, "batch_first": True},
    "sizes": {"kdim": 6, "vdim": 10, "batch_first": True},
    "bias_kv": {"add_bias_kv": True, "batch_first": True},
    "zero_attn": {"add_zero_attn": True, "add_bias_kv": True},
}


def _pair(options):
    theirs = torch.nn.MultiheadAttention(8, 2, **options, **F64)
    ours = metaattn.MultiheadAttention(8, 2, **options, **F64)
    for p in theirs.parameters():
        torch.nn.init.normal_(p, std=0.5)
    ours.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    return theirs, ours


def _inputs(options, batch=3):
    sizes = (8, options.get("kdim", 8), options.get("vdim", 8))
    x = [torch.randn(batch, n, d, **F64) for n, d in zip((4, 5, 5), sizes, strict=True)]
    return x if options.get("batch_first") else [t.transpose(0, 1) for t in x]


@pytest.mark.parametrize("name", MODULES)
def test_like_torch(name):
    theirs, ours = _pair(MODULES[name])
    x = _inputs(MODULES[name])
    for average in (True, False):
        assert_close(ours(*x, average_attn_weights=average), theirs(*x, average_attn_weights=average))
    out, weights = ours(*x, need_weights=False)
    assert weights is None
    assert_close(out, theirs(*x, need_weights=False)[0])


def _masks():
    padding = torch.tensor([[0, 0, 0, 0, 0], [0, 0, 0, 1, 1], [0, 1, 0, 0, 0]], dtype=torch.bool)
    mask = torch.ones(4, 5, dtype=torch.bool).triu(2)
    each = torch.rand(6, 4, 5) < 0.3
    paddings = {"none": None, "bool": padding, "float": torch.randn(3, 5, **F64)}
    masks = {
        "none": None,
        "bool": mask,
        "float": torch.randn(4, 5, **F64),
        "each": each,
        "each_float": torch.randn(6, 4, 5, **F64),
    }
    return itertools.product(paddings.items(), masks.items())


@pytest.mark.parametrize(("padding", "mask"), list(_masks()), ids=lambda m: m[0])
@pytest.mark.parametrize("name", ["batch_first", "zero_attn"])
@pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask:UserWarning")
def test_masks(name, padding, mask):
    theirs, ours = _pair(MODULES[name])
    x, masks = _inputs(MODULES[name]), {"key_padding_mask": padding[1], "attn_mask": mask[1]}
    assert_close(ours(*x, **masks), theirs(*x, **masks))


def test_unbatched():
    theirs, ours = _pair({})
    x = [torch.randn(n, 8, **F64) for n in (4, 5, 5)]
    padding = torch.tensor([0, 0, 1, 0, 0], dtype=torch.bool)
    assert_close(ours(*x, key_padding_mask=padding), theirs(*x, key_padding_mask=padding))


def test_is_causal_is_a_hint():
    _, ours = _pair({"batch_first": True})
    x = torch.randn(2, 4, 8, **F64)
    mask = torch.ones(4, 4, dtype=torch.bool).triu(1)
    assert_close(ours(x, x, x, attn_mask=mask, is_causal=True), ours(x, x, x, attn_mask=mask))


def test_a_row_without_keys_is_zero_and_not_nan():
    _, ours = _pair({"batch_first": True})
    x = torch.randn(2, 4, 8, **F64)
    out, weights = ours(x, x, x, key_padding_mask=torch.ones(2, 4, dtype=torch.bool))
    assert_close(out, ours.out_proj.bias.expand(2, 4, 8))
    assert (weights == 0).all()


@pytest.mark.parametrize("weights", [True, False])
def test_derivatives_of_parameters(weights, backend):
    """Hessian-vector products and their vmap, against PyTorch's module on its dense path."""
    theirs, ours = _pair({"batch_first": True})
    ours.backend = backend
    x = torch.randn(3, 4, 8, **F64)
    padding = torch.tensor([[0, 0, 0, 1]] * 3, dtype=torch.bool)
    params = dict(ours.named_parameters())
    t = {k: torch.randn_like(p) for k, p in params.items()}

    def hvp(module):
        def loss(p):
            kwargs = {"key_padding_mask": padding, "need_weights": weights}
            out, w = functional_call(module, p, (x, x, x), kwargs)
            return out.sin().sum() + (w.cos().sum() if weights else 0)

        return lambda p: jvp(grad(loss), (p,), (t,))[1]

    # PyTorch computes attention densely with need_weights; without, its fused attention has no second derivative.
    theirs_out = hvp(theirs)(params) if weights else None
    if theirs_out is None:
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            theirs_out = hvp(theirs)(params)
    assert_close(hvp(ours)(params), theirs_out)
    stacked = {k: torch.stack([p, 1.1 * p]) for k, p in params.items()}
    each = [hvp(ours)({k: p[i] for k, p in stacked.items()}) for i in range(2)]
    assert_close(vmap(hvp(ours))(stacked), {k: torch.stack([e[k] for e in each]) for k in params})


def test_weights_in_16_bits_add_up():
    x = 3 * torch.randn(2, 20, 32)
    mine = metaattn.MultiheadAttention(32, 2, batch_first=True).bfloat16()
    weights = mine(x.bfloat16(), x.bfloat16(), x.bfloat16())[1]
    assert weights.dtype == torch.bfloat16
    assert (weights.float().sum(-1) - 1).abs().max() < 2**-8


def test_dropout_in_training_only():
    _, ours = _pair({"batch_first": True, "dropout": 0.5})
    x = torch.randn(2, 4, 8, **F64)
    assert not torch.equal(ours(x, x, x)[0], ours(x, x, x)[0])
    ours.eval()
    assert torch.equal(ours(x, x, x)[0], ours(x, x, x)[0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"is_causal": True}, "must be passed too; got attn_mask=None"),
        ({"attn_mask": torch.zeros(3, 3)}, r"attn_mask must be \[4, 4\] or \[4, 4, 4\]; got \[3, 3\]"),
        ({"key_padding_mask": torch.zeros(2, 3)}, r"key_padding_mask must be \[2, 4\]; got \[2, 3\]"),
    ],
)
def test_errors(arguments, message):
    x = torch.randn(2, 4, 8)
    with pytest.raises(ValueError, match=message):
        metaattn.MultiheadAttention(8, 2, batch_first=True)(x, x, x, **arguments)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ([(1, 2, 4, 8)] * 3, r"must each have 2 dimensions, or 3 for a batch of sequences; got query \[1, 2, 4, 8\]"),
        ([(8,)] * 3, "must each have 2 dimensions, or 3"),
        ([(2, 4, 8), (4, 8), (4, 8)], "must each have 2 dimensions, or 3"),
        ([(4, 8), (2, 4, 8), (2, 4, 8)], "must each have 2 dimensions, or 3"),
        ([(2, 4, 8), (2, 4, 8), (4, 8)], "must each have 2 dimensions, or 3"),
        ([(2, 4, 6), (2, 4, 8), (2, 4, 8)], r"query must have size 8 in its last dimension; got \[2, 4, 6\]"),
        ([(2, 4, 8), (2, 4, 6), (2, 4, 8)], "key must have size 8"),
        ([(2, 4, 8), (2, 4, 8), (2, 4, 6)], "value must have size 8"),
        (
            [(2, 4, 8), (2, 5, 8), (2, 4, 8)],
            r"the same length, and all three the same batch size, as \[N, length, size\]",
        ),
        ([(1, 4, 8), (2, 5, 8), (2, 5, 8)], "all three the same batch size"),
        ([(4, 8), (5, 8), (4, 8)], "must have the same length"),
    ],
)
def test_shape_errors(shapes, message):
    x = [torch.randn(shape) for shape in shapes]
    with pytest.raises(ValueError, match=message):
        metaattn.MultiheadAttention(8, 2, batch_first=True)(*x)
    with pytest.raises((AssertionError, RuntimeError)):  # PyTorch rejects them too
        torch.nn.MultiheadAttention(8, 2, batch_first=True)(*x)


def test_an_unknown_backend():
    with pytest.raises(ValueError, match=r"backend must be one of .*; got 'trition'"):
        metaattn.MultiheadAttention(8, 2, backend="trition")


def test_the_batch_is_where_batch_first_says():
    x = torch.randn(4, 2, 8)
    assert metaattn.MultiheadAttention(8, 2)(x, x[:3], x[:3])[0].shape == (4, 2, 8)
    with pytest.raises(ValueError, match=r"all three the same batch size, as \[length, N, size\]"):
        metaattn.MultiheadAttention(8, 2)(x, x[:, :1], x[:, :1])


def test_rotation_makes_scores_depend_only_on_distance():
    x, y = torch.randn(2, 1, 8, **F64)
    by = rotation(10, 8, 10000.0, x)
    q, k = rotate(x.expand(10, 8), by), rotate(y.expand(10, 8), by)
    scores = q @ k.mT
    for distance in range(-9, 10):
        d = scores.diagonal(distance)
        assert_close(d, d[:1].expand_as(d))
    assert_close(q.norm(dim=-1), x.norm().expand(10))
