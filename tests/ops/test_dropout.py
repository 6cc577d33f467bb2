"""Dropout has the right rate and independent elements, and the same weights in every backend, tile and order."""

import pytest
import torch

import metaattn
from metaattn.backends import tiling


def _weights(backend, rows=64, keys=64, heads=(2, 3), p=0.3):
    """Return the dropout weights of one call, which uniform attention to unit vectors shows."""
    q = torch.zeros(*heads, rows, 1, dtype=torch.float64)
    k = torch.zeros(*heads, keys, 1, dtype=torch.float64)
    eye = torch.eye(keys, dtype=torch.float64).expand(*heads, keys, keys)
    return keys * metaattn.sdpa(q, k, eye, dropout_p=p, backend=backend)


def test_values_and_rate(backend):
    p = 0.3
    w = _weights(backend, p=p)
    assert torch.allclose(w.unique(), torch.tensor([0, 1 / (1 - p)], dtype=torch.float64))
    n = w.numel()
    assert abs((w == 0).double().mean() - p) < 4 * (p * (1 - p) / n) ** 0.5


def test_elements_are_uncorrelated():
    """Neighbours in rows, columns and heads are independent: their product averages to the product of averages."""
    w = _weights("reference", rows=256, keys=256)
    dropped = (w == 0).double() - 0.3
    bound = 5 * 0.21 / dropped.numel() ** 0.5
    for dim in range(dropped.dim()):
        for shift in (1, 2, 7) if dim > 1 else (1,):
            assert (dropped * dropped.roll(shift, dim)).mean().abs() < bound
    assert (dropped * dropped.mT).triu(1).mean().abs() < bound
    corners = dropped * dropped.roll(1, -1) * dropped.roll(1, -2) * dropped.roll((1, 1), (-1, -2))
    assert corners.mean().abs() < bound


def test_rate_of_each_row_and_column():
    w = _weights("reference", rows=512, keys=512, heads=(1, 1), p=0.5)[0, 0]
    limit = 5 * (0.25 / 512) ** 0.5
    for dim in (0, 1):
        assert ((w == 0).double().mean(dim) - 0.5).abs().max() < limit


def test_backends_and_tiles_agree(monkeypatch):
    torch.manual_seed(4)
    want = _weights("reference")
    for rows, cols, tile in ((2, 3, 20), (64, 64, 2**19), (5, 64, 100)):
        monkeypatch.setattr(tiling, "ROWS", rows)
        monkeypatch.setattr(tiling, "COLS", cols)
        monkeypatch.setattr(tiling, "TILE", tile)
        torch.manual_seed(4)
        assert torch.equal(_weights("blockwise") == 0, want == 0)


def test_follows_torch_manual_seed(backend):
    torch.manual_seed(1)
    a, b = _weights(backend), _weights(backend)
    torch.manual_seed(1)
    assert torch.equal(_weights(backend), a)
    assert not torch.equal(a, b)


def test_zero_draws_no_random_numbers():
    state = torch.get_rng_state()
    x = torch.randn(1, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    metaattn.sdpa(x, x, x)
    assert torch.equal(torch.get_rng_state(), state)


def test_lse_is_that_of_all_weights(backend):
    q, k, v = torch.randn(3, 2, 4, 8, dtype=torch.float64).unbind()
    _, lse = metaattn.sdpa(q, k, v, dropout_p=0.9, return_lse=True, backend=backend)
    assert torch.allclose(lse, metaattn.sdpa(q, k, v, return_lse=True)[1])


@pytest.mark.parametrize("p", [1e-9, 0.999])
def test_extreme_probabilities(p, backend):
    q, k, v = torch.randn(3, 2, 4, 8, dtype=torch.float64).unbind()
    assert metaattn.sdpa(q, k, v, dropout_p=p, backend=backend).isfinite().all()
