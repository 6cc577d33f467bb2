"""Fixtures for the tests of integrations."""

import pytest
import torch

from metaattn.ops import _rules


@pytest.fixture
def used(monkeypatch):
    """Backends of the calls of metaattn.sdpa, in order."""
    calls = []
    forward = _rules._forward

    def spy(*args):
        calls.append(args[4])
        return forward(*args)

    monkeypatch.setattr(_rules, "_forward", torch.compiler.allow_in_graph(spy))
    return calls


@pytest.fixture
def fast_paths():
    """Getter of the switch of PyTorch's fast paths; the switch must be on before and after the test."""
    assert torch.backends.mha.get_fastpath_enabled()
    yield torch.backends.mha.get_fastpath_enabled
    assert torch.backends.mha.get_fastpath_enabled()


@pytest.fixture
def exact_eager(monkeypatch):
    """Keep the softmax of Transformers' eager attention in float64, because it is the oracle; else it is in float32."""
    softmax = torch.nn.functional.softmax
    wide = lambda x, dim, dtype=None: softmax(x, dim, dtype=None if x.dtype == torch.float64 else dtype)
    monkeypatch.setattr(torch.nn.functional, "softmax", wide)
