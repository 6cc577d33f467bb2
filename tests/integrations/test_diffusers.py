"""Models of diffusers with random weights: the derivatives of consistency models and MeanFlow, against dense autodiff.

The oracle is the same model in float64, with attention and layer norm in elementary operations of PyTorch.
"""

import doctest
import sys
from pathlib import Path

import pytest
import torch
from torch.func import functional_call, grad, jvp
from torch.nn import functional as F

from tests.helpers import assert_close, dense, error, python_blocks

diffusers = pytest.importorskip("diffusers")

import metaattn.integrations.diffusers  # noqa: E402
from metaattn.integrations.diffusers import checkpoint, differentiable  # noqa: E402

PAGE = Path(__file__).parents[2] / "docs" / "integrations" / "diffusers.md"


def normal(*shape):
    return torch.randn(shape, dtype=torch.float64)


def dit():
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=6,
        in_channels=2,
        num_layers=2,
        sample_size=4,
        num_embeds_ada_norm=10,
    )
    labels = torch.tensor([1, 3])
    return model, (2, 2, 4, 4), lambda m, x, t: m(x, timestep=t, class_labels=labels).sample


def flux():
    model = diffusers.FluxTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=6,
        pooled_projection_dim=6,
        axes_dims_rope=(2, 2, 4),
    )
    text, pooled = normal(2, 3, 6), normal(2, 6)
    places = torch.cartesian_prod(torch.zeros(1), torch.arange(3.0), torch.arange(3.0))
    ids = {"img_ids": places, "txt_ids": torch.zeros(3, 3)}
    call = lambda m, x, t: m(x, encoder_hidden_states=text, pooled_projections=pooled, timestep=t, **ids).sample
    return model, (2, 9, 4), call


def sd3():
    model = diffusers.SD3Transformer2DModel(
        sample_size=4,
        patch_size=2,
        in_channels=2,
        out_channels=2,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=6,
        caption_projection_dim=16,
        pooled_projection_dim=6,
        pos_embed_max_size=4,
        qk_norm="rms_norm",
    )
    text, pooled = normal(2, 3, 6), normal(2, 6)
    call = lambda m, x, t: m(x, encoder_hidden_states=text, pooled_projections=pooled, timestep=t).sample
    return model, (2, 2, 4, 4), call


def unet():
    model = diffusers.UNet2DConditionModel(
        sample_size=4,
        in_channels=2,
        out_channels=2,
        layers_per_block=1,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=6,
        attention_head_dim=4,
    )
    text = normal(2, 3, 6)
    return model, (2, 2, 4, 4), lambda m, x, t: m(x, t, encoder_hidden_states=text).sample


class Problem:
    """A model without zero weights, a sample, a time and their tangents."""

    def __init__(self, make):
        self.model, shape, self.call = make()
        self.model.double().eval()  # evaluation, because training drops labels
        for p in self.model.parameters():
            torch.nn.init.normal_(p, std=0.2)  # many are initialised to zero
        self.params = dict(self.model.named_parameters())
        self.at = normal(*shape), torch.tensor([0.9, 2.1], dtype=torch.float64)
        self.along = normal(*shape), torch.ones(2, dtype=torch.float64)

    def jvp(self, model=None):
        return jvp(lambda x, t: self.call(model or self.model, x, t), self.at, self.along)

    def loss(self, stop_gradient, model=None):
        """MeanFlow's loss, with the interval 1/2."""
        u, du = self.jvp(model)
        target = self.along[0] - 0.5 * du
        return (u - (target.detach() if stop_gradient else target)).square().mean()

    def gradient(self, stop_gradient):
        loss = self.loss(stop_gradient)
        return torch.autograd.grad(loss, list(self.params.values()), allow_unused=True)

    def gradient_by_func(self, stop_gradient):
        """The same gradient by ``torch.func.grad``."""

        def loss(params):
            return self.loss(stop_gradient, lambda *args, **kwargs: functional_call(self.model, params, args, kwargs))

        return tuple(grad(loss)(self.params).values())


@pytest.fixture(params=[dit, flux, sd3, unet], ids=lambda make: make.__name__)
def problem(request):
    return Problem(request.param)


@pytest.fixture
def oracle(monkeypatch):
    """Run a function with attention and layer norm in elementary operations."""

    def attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
        assert dropout_p == 0
        return dense(query, key, value, attn_mask, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa)[0]

    def layer_norm(x, shape, weight=None, bias=None, eps=1e-5):
        assert len(shape) == 1
        centred = x - x.mean(-1, keepdim=True)
        x = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
        x = x if weight is None else x * weight
        return x if bias is None else x + bias

    def run(function, *args):
        with monkeypatch.context() as m:
            m.setattr(F, "scaled_dot_product_attention", attention)
            m.setattr(F, "layer_norm", layer_norm)
            return function(*args)

    return run


