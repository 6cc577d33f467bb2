"""What replace_sdpa does to a process, watched."""

import pytest
import torch

from metaattn.ops import _rules


@pytest.fixture
def used(monkeypatch):
    """The backends of our attention's calls, in order."""
    calls = []
    forward = _rules._forward

    def spy(*args):
        calls.append(args[4])
        return forward(*args)

    monkeypatch.setattr(_rules, "_forward", torch.compiler.allow_in_graph(spy))
    return calls


@pytest.fixture
def fast_paths():
    """The switch of the fast paths, which must be found as it was."""
    assert torch.backends.mha.get_fastpath_enabled()
    yield torch.backends.mha.get_fastpath_enabled
    assert torch.backends.mha.get_fastpath_enabled()
