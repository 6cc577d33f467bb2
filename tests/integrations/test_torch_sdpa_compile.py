"""replace_sdpa with torch.compile: compiled equals eager, as one graph, inside and outside of a block."""

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.func import functional_call, grad, jvp
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import metaattn
from tests.helpers import assert_close
from tests.integrations.models import CAUSAL, F64, PADDING, encoder

pytestmark = pytest.mark.filterwarnings("ignore")  # Dynamo and Inductor warn about themselves
X, T = (torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(i), **F64) for i in range(2))


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def _train(model, x, step, steps=3, **options):
    """Losses and parameters of a few steps of gradient descent."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for i in range(steps):
        optimizer.zero_grad()
        loss = step(x * (1 + i), **options)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses, [p.detach() for p in model.parameters()]


def _twins(build):
    ours, theirs = build(), build()
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


@pytest.mark.parametrize(
    ("device", "compiler"), [("cpu", "aot_eager"), pytest.param("cuda", "inductor", marks=pytest.mark.gpu)]
)
def test_training_steps_of_an_encoder(device, compiler, used):
    """In float64 on the CPU; on a GPU in float32, where the kernels run."""
    dtype = torch.float64 if device == "cpu" else torch.float32
    compiled, eager = _twins(lambda: encoder(layers=1).to(device, dtype))
    x, padding = X.to(device, dtype), PADDING.to(device)
    step = torch.compile(
        lambda x: compiled(x, src_key_padding_mask=padding).sin().mean(), backend=compiler, fullgraph=True
    )
    with metaattn.replace_sdpa():
        got = _train(compiled, x, step)
        assert used
        want = _train(eager, x, lambda x: eager(x, src_key_padding_mask=padding).sin().mean())
    assert_close(got, want, dtype, factor=1 if device == "cpu" else 100)  # rounding errors of three steps


def test_each_side_of_a_block_is_compiled_once(used):
    """Outside, inside, and inside with another backend: never stale code, and no fast path in evaluation."""
    model, counter = encoder(layers=1).eval(), CompileCounter()
    f = torch.compile(model, backend=counter, fullgraph=True)
    graphs, backends = [], []
    with torch.no_grad():
        for backend in ("none", "auto", "auto", "reference", "none", "reference", "auto"):
            used.clear()
            if backend == "none":
                f(X)
            else:
                with metaattn.replace_sdpa(backend=backend):
                    f(X)
            graphs.append(counter.frame_count)
            backends.append(set(used))
    assert graphs == [1, 2, 2, 3, 3, 3, 3]
    assert backends == [
        set() if b == "none" else {b} for b in ("none", "auto", "auto", "reference", "none", "reference", "auto")
    ]


def test_a_block_within_a_compiled_function(used):
    @torch.compile(backend="aot_eager", fullgraph=True)
    def f(x):
        with metaattn.replace_sdpa(backend="reference"):
            return F.scaled_dot_product_attention(x, x, x)

    assert_close(f(X), F.scaled_dot_product_attention(X, X, X))
    assert set(used) == {"reference"}


def test_transforms_within_a_compiled_function():
    """Forward over reverse, of the parameters of PyTorch's module."""
    model = nn.MultiheadAttention(8, 2, batch_first=True, **F64)
    parameters = {k: p.detach() for k, p in model.named_parameters()}
    options = {"need_weights": False, "attn_mask": CAUSAL < 0, "key_padding_mask": PADDING}

    def product(p):
        loss = lambda p: functional_call(model, p, (X, X, X), options)[0].sin().sum()
        return jvp(grad(loss), (p,), (p,))[1]

    with metaattn.replace_sdpa():
        want = product(parameters)
        assert_close(torch.compile(product, backend="aot_eager", fullgraph=True)(parameters), want)
    assert all(t.norm() > 1e-3 for t in want.values())


def _checkpointed(x):
    return checkpoint(lambda x: F.scaled_dot_product_attention(x, x, x).sin(), x, use_reentrant=False).sum()


def test_a_checkpoint_breaks_the_graph_and_is_right(used):
    x, y = X.clone().requires_grad_(), X.clone().requires_grad_()
    with metaattn.replace_sdpa():
        torch.compile(_checkpointed, backend="aot_eager")(x).backward()
        assert used
    _checkpointed(y).backward()
    assert_close(x.grad, y.grad)


def test_a_checkpoint_in_one_graph_is_an_error():
    with (
        metaattn.replace_sdpa(),
        pytest.raises(Exception, match="cannot keep replace_sdpa on inside of a higher-order"),
    ):
        torch.compile(_checkpointed, backend="aot_eager", fullgraph=True)(X)


def test_installed(used):
    """Code compiled before install is not run after it, and the reverse."""
    f = torch.compile(lambda x: F.scaled_dot_product_attention(x, x, x), backend="aot_eager", fullgraph=True)
    model = encoder(layers=1)
    g = torch.compile(model, backend="aot_eager", fullgraph=True)
    f(X), g(X)
    assert not used
    metaattn.replace_sdpa.install(backend="reference")
    try:
        assert_close((f(X), g(X)), (F.scaled_dot_product_attention(X, X, X), model(X)))
        assert set(used) == {"reference"}
    finally:
        metaattn.replace_sdpa.uninstall()
    used.clear()
    f(X), g(X)
    assert not used
