"""The page on other libraries: their code and ours give the same meta-gradient, and the pitfalls it names exist."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

import metaattn
from metaattn.meta import maml
from metaattn.nn.norm import LayerNorm
from tests.helpers import assert_close, error, python_blocks

PAGE = Path(__file__).parent.parent.parent / "docs" / "coming_from.md"
PAIRS = {
    "learn2learn": 2,
    "higher": 1,
    "TorchOpt": 3,
}  # number of blocks of each library that have a counterpart in metaattn


def _pop_gradients(model):
    """Return and clear the gradients that ``backward`` left, in order; none if it did not run."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return gradients


@pytest.fixture
def _page_dtype():
    """Restore the default dtype, which the page's first block sets."""
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("_page_dtype")
@pytest.mark.parametrize("library", PAIRS)
def test_both_sides_agree(library):
    pytest.importorskip(library.lower())
    setting, *blocks = python_blocks(PAGE)
    session, theirs, compared = {}, [], 0
    exec(setting, session)
    nn.init.normal_(session["model"].head.weight)  # otherwise only the head has a gradient in the first step
    for block in blocks:
        author = re.match(r"# (\w+)\n", block)[1]
        if author not in (library, "metaattn"):
            continue
        exec(block, session)
        gradients = _pop_gradients(session["model"])
        if author == library:
            theirs = gradients
        elif theirs:
            # Adam's derivative loses digits where gradients are small: errors of 1e-11 and 1.3e-11 on two CPUs.
            got, factor = gradients or list(session["gradient"]["params"].values()), 2 if library == "TorchOpt" else 1
            assert_close(got, theirs, factor=factor)
            theirs, compared = [], compared + 1
    assert compared == PAIRS[library]


@pytest.mark.usefixtures("_page_dtype")
def test_blocks_of_metaattn():
    """The blocks of metaattn run without any of the libraries."""
    session = {}
    for block in python_blocks(PAGE):
        if not block.startswith(tuple(f"# {library}\n" for library in PAIRS)):
            exec(block, session)
    assert session["losses"].shape == (4,)


class _Net(nn.Module):
    """Two layers with the module of a pitfall between them."""

    def __init__(self, between):
        super().__init__()
        self.first, self.between, self.last = nn.Linear(3, 8), between, nn.Linear(8, 2)

    def forward(self, x):
        return self.last(self.between(self.first(x)))


class _Attention(nn.Module):
    """Attention among the samples of a batch."""

    def __init__(self, attention):
        super().__init__()
        self.attention = attention

    def forward(self, x):
        x = x[None, None]
        return self.attention(x, x, x)[0, 0]


X, Y = torch.randn(2, 6, 3).double(), torch.randn(2, 6, 2).double()


def _ours(model):
    learner = maml(lambda params, x, y: F.mse_loss(functional_call(model, params, (x,)), y), steps=2)
    return learner.value_and_grad(learner.init(dict(model.named_parameters())), (X, Y), (X, Y))[1]["params"]


def _plain(model):
    """Meta-gradient by plain autograd, task by task."""
    model.zero_grad()
    for x, y in zip(X, Y, strict=True):
        params = dict(model.named_parameters())
        for _ in range(2):
            loss = F.mse_loss(functional_call(model, params, (x,)), y)
            grads = torch.autograd.grad(loss, list(params.values()), create_graph=True)
            params = {k: p - 0.1 * g for (k, p), g in zip(params.items(), grads, strict=True)}
        (F.mse_loss(functional_call(model, params, (x,)), y) / len(X)).backward()
    return {k: p.grad for k, p in model.named_parameters()}


@pytest.mark.parametrize(
    "norm", [nn.LayerNorm(8), nn.BatchNorm1d(8, track_running_stats=False)], ids=["layer", "batch"]
)
def test_norms_that_are_wrong(norm):
    model = _Net(norm).double()
    fixed = "PyTorch has fixed this norm under vmap: remove the pitfall from the page"
    assert error(_ours(model), _plain(model)) > 1e-4, fixed


RIGHT = [
    LayerNorm(8),
    nn.RMSNorm(8),
    nn.GroupNorm(2, 8),
    nn.BatchNorm1d(8, affine=False, track_running_stats=False),
    nn.BatchNorm1d(8).eval(),
]


@pytest.mark.parametrize("norm", RIGHT, ids=str)
def test_norms_that_are_right(norm):
    model = _Net(norm).double()
    assert_close(_ours(model), _plain(model))


def test_batch_norm_that_tracks_statistics():
    model = _Net(nn.BatchNorm1d(8)).double()
    with pytest.raises(RuntimeError, match="in-place"):
        _ours(model)


@pytest.mark.parametrize("gradient", [_ours, _plain])
@pytest.mark.parametrize("kind", ["sdpa", "layer"])
def test_fused_attention(kind, gradient):
    attention = _Attention(F.scaled_dot_product_attention)
    model = _Net(attention if kind == "sdpa" else nn.TransformerEncoderLayer(8, 2, 8, dropout=0.0)).double()
    with pytest.raises(RuntimeError, match=r"derivative for aten::_scaled_dot_product.*is not implemented"):
        gradient(model)


def test_attention():
    model = _Net(_Attention(metaattn.sdpa)).double()
    assert_close(_ours(model), _plain(model))


def test_adam_at_a_gradient_of_zero():
    torchopt = pytest.importorskip("torchopt")
    gradients = []
    for settings in ({}, {"eps_root": 1e-8}):
        model = _Net(nn.Identity()).double()
        nn.init.zeros_(model.last.weight)
        inner = torchopt.MetaAdam(model, lr=0.01, **settings)
        weight = model.first.weight
        for _ in range(2):
            inner.step(F.mse_loss(model(X[0]), Y[0]))
        F.mse_loss(model(X[0]), Y[0]).backward()
        gradients.append(weight.grad)
    assert gradients[0].isnan().any()
    assert gradients[1].isfinite().all()


def test_unused_parameters():
    l2l = pytest.importorskip("learn2learn")
    model = _Net(nn.Identity()).double()
    model.unused = nn.Linear(2, 2).double()
    clone = l2l.algorithms.MAML(model, lr=0.1).clone()
    with pytest.raises(UnboundLocalError):
        clone.adapt(F.mse_loss(clone(X[0]), Y[0]))
    assert not _ours(model)["unused.weight"].any()


def test_higher_copies_by_default():
    higher = pytest.importorskip("higher")
    model = _Net(nn.Identity()).double()
    with higher.innerloop_ctx(model, torch.optim.SGD(model.parameters(), lr=0.1)) as (fast, steps):
        steps.step(F.mse_loss(fast(X[0]), Y[0]))
        F.mse_loss(fast(X[0]), Y[0]).backward()
    assert all(p.grad is None for p in model.parameters())


def test_rematerialised_model_in_higher():
    higher = pytest.importorskip("higher")
    model = metaattn.Transformer(input="continuous", in_features=3, dim=8, depth=1, heads=2, remat=True).double()
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    with (
        higher.innerloop_ctx(model, inner, copy_initial_weights=False) as (fast, _),
        pytest.raises(ValueError, match="uses a tensor that it is not given"),
    ):
        fast(X)
