"""Derivatives of Transformers' models on ``metaattn.sdpa``, against their own dense attention.

Tests the layers of _transformers_layers too: layer norms and checkpointed layers.
"""

import copy

import pytest
import torch
from torch.func import functional_call, grad, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx

transformers = pytest.importorskip("transformers")

from metaattn.integrations.transformers import checkpoint_layers, register, replace_layer_norms  # noqa: E402
from tests.helpers import assert_close, error  # noqa: E402
from tests.integrations.transformers_models import IDS, LEFT, ONES, RIGHT, build, logits  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
NAMES = ["llama", "qwen3", "mistral", "gemma3", "gpt_oss", "llama4", "gpt2", "bert", "vit"]


@pytest.fixture(autouse=True)
def _registered(exact_eager):
    register()


def _pair(name):
    return [replace_layer_norms(build(name, implementation)) for implementation in ("metaattn", "eager")]


def _loss(model, **inputs):
    """A loss of the parameters, nonlinear in the logits and independent of padding."""
    shown = inputs.get("attention_mask")

    def loss(state):
        out = logits(model, state, **inputs).sin()
        return (out if shown is None else out * shown[..., None]).sum()

    return loss


def _attention(model):
    """Parameters of attention in all layers: projections, sinks and norms of queries and keys."""
    return {n: p.detach() for n, p in model.named_parameters() if "attn" in n or "attention" in n}


def _directions(state):
    generator = torch.Generator().manual_seed(3)
    return {n: torch.randn(p.shape, generator=generator, dtype=p.dtype) for n, p in state.items()}


@pytest.mark.parametrize("name", NAMES)
def test_hessian_vector_products(name):
    """Hessian-vector products by jvp of grad; padding, if any, is on the left."""
    inputs = {} if name == "vit" else {"attention_mask": LEFT}

    def product(model):
        state = _attention(model)
        return jvp(grad(_loss(model, **inputs)), (state,), (_directions(state),))

    assert_close(*map(product, _pair(name)))


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt_oss", "bert"])
def test_grad_of_grad(name):
    def norm(model):
        loss = _loss(model, attention_mask=RIGHT)
        return grad(lambda state: sum(g.square().sum() for g in grad(loss)(state).values()))(_attention(model))

    assert_close(*map(norm, _pair(name)))


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt_oss", "bert"])
def test_double_backward(name):
    """The gradient of a gradient penalty, by plain autograd."""

    def penalty(model):
        parameters = [p for n, p in model.named_parameters() if n in _attention(model)]
        grads = torch.autograd.grad(_loss(model, attention_mask=RIGHT)({}), parameters, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), parameters)

    assert_close(*map(penalty, _pair(name)))


def test_bias_of_positions():
    """The learned position bias of T5, which is added to the scores."""
    model = build("t5", "eager")
    if not hasattr(transformers.models.t5.modeling_t5, "ALL_ATTENTION_FUNCTIONS"):
        pytest.skip("T5 does not use the attention interface in this release")

    def product(model):
        state = {n: p.detach() for n, p in model.named_parameters() if "relative_attention_bias" in n}
        assert len(state) == 2
        loss = lambda state: logits(model, state, attention_mask=LEFT).sin().sum()
        return jvp(grad(loss), (state,), (_directions(state),))

    assert_close(product(build("t5")), product(model))


def _adapters(model, count, rank=2):
    """A batch of low-rank changes of the query and value projections."""
    names = [n for n, _ in model.named_parameters() if n.endswith(("q_proj.weight", "v_proj.weight"))]
    weights = dict(model.named_parameters())
    generator = torch.Generator().manual_seed(4)
    draw = lambda *shape: torch.randn(count, *shape, generator=generator, dtype=torch.float64)
    return {n: (draw(weights[n].shape[0], rank), draw(rank, weights[n].shape[1])) for n in names}


def _adapted(model, loss):
    weights = {n: p.detach() for n, p in model.named_parameters()}
    return lambda adapters: loss({n: weights[n] + 0.1 * b @ a for n, (b, a) in adapters.items()})


@pytest.mark.parametrize("name", ["llama", "mistral"])
@pytest.mark.parametrize("cache", [False, True])
def test_a_batch_of_adapters(name, cache):
    """LoRA: gradients and Hessian products of all adapters under vmap, against dense attention one by one."""
    ours, eager = _pair(name)
    adapters = _adapters(ours, 3)
    assert len(adapters) == 4

    def both(model):
        f = grad(_adapted(model, _loss(model, attention_mask=LEFT, use_cache=cache)))
        return lambda x: jvp(f, (x,), (x,))

    got = vmap(both(ours))(adapters)
    for i in range(3):
        one = lambda tree, i=i: torch.utils._pytree.tree_map(lambda t: t[i], tree)
        assert_close(one(got), both(eager)(one(adapters)))


@pytest.mark.parametrize("name", ["llama", "mistral", "bert"])
def test_tasks_with_padding_of_their_own(name):
    """Under vmap a mask must not be left out because of its values; Transformers' ``sdpa`` raises here."""
    ours, eager = _pair(name)
    ids, masks = torch.stack((IDS, IDS.flip(1), IDS)), torch.stack((LEFT, RIGHT, ONES))
    state = _attention(ours)
    each = lambda model: lambda i, m: grad(_loss(model, ids=i, attention_mask=m))(state)
    got = vmap(each(ours))(ids, masks)
    for k in range(3):
        assert_close({n: g[k] for n, g in got.items()}, each(eager)(ids[k], masks[k]))


