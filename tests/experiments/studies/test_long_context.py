import json

import pytest
import torch
from torch.func import functional_call, grad

from experiments.errors import UserError
from experiments.studies import long_context
from experiments.studies.long_context import Settings, Study, check

TINY = {
    "chunks": 3,
    "chunk": 6,
    "window": 3,
    "batch": 2,
    "dim": 8,
    "heads": 2,
    "test_texts": 3,
    "device": "cpu",
}


def study(**changes):
    return Study(Settings(**{**TINY, **changes}))


def random_params(s):
    g = torch.Generator().manual_seed(1)
    return {k: 0.3 * torch.randn(p.shape, generator=g, dtype=torch.float64) for k, p in s.start.items()}


def test_read_follows_its_definition():
    """For each chunk: its loss, then a step of plain gradient descent on it."""
    s = study()
    s.model.double()
    params, tokens = random_params(s), s.texts("train", 0, 1)[0]
    rates = {k: torch.tensor(0.2 + 0.1 * i, dtype=torch.float64) for i, k in enumerate(s.adapts)}
    got = s.read(params, rates, tokens)

    def loss(part, rest, first, i):
        logits = functional_call(s.model, {**rest, **part}, (tokens[first : 6 * (i + 1)],))[-6:]
        picked = logits.log_softmax(-1)[torch.arange(6), tokens[6 * i + 1 : 6 * (i + 1) + 1]]
        return -picked.mean()

    want = []
    for i in range(3):
        first = max(0, 6 * i - 2 * 3)
        part = {k: params[k] for k in s.adapts}
        want.append(loss(part, params, first, i))
        g = grad(loss)(part, params, first, i)
        params = {**params, **{k: params[k] - rates[k] * g[k] for k in s.adapts}}
    torch.testing.assert_close(got, torch.stack(want), rtol=1e-12, atol=1e-12)


def test_a_chunk_has_its_complete_context():
    """The loss of a chunk with its context equals that in the complete text."""
    s = study(depth=2)
    s.model.double()
    params, tokens = random_params(s), s.texts("train", 0, 1)[0]
    logits = functional_call(s.model, params, (tokens[:-1],))
    want = torch.nn.functional.cross_entropy(logits, tokens[1:], reduction="none").view(3, 6).mean(1)
    # Rotary positions count from the first token of the context, and only differences matter.
    torch.testing.assert_close(s.read(params, {}, tokens), want, rtol=1e-10, atol=1e-10)


def letters(length=300, documents=200):
    """Return documents that each use four letters, so that reading the first part helps to predict the rest."""
    g = torch.Generator().manual_seed(0)
    parts = [torch.randperm(256, generator=g)[torch.randint(4, (length,), generator=g)] for _ in range(documents)]
    return torch.cat(parts).to(torch.uint8)


def test_reading_helps(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(long_context, "corpus", lambda: {"train": letters(), "test": letters()})
    out = tmp_path / "run"
    options = {"chunks": 6, "chunk": 12, "window": 1, "batch": 4, "dim": 16, "depth": 1, "heads": 2, "meta_steps": 40}
    options |= {"adapts": "[head.*]", "inner_learning_rate": 3.0, "meta_learning_rate": 0.01, "test_texts": 32}
    monkeypatch.setattr(
        "sys.argv", ["long_context", "device=cpu", *(f"{k}={v}" for k, v in options.items()), f"out={out}"]
    )
    long_context.main()
    content = json.loads((out / "long_context.json").read_text())
    with_steps, without = (content["bits_per_byte"][k] for k in ("learns as it reads", "the same, without steps"))
    assert with_steps[0] == pytest.approx(without[0])  # before the first chunk no step has been taken
    assert with_steps[-1] < without[-1] - 0.5
    assert content["training"]["meta-training"][-1] < content["training"]["meta-training"][0] - 0.5
    assert (out / "long_context.png").stat().st_size > 10_000
    assert "learns as it reads" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"chunks": 1}, "chunks must be at least 2, because the first has nothing to remember; got 1"),
        ({"window": 0}, "window must be at least 1; got 0"),
        ({"inner_learning_rate": 0.0}, "inner_learning_rate must be positive and finite; got 0.0"),
    ],
)
def test_mistakes(changes, message):
    with pytest.raises(UserError, match=message):
        check(Settings(**changes))


def test_nothing_to_adapt():
    with pytest.raises(UserError, match=r"no parameter matches adapts=\['blocks.9.*'\]; the parameters are "):
        study(adapts=["blocks.9.*"])
