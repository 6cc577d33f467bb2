"""Fixtures shared by all tests: seeds, backends, and tiles small enough that small shapes need many of them."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # the kernels in Triton's interpreter, before Triton is imported

import matplotlib as mpl
import pytest

from metaattn.backends import _tiles

mpl.use("Agg")
torch.set_num_threads(1)  # pytest-xdist runs a process for each core

BACKENDS = ["reference", "blockwise"]  # those that serve float64
# float32 at the widest. The suite's tensors are on the CPU, where kernels run by the interpreter alone.
FUSED = [] if torch.cuda.is_available() else ["triton"]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(params=BACKENDS)
def backend(request):
    """Each backend in turn: a new one joins the whole suite by its name here."""
    return request.param


@pytest.fixture
def small_tiles(monkeypatch):
    """Cut even the shapes of unit tests into several tiles, and a mapped one into several batches."""
    monkeypatch.setattr(_tiles, "ROWS", 2)
    monkeypatch.setattr(_tiles, "COLS", 3)
    monkeypatch.setattr(_tiles, "TILE", 2**12)


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs a CUDA device")
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(skip)
