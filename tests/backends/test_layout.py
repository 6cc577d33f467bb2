"""Operands in the form that the kernels take: what is copied, and what is read where it is (triton/layout.py)."""

import pytest
import torch

from metaattn.backends.base import Operands

layout = pytest.importorskip("metaattn.backends.triton.layout", exc_type=ImportError)
from metaattn.backends.triton import block_sizes  # noqa: E402


def test_batches_merge_without_copies():
    q = torch.randn(2, 3, 4, 16, 16)
    shared = torch.randn(1, 3, 4, 16, 16).expand(2, -1, -1, -1, -1)
    batch = layout.BatchLayout(Operands(q, shared, shared))
    assert batch.groups == [[0], [1]]
    assert batch.view(shared).ptr is shared
    assert layout.BatchLayout(Operands(q, q, q)).groups == [[0, 1]]


@pytest.mark.parametrize(
    ("tensor", "copied"),
    [
        (torch.randn(2, 8, 32), False),
        (torch.randn(8, 2, 32).transpose(0, 1), False),
        (torch.randn(1, 8, 32).expand(2, 8, 32), False),
        (torch.randn(2, 8, 64)[..., :32], False),
        (torch.randn(2, 8, 40)[..., :32], True),
        (torch.randn(2, 32, 8).mT, True),
        (torch.randn(2, 8, 33)[..., 1:], True),
        (torch.randn(2, 8, 24), True),
        (torch.randn(2 * 8 * 32 + 1)[1:].view(2, 8, 32), True),
    ],
)
def test_alignment(tensor, copied):
    got = layout.aligned(tensor)
    assert (got is not tensor) == copied
    assert got.shape[-1] in (16, 32)
    assert torch.equal(got[..., : tensor.shape[-1]], tensor)
    assert got.stride(-1) == 1
    assert all(s % 16 == 0 for s in got.stride()[:-1])
    assert got.data_ptr() % 16 == 0


@pytest.mark.parametrize(
    ("dtype", "sizes", "padded"),
    [
        (torch.float16, (16, 16), (16, 16)),
        (torch.float16, (40, 24), (64, 64)),
        (torch.float16, (16, 256), (64, 256)),
        (torch.float16, (160, 32), (256, 64)),
        (torch.float16, (20, 12), (32, 32)),
        (torch.float32, (16, 16), (16, 16)),
        (torch.float32, (20, 12), (32, 32)),
        (torch.float32, (16, 256), (256, 256)),
        (torch.float32, (128, 64), (128, 128)),
    ],
)
def test_two_head_sizes_are_padded_to_one_layout(dtype, sizes, padded):
    query, value = torch.randn(1, 2, 3, sizes[0], dtype=dtype), torch.randn(1, 2, 3, sizes[1], dtype=dtype)
    x = Operands(query, query, value)
    got = layout.align(x, block_sizes.least_columns(x))
    assert [t.shape[-1] for t in got[:3]] == [padded[0], padded[0], padded[1]]


def test_head_sizes_of_tf32_are_at_least_those_of_one_layout(precision):
    precision("high")
    x = Operands(*torch.randn(3, 1, 2, 3, 16))
    assert [t.shape[-1] for t in layout.align(x, block_sizes.least_columns(x))[:3]] == [32, 32, 32]