def test_an_error_of_transformers_and_the_mask_that_avoids_it():
    """Transformers looks for packed sequences in the values of positions, unless it gets a mask."""
    model, ids = build("llama"), torch.stack((IDS, IDS.flip(1)))
    positions = torch.arange(9).expand(2, 3, 9).clone()
    run = lambda mask: vmap(lambda i, p: model(i, position_ids=p, attention_mask=mask, use_cache=False).logits)(
        ids, positions
    )
    with pytest.raises(RuntimeError, match="data-dependent control flow"):
        run(None)
    mask = torch.ones(9, 9, dtype=torch.bool).tril()[None, None]
    want = torch.stack([model(i).logits for i in ids])
    assert_close(run(ONES), want)
    assert_close(run(mask), want)
    traced = make_fx(lambda i: model(i, attention_mask=mask, use_cache=False).logits)(ids[0])
    assert_close(traced(ids[1]), want[1])


def test_layer_norms_in_meta_gradients_under_vmap():
    """PyTorch's layer norms are silently wrong here; replaced, they have the same value and right derivatives."""
    name = "bert.encoder.layer.0.attention.output.LayerNorm.weight"
    model = build("bert")
    x = torch.randn(2, 3, 9, 16, dtype=torch.float64)

    def meta(x):
        f = lambda w: functional_call(model, {name: w}, (), {"inputs_embeds": x}).logits.sin().sum()
        return grad(f)(dict(model.named_parameters())[name].detach()).square().sum()

    difference = lambda: error(grad(lambda x: vmap(meta)(x).sum())(x), torch.stack([grad(meta)(t) for t in x]))
    value = logits(model)
    assert difference() > 1e-3
    assert replace_layer_norms(model) is model
    assert difference() < 1e-11
    assert_close(logits(model), value)


@pytest.mark.parametrize("name", ["llama", "mistral", "bert", "vit"])
def test_checkpointed_layers(name):
    """Derivatives of a copy of the checkpointed model agree with those of dense attention."""
    ours, eager = _pair(name)
    names = list(ours.state_dict())
    model = copy.deepcopy(checkpoint_layers(checkpoint_layers(ours)))
    assert list(model.state_dict()) == names
    for p in ours.parameters():
        p.data.zero_()
    inputs = {} if name == "vit" else {"attention_mask": LEFT}
    inputs |= {"use_cache": False} if name in ("llama", "mistral") else {}

    def product(model):
        state = _attention(model)
        return jvp(grad(_loss(model, **inputs)), (state,), (_directions(state),))

    assert_close(*map(product, (model, eager)))


def test_checkpointed_layers_store_little():
    """A backward pass stores the inputs and outputs of a layer, and not its activations."""

    def kept(model):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            logits(model, use_cache=False)
        return sum(sizes)

    assert kept(checkpoint_layers(build("llama"))) < 0.5 * kept(build("llama"))


def test_checkpointed_layers_and_caches():
    """A cache is rejected, because each derivative would fill it again; without derivatives it is allowed."""
    model = checkpoint_layers(build("llama"))
    with pytest.raises(ValueError, match=r"LlamaDecoderLayer is checkpointed .* pass use_cache=False"):
        logits(model)
    options = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(model.generate(IDS, **options), build("llama").generate(IDS, **options))
    with pytest.raises(
        ValueError, match="must have layers of the class GradientCheckpointingLayer; got Linear without any"
    ):
        checkpoint_layers(torch.nn.Linear(2, 2))


def test_pytorch_rejects_checkpointing_of_transformers():
    model = build("llama").train()
    model.gradient_checkpointing_enable()
    with pytest.raises(RuntimeError, match="inside of a function being transformed"):
        grad(_loss(model, use_cache=False))(_attention(model))


def test_mixtures_of_experts():
    """Derivatives of Transformers' implementations of experts, as the page lists them."""
    ids = torch.stack((IDS, IDS.flip(1)))

    def derivatives(model):
        state = {n: p.detach() for n, p in model.named_parameters()}
        f = lambda ids: grad(lambda state: logits(model, state, ids=ids, use_cache=False).sin().sum())
        return lambda: jvp(f(IDS), (state,), (_directions(state),))[1], lambda ids: vmap(lambda i: f(i)(state))(ids)

    (product, each), (plain, loop) = (
        derivatives(build("mixtral", e, x)) for e, x in (("metaattn", "batched_mm"), ("eager", "eager"))
    )
    assert_close(product(), plain())
    assert_close({n: g[1] for n, g in each(ids).items()}, {n: g[0] for n, g in each(ids[1:]).items()})
    with pytest.raises(RuntimeError, match="data-dependent control flow"):
        loop(ids)
    grouped, _ = derivatives(build("mixtral", experts="grouped_mm").float())
    with pytest.raises(NotImplementedError, match="forward AD with _grouped_mm"):
        grouped()
