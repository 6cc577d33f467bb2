"""Replacement of PyTorch's attention: in models, by every name, with every derivative, and inside other functions."""

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.func import grad, jvp, vmap
from torch.nn import functional as F
from torch.nn.functional import scaled_dot_product_attention as imported_before
from torch.utils.checkpoint import checkpoint

import metaattn
from tests.helpers import assert_close, dense, python_blocks
from tests.integrations.models import DERIVATIVES, F64, MODELS, dense_pytorch, encoder, loss_of

ROOT = Path(__file__).parents[2]
X, T = (torch.randn(2, 4, 5, 8, generator=torch.Generator().manual_seed(i), **F64) for i in range(2))


def _self(attention):
    return lambda x: attention(x, x, x)


def _dense(x):
    return dense(x, x, x)[0]


def _hvp(f, x=X):
    return jvp(grad(lambda x: f(x).sin().sum()), (x,), (T,))[1]


class TestProgramsThatFail:
    """Two typical programs, without and with replace_sdpa."""

    def test_double_backward(self):
        """Gradient penalty on the input of an encoder."""
        model = encoder()
        x = torch.randn(2, 4, 8, **F64)

        def penalty():
            inputs = x.clone().requires_grad_()
            (g,) = torch.autograd.grad(model(inputs).sum(), inputs, create_graph=True)
            model.zero_grad()
            g.square().sum().backward()
            return [p.grad.clone() for p in model.parameters() if p.grad is not None]

        with pytest.raises(
            RuntimeError,
            match=r"derivative for aten::_scaled_dot_product_flash_attention\w*_backward is not implemented",
        ):
            penalty()
        with metaattn.replace_sdpa():
            got = penalty()
        with dense_pytorch():
            want = penalty()
        assert_close(got, want)

    def test_forward_mode(self):
        """A jvp of a model that calls the function directly."""
        project = nn.Linear(8, 24, **F64)

        def model(x):
            q, k, v = project(x).chunk(3, -1)
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)

        with pytest.raises(
            NotImplementedError, match=r"Trying to use forward AD with _scaled_dot_product_flash_attention"
        ):
            jvp(model, (X,), (T,))
        with metaattn.replace_sdpa():
            got = jvp(model, (X,), (T,))
        q, k, v = project(X).chunk(3, -1)
        q_t, k_t, v_t = (T @ project.weight.mT).chunk(3, -1)
        want = jvp(lambda q, k, v: dense(q, k, v, is_causal=True)[0], (q, k, v), (q_t, k_t, v_t))
        assert_close(got, want)


@pytest.mark.parametrize("derivative", DERIVATIVES)
@pytest.mark.parametrize("name", MODELS)
def test_models(name, derivative):
    """Derivatives of all parameters and inputs, against PyTorch's dense attention in the same model."""
    loss, point = loss_of(name)
    ours, oracle = DERIVATIVES[derivative]
    with metaattn.replace_sdpa():
        got = ours(loss, point)
    with dense_pytorch():
        want = oracle(loss, point)
    assert_close(got, want)


@pytest.mark.parametrize("name", ["encoder padded", "encoder norm first"])
def test_models_in_training(name):
    loss, point = loss_of(name, training=True)
    ours, oracle = DERIVATIVES["forward over reverse"]
    with metaattn.replace_sdpa():
        got = ours(loss, point)
    with dense_pytorch():
        assert_close(got, oracle(loss, point))


CALLS = {
    "attribute": lambda x: F.scaled_dot_product_attention(x, x, x),
    "imported before": _self(imported_before),
    "torch._C": _self(torch._C._nn.scaled_dot_product_attention),
    "aten": _self(torch.ops.aten.scaled_dot_product_attention),
    "aten overload": _self(torch.ops.aten.scaled_dot_product_attention.default),
    "keywords": lambda x: F.scaled_dot_product_attention(query=x, key=x, value=x, attn_mask=None, dropout_p=0.0),
}


@pytest.mark.parametrize("call", CALLS)
def test_every_name_is_reached(call, used):
    f = CALLS[call]
    with metaattn.replace_sdpa():
        assert_close(_hvp(f), _hvp(_dense))
        assert_close(vmap(f)(X), _dense(X))
    assert used
    used.clear()
    f(X)
    assert not used


