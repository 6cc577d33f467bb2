"""Learned data weights: the clean source gets the largest one, and finite differences confirm the meta-gradient."""

import json
import sys

import pytest
import torch

from experiments.errors import UserError
from experiments.studies import data_weights
from experiments.studies.data_weights import Settings, Study
from experiments.training.config import GradientName
from tests.helpers import assert_close

TINY = {"noise": [0.5, 1.0], "length": 16, "dim": 16, "depth": 1, "heads": 2, "device": "cpu"}


@pytest.fixture(scope="module")
def learned():
    """The weights after each meta-step, and the losses on held-out text."""
    return data_weights.learn(Study(Settings(**TINY, inner_learning_rate=0.1)))


def test_weights_separate_clean_from_corrupted(learned):
    weights, losses = learned
    assert weights.shape == (61, 4)
    assert torch.equal(weights[0], torch.full((4,), 0.25))
    clean, half_noise, noise, shuffled = weights[-1].tolist()
    # Measured with seeds 0, 1 and 2: 0.69 to 0.87 clean, 0.13 to 0.31 shuffled, 0.002 noise.
    assert clean > 0.5
    assert clean > 1.5 * shuffled
    assert clean > 50 * max(half_noise, noise)
    # The weight of the shuffled source decreases once the model knows the frequencies of bytes and learns their order.
    assert shuffled < 0.7 * weights[10, 3]
    assert losses[-1] < losses[0] - 1


def test_learning_is_deterministic(learned):
    weights, losses = data_weights.learn(Study(Settings(**TINY, inner_learning_rate=0.1, meta_steps=5)))
    assert torch.equal(weights, learned[0][:6])
    assert losses == learned[1][:5]


def test_the_meta_gradient_is_that_of_finite_differences():
    study = Study(Settings(**TINY, inner_learning_rate=0.3))
    # With a head of zeros, the first step would not depend on the rest of the model.
    start = {k: 0.1 * torch.randn_like(p) if k == "head.weight" else p for k, p in study.start.items()}
    start = {k: p.double() for k, p in start.items()}

    def loss(mixture):
        return study.held_out(study.steps(start, mixture, 0, 3), "validation", 0, 4)

    mixture = torch.randn(4, dtype=torch.float64, requires_grad=True)
    (got,) = torch.autograd.grad(loss(mixture), mixture)
    h = 3e-3
    with torch.no_grad():
        sides = [[loss(mixture + k * h * one) for k in (-2, -1, 1, 2)] for one in torch.eye(4, dtype=torch.float64)]
    want = torch.stack([(a - 8 * b + 8 * c - d) / (12 * h) for a, b, c, d in sides])
    assert want.norm() > 1e-3
    assert_close(got, want, factor=100)  # the differences' own error is 2e-12 here


def test_the_corpus_is_split_by_files():
    parts = data_weights.corpus()
    assert list(parts) == ["train", "validation", "test"]
    assert all(b"def " in bytes(part.tolist()) for part in parts.values())
    assert len(parts["train"]) > 4 * len(parts["validation"]) > 0
    heads = [bytes(part[:2000].tolist()) for part in parts.values()]
    wholes = [bytes(part.tolist()) for part in parts.values()]
    assert [[head in whole for whole in wholes] for head in heads] == [[i == j for j in range(3)] for i in range(3)]


def test_sources_have_their_noise():
    text = torch.full((1000,), 65, dtype=torch.uint8)
    text[::2] = 66  # the bytes of every window alternate
    s = Settings(length=99, batch=50)
    clean, some, half, noise, shuffled = data_weights.mixed_batch(s, text, 3)
    assert clean.shape == (50, 100)
    assert (clean[:, 1:] != clean[:, :-1]).all()
    changes = lambda x: ((x[:, 1:] != x[:, :-1]) & (x[:, 1:] >= 65) & (x[:, 1:] <= 66)).double().mean().item()
    original = lambda x: ((x == 65) | (x == 66)).double().mean().item()
    for source, rate in ((some, 0.2), (half, 0.5), (noise, 1.0)):
        assert original(source) == pytest.approx(1 - rate * 254 / 256, abs=0.02)
    assert (shuffled.sort(1).values == clean.sort(1).values).all()
    assert changes(shuffled) == pytest.approx(0.5, abs=0.03)
    assert torch.equal(data_weights.mixed_batch(s, text, 3)[3], noise)
    assert not torch.equal(data_weights.mixed_batch(s, text, 4)[3], noise)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch": 0}, "batch must be at least 1; got 0"),
        ({"inner_learning_rate": 0.0}, "inner_learning_rate must be positive and finite; got 0.0"),
        ({"noise": [1.5]}, r"noise must be rates above 0 and at most 1, for .* besides the clean one; got \[1.5\]"),
        ({"noise": [], "shuffled": False}, "noise must be rates"),
        ({"gradient": GradientName.first_order}, "give gradient=reverse"),
    ],
)
def test_mistakes(change, message):
    with pytest.raises(UserError, match=message):
        data_weights.check(Settings(**change))


def _main(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["data_weights", *arguments])
    try:
        data_weights.main()
    except SystemExit as end:
        return end.code
    return 0


def test_command(monkeypatch, tmp_path, capsys):
    short = [f"{k}={v}".replace(" ", "") for k, v in TINY.items()] + [f"out={tmp_path}", "shuffled=false"]
    assert _main(monkeypatch, *short, "meta_steps=4", "inner_learning_rate=0.1") == 0
    content = json.loads((tmp_path / "data_weights.json").read_text())
    assert content["sources"] == ["clean", "50% noise", "100% noise"]
    assert [len(content["weights"]), len(content["held_out_loss"])] == [5, 4]
    assert set(content["test_loss"]) == {"clean source only", "learned weights", "equal parts"}
    assert content["settings"]["gradient"] == "reverse"
    assert (tmp_path / "data_weights.png").stat().st_size > 10_000
    assert "Bits per byte" in capsys.readouterr().out
    # Weights that move away from the clean source are reported.
    monkeypatch.setattr(data_weights, "learn", lambda study: (torch.tensor([[1, 1, 1], [1, 2, 1]]) / 4, [0.0]))
    assert _main(monkeypatch, *short, "meta_steps=1") == 1
    assert "the clean source does not have the largest weight" in capsys.readouterr().err
    assert _main(monkeypatch, *short, "gradient=first_order") == 2
    assert capsys.readouterr().err.startswith("error: gradient=first_order does not differentiate through")
