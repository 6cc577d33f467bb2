import warnings

import pytest
import torch

from metaattn.autodiff import _context
from metaattn.compile import capture
from metaattn.compile.capture import _copy
from metaattn.meta import maml

GPU = pytest.param("cuda", marks=pytest.mark.gpu)


def loss(params, x, y):
    return ((x * params["w"]).tanh().sum(-1) - y).square().mean()


def tasks(count, device, seed=0):
    g = torch.Generator().manual_seed(seed)
    return tuple(tuple(torch.randn(count, *s, generator=g).to(device) for s in ((5, 3), (5,))) for _ in range(2))


@pytest.fixture
def learner():
    return maml(loss, steps=2, learning_rate=0.1)


def meta(learner, device):
    return learner.init({"w": torch.linspace(-1, 1, 3, device=device)})


def values(tree):
    return {g: {k: t.detach() for k, t in group.items()} for g, group in tree.items()}


@pytest.mark.gpu
def test_replays_equal_eager_steps(learner):
    m = values(meta(learner, "cuda"))
    fast = capture(learner.value_and_grad)
    for seed, count in ((0, 4), (1, 4), (2, 6), (3, 4)):
        support, query = tasks(count, "cuda", seed)
        got, want = fast(m, support, query), learner.value_and_grad(m, support, query)
        assert fast.reason is None
        assert torch.equal(got[0], want[0])
        assert torch.equal(got[1]["params"]["w"], want[1]["params"]["w"])


@pytest.mark.gpu
def test_mixed_mode_in_a_graph():
    learner = maml(loss, steps=3, learning_rate=0.1, gradient="mixed")
    m = values(meta(learner, "cuda"))
    fast = capture(learner.value_and_grad)
    for seed in range(2):
        got, want = fast(m, *tasks(4, "cuda", seed)), learner.value_and_grad(m, *tasks(4, "cuda", seed))
        assert fast.reason is None
        torch.testing.assert_close(got, want)