@pytest.mark.parametrize(
    "options",
    [
        {"is_causal": True},
        {"attn_mask": torch.linspace(-2, 2, 15, **F64).view(5, 3)},
        {"attn_mask": torch.arange(15).view(5, 3) % 4 > 0, "scale": 0.3},
        {"enable_gqa": True},
        {"enable_gqa": True, "is_causal": True, "scale": 2.0},
    ],
    ids=str,
)
@pytest.mark.parametrize("dims", [3, 4])
def test_parameters_mean_what_they_mean(options, dims):
    """Values as in PyTorch (causal from the top left with fewer keys than queries), derivatives of the formula."""
    heads = 2 if options.get("enable_gqa") else 4
    q, k, v = (t[(0,) * (4 - dims)] for t in (X, X[:, :heads, :3].cos(), X[:, :heads, :3].sin()))
    with metaattn.replace_sdpa():
        got = F.scaled_dot_product_attention(q, k, v, **options)
        product = _hvp(lambda q: F.scaled_dot_product_attention(q, k, v, **options), q) if dims == 4 else None
    assert_close(got, F.scaled_dot_product_attention(q, k, v, **options))
    assert_close(got, dense(q, k, v, **options)[0])
    if product is not None:
        assert_close(product, _hvp(lambda q: dense(q, k, v, **options)[0], q))


def test_dropout_is_drawn_as_ours():
    torch.manual_seed(3)
    want = metaattn.sdpa(X, X, X, dropout_p=0.5)
    torch.manual_seed(3)
    with metaattn.replace_sdpa():
        got = F.scaled_dot_product_attention(X, X, X, dropout_p=0.5)
    assert torch.equal(got, want)
    assert not torch.equal(got, metaattn.sdpa(X, X, X))


@pytest.mark.parametrize("mask", [None, torch.float32, torch.bfloat16])
def test_autocast(mask):
    """Value and derivative have the dtype of PyTorch's result."""
    x = X.float()
    mask = None if mask is None else torch.linspace(-1, 1, 25).view(5, 5).to(mask)
    with torch.autocast("cpu", torch.bfloat16):
        want = F.scaled_dot_product_attention(x, x, x, mask)
        with metaattn.replace_sdpa():
            got, tangent = jvp(lambda x: F.scaled_dot_product_attention(x, x, x, mask), (x,), (T.float(),))
    assert got.dtype == tangent.dtype == want.dtype == torch.bfloat16
    assert_close(got, want, torch.bfloat16)
    exact = jvp(lambda x: dense(x, x, x, mask if mask is None else mask.double())[0], (X,), (T,))[1]
    assert_close(tangent, exact, torch.bfloat16)


def test_attention_with_weights_is_left_as_it_is(used):
    """PyTorch computes it in elementary operations, which have their derivatives."""
    loss, point = loss_of("attention weights")
    with metaattn.replace_sdpa():
        loss(point)
    assert not used


def test_the_fast_paths_have_no_forward_mode():
    """They are disabled in a block, because a jvp of an encoder in evaluation would raise."""
    model = encoder().eval()
    parameters = {k: p.detach() for k, p in model.named_parameters()}
    f = lambda x: torch.func.functional_call(model, parameters, x)
    with pytest.raises(NotImplementedError, match="forward AD with aten::_transformer_encoder_layer_fwd"):
        jvp(f, (X[0],), (T[0],))
    with metaattn.replace_sdpa():
        got = jvp(f, (X[0],), (T[0],))
    with dense_pytorch():
        assert_close(got, jvp(f, (X[0],), (T[0],)))


class TestWithinOtherFunctions:
    """PyTorch disables a mode inside the functions that the mode handles."""

    @pytest.mark.parametrize("reentrant", [False, True])
    @pytest.mark.parametrize("backward", ["method", "backward", "grad"])
    def test_what_a_checkpoint_computes_again(self, backward, reentrant, used):
        x = X.clone().requires_grad_()
        with metaattn.replace_sdpa():
            loss = checkpoint(lambda x: F.scaled_dot_product_attention(x, x, x).sin(), x, use_reentrant=reentrant).sum()
            if backward == "method":
                loss.backward()
            elif backward == "backward" or reentrant:  # a reentrant checkpoint rejects torch.autograd.grad
                torch.autograd.backward(loss)
            else:
                (x.grad,) = torch.autograd.grad(loss, x)
        assert len(used) == 2
        assert_close(x.grad, grad(lambda x: _dense(x).sin().sum())(X))

    def test_our_checkpoint(self):
        with metaattn.replace_sdpa():
            assert_close(_hvp(metaattn.meta.checkpoint(CALLS["attribute"])), _hvp(_dense))

    def test_overridable_functions_of_pytorch(self):
        """Only multi_head_attention_forward hides a call of attention in Python."""
        functions = {f for fs in torch.overrides.get_overridable_functions().values() for f in fs}
        python = [f for f in functions if hasattr(f, "__code__")]
        assert len(python) > 50
        hiding = [f for f in python if "scaled_dot_product_attention" in f.__code__.co_names]
        assert hiding == [F.multi_head_attention_forward]


def test_page():
    """Run the examples of the page, in order, in one session."""
    blocks = python_blocks(ROOT / "docs/integrations/torch_sdpa.md")
    session = {}
    for block in blocks:
        exec(block, session)
    assert session["tangent"].shape == session["out"].shape
    assert session["product"].shape == session["x"].shape
    assert F.scaled_dot_product_attention is torch._C._nn.scaled_dot_product_attention