def test_jvp_in_sample_and_time(problem, oracle):
    with pytest.raises(NotImplementedError, match="forward AD"):
        problem.jvp()  # PyTorch's own attention
    with differentiable(problem.model):
        got = problem.jvp()
    assert got[1].norm() > 1e-3
    assert_close(got, oracle(problem.jvp))


@pytest.mark.parametrize("stop_gradient", [True, False])
def test_training_through_the_jvp(problem, oracle, stop_gradient):
    """MeanFlow's gradient, and the second-order gradient without the stop-gradient."""
    with differentiable(problem.model):
        got = problem.gradient(stop_gradient)
    want = oracle(problem.gradient, stop_gradient)
    assert [g is None for g in got] == [w is None for w in want]
    assert_close(got, want)


def test_under_torch_func_grad(oracle):
    problem = Problem(dit)
    with differentiable(problem.model, backend="blockwise"):
        got = problem.gradient_by_func(False)
    assert_close(got, oracle(problem.gradient_by_func, False))


def test_replacing_only_attention_is_not_enough(oracle, monkeypatch):
    """The gradient is silently wrong if only attention is replaced; norms must be replaced too."""
    problem = Problem(dit)
    want = oracle(problem.gradient, False)
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, k, v, **_: dense(q, k, v)[0])
    wrong = [g for g in problem.gradient(False) if g is not None]
    assert error(wrong, [w for w in want if w is not None]) > 0.1


@pytest.mark.parametrize("make", [dit, flux, unet])
@pytest.mark.parametrize("inside", [True, False], ids=["backward inside", "backward after"])
def test_activation_checkpointing(make, inside):
    problem = Problem(make)
    params = list(problem.params.values())
    with differentiable(problem.model):
        want = problem.gradient(False)
    problem.model.enable_gradient_checkpointing(checkpoint)
    seen = []
    blocks = [m for m in problem.model.modules() if isinstance(m, torch.nn.LayerNorm)]
    hooks = [m.register_forward_hook(lambda *_: seen.append(1)) for m in blocks]
    with differentiable(problem.model):
        loss = problem.loss(False)
        forward = len(seen)
        got = torch.autograd.grad(loss, params, allow_unused=True) if inside else None
    got = got if inside else torch.autograd.grad(loss, params, allow_unused=True)
    for hook in hooks:
        hook.remove()
    assert len(seen) > forward  # something was computed again
    # Flux normalises queries and keys in float32, whatever the dtype of the model.
    assert_close(got, want, torch.float32 if make is flux else torch.float64)


def test_training_with_dropout_of_labels():
    """Checkpointed blocks draw the same random numbers when they are computed again."""
    problem = Problem(dit)
    problem.model.train()
    losses = []
    for how in (None, checkpoint):
        if how:
            problem.model.enable_gradient_checkpointing(how)
        torch.manual_seed(3)
        with differentiable(problem.model):
            losses.append(problem.gradient(False))
    assert_close(losses[1], losses[0])


def test_the_models_settings_are_checked():
    model = flux()[0]
    model.enable_gradient_checkpointing()
    with pytest.raises(ValueError, match=r"call model.enable_gradient_checkpointing\(metaattn"), differentiable(model):
        pass
    model.disable_gradient_checkpointing()
    with diffusers.attention_backend("native"):  # set_attention_backend also sets it for all models
        model.set_attention_backend("flex")
        with pytest.raises(ValueError, match=r"'native'; .*attn has 'flex'; call model.reset"), differentiable(model):
            pass
    model.reset_attention_backend()
    model.transformer_blocks[0].attn.processor._parallel_config = object()
    with pytest.raises(ValueError, match=r"attn is set up for context parallelism"), differentiable(model):
        pass
    with pytest.raises(ValueError, match="backend"), differentiable(flux()[0], backend="flash"):
        pass


def test_another_backend_that_is_active_waits_outside():
    problem = Problem(flux)
    with differentiable(problem.model):
        want = problem.jvp()
    with diffusers.attention_backend("flex"), differentiable(problem.model):
        assert_close(problem.jvp(), want)


def test_without_diffusers(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with (
        pytest.raises(ImportError, match=r'-c requirements-integrations.txt -e "\.\[diffusers\]"'),
        differentiable(torch.nn.Linear(1, 1)),
    ):
        pass


def test_examples():
    assert doctest.testmod(metaattn.integrations.diffusers).failed == 0


def test_page():
    """MeanFlow learns: the loss falls, and one step makes samples of the size of the data."""
    session = {}
    for block in python_blocks(PAGE):
        exec(block, session)
    losses, samples, data = session["losses"], session["samples"], session["stripes"](100)
    assert sum(losses[-10:]) < 0.3 * sum(losses[:10])
    assert (samples - samples.mean(0)).square().mean() < 0.2  # noise would have 1
    assert (samples.mean(0) - data.mean(0)).square().mean() < 0.1 * data.square().mean()
    assert all(p.grad.isfinite().all() for p in session["model"].parameters() if p.grad is not None)