def test_generators_cannot_be_read_in_a_capture(monkeypatch):
    """A recomputed function must know that it draws nothing there."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(NotImplementedError, match="capture, which finds out whether a step draws"):
        _context._generator_states([0])
    with _context.without_draws():
        assert len(_context._generator_states([0])) == 1  # the CPU's
    with pytest.raises(NotImplementedError):
        _context._generator_states([0])
    assert len(_context._generator_states([])) == 1


@pytest.mark.gpu
def test_results_outlive_the_next_replay(learner):
    m = values(meta(learner, "cuda"))
    fast = capture(learner.value_and_grad)
    first = fast(m, *tasks(4, "cuda"))[0]
    copy = first.clone()
    fast(m, *tasks(4, "cuda", 1))
    assert torch.equal(first, copy)


@pytest.mark.gpu
def test_state_is_changed_once_a_call(learner):
    """The trial runs before a capture leave no trace."""

    def train(captured):
        m = meta(learner, "cuda")
        w = m["params"]["w"]
        optimizer = torch.optim.Adam([w], 0.1, capturable=True)
        w.grad = torch.zeros_like(w)
        optimizer.step()  # makes the optimizer's state
        with torch.no_grad():
            w.copy_(torch.linspace(-1, 1, 3))
        kept = [t for t in optimizer.state[w].values() if torch.is_tensor(t)]

        def step(support, query):
            losses, gradients = learner.value_and_grad(m, support, query)
            w.grad = gradients["params"]["w"]
            optimizer.step()
            return losses

        run = capture(step, state=[w, *kept]) if captured else step
        losses = [run(*tasks(4, "cuda", seed)) for seed in range(3)]
        return w.detach().clone(), losses

    (w, losses), (want_w, want_losses) = train(True), train(False)
    torch.testing.assert_close(w, want_w)
    torch.testing.assert_close(losses, want_losses)


@pytest.mark.gpu
def test_a_step_that_waits_for_the_gpu_runs_eagerly():
    fast = capture(lambda x: x * x.sum().item())
    with pytest.warns(UserWarning, match="the step runs eagerly: its capture failed"):
        got = fast(torch.ones(2, device="cuda"))
    assert got.tolist() == [2.0, 2.0]


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:the step runs eagerly")
def test_a_failed_capture_leaves_graphs_and_generators_as_they_were():
    drop, x = capture(lambda x: torch.nn.functional.dropout(x)), torch.ones(64, device="cuda")
    first = drop(x)
    capture(lambda x: x * x.sum().item())(x)
    assert not torch.equal(drop(x), first)
    assert drop.reason is None
    assert torch.rand(64, device="cuda").unique().numel() > 1


def test_one_warning_says_why_it_runs_eagerly(learner):
    m = values(meta(learner, "cpu"))
    fast = capture(learner.value_and_grad)
    support, query = tasks(4, "cpu")
    with pytest.warns(UserWarning, match="needs tensors on a GPU"):
        got = fast(m, support, query)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = fast(m, support, query)
    want = learner.value_and_grad(m, support, query)
    for result in (got, again):
        torch.testing.assert_close(result, want, rtol=0, atol=0)
    assert "GPU" in fast.reason


def test_none_runs_eagerly_without_a_warning(learner):
    m = values(meta(learner, "cpu"))
    support, query = tasks(4, "cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = capture(learner.value_and_grad, mode="none")(m, support, query)
    torch.testing.assert_close(got, learner.value_and_grad(m, support, query), rtol=0, atol=0)


@pytest.mark.parametrize("device", ["cpu", GPU])
def test_gradients_through_it_are_kept(device):
    """With an argument that requires a gradient, the step runs eagerly, so that autograd can follow it."""
    fast = capture(lambda x: x.square().sum())
    x = torch.ones(3, device=device, requires_grad=True)
    with pytest.warns(UserWarning, match="runs eagerly"):
        (g,) = torch.autograd.grad(fast(x), x)
    assert g.tolist() == [2.0] * 3


@pytest.mark.parametrize("device", ["cpu", GPU])
def test_transforms_see_the_step(device):
    fast = capture(lambda x: x.square().sum())
    with pytest.warns(UserWarning, match="runs eagerly"):
        got = torch.func.grad(fast)(torch.ones(3, device=device))
    assert got.tolist() == [2.0] * 3


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"mode": "fast"}, ValueError, "mode must be one of 'graph', 'inductor', 'none'; got 'fast'"),
        ({"options": {"max_autotune": True}}, ValueError, "options are Inductor's and need mode='inductor'"),
        ({"mode": "inductor", "options": {"nope": 1}}, ValueError, "Inductor has no option 'nope'"),
        ({"step": 3}, TypeError, "step must be a function; got 3"),
        ({"state": ["w"]}, TypeError, "state must be tensors"),
        ({"max_graphs": 0}, ValueError, "max_graphs must be at least 1; got 0"),
    ],
)
def test_errors(arguments, error, match):
    with pytest.raises(error, match=match):
        capture(**{"step": len, **arguments})


def test_the_old_name_of_max_graphs():
    with pytest.warns(DeprecationWarning, match="use max_graphs"):
        assert capture(len, most=3).max_graphs == 3
    assert capture(len, max_graphs=3).max_graphs == 3


def test_what_a_replay_is_given_is_copied_at_once(monkeypatch):
    """One kernel copies tensors of one dtype; a tensor of another layout is copied by itself, and slows no others."""
    together = []
    foreach = torch._foreach_copy_
    monkeypatch.setattr(torch, "_foreach_copy_", lambda to, of: together.append(len(to)) or foreach(to, of))
    of = [torch.rand(2, 3), torch.rand(4), torch.rand(3, 2).mT, torch.rand(1, 3).expand(2, 3), torch.rand(2).half()]
    of += [torch.tensor(3), torch.rand(0), torch.tensor([1], dtype=torch.uint16)]
    to = [torch.empty(t.shape, dtype=t.dtype) for t in of]
    _copy(to, of)
    for a, b in zip(to, of, strict=True):
        assert torch.equal(a, b)
    assert sorted(together) == [1, 1, 3]
