"""Fixtures for the integrations."""

import pytest
import torch


@pytest.fixture
def exact_eager(monkeypatch):
    """Transformers' eager attention takes its softmax in float32; as an oracle it stays in its dtype."""
    softmax = torch.nn.functional.softmax
    wide = lambda x, dim, dtype=None: softmax(x, dim, dtype=None if x.dtype == torch.float64 else dtype)
    monkeypatch.setattr(torch.nn.functional, "softmax", wide)
