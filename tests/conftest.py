"""Fixtures shared by all tests: seeds, backends, and tiles small enough that small shapes need many of them."""

import contextlib
import ctypes
import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # the kernels in Triton's interpreter, before Triton is imported

import matplotlib as mpl
import pytest

from metaattn.backends import registry, tiling
from metaattn.backends.base import Operands, Problem

mpl.use("Agg")
with contextlib.suppress(AttributeError, TypeError):  # glibc's alone
    # Memory of freed tensors stays with the process: to give it back and get it anew took a quarter of the time.
    M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
    ctypes.CDLL(None).mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    ctypes.CDLL(None).mallopt(M_MMAP_MAX, 0)
torch.set_num_threads(1)  # pytest-xdist runs a process for each core
os.environ["METAATTN_COMPILE_PROCESSES"] = "0"  # and none of them needs more

BACKENDS = ["reference", "blockwise"]  # those that serve float64
# Why the kernels do not run on the suite's tensors, which are on the CPU: there is a GPU, and so no interpreter; or the
# interpreter does not run here.
NO_KERNELS = registry.unsupported_reason("triton", Problem(1.0), Operands(*torch.zeros(3, 1, 1, 1, 1)))
FUSED = [] if NO_KERNELS else ["triton"]  # float32 at the widest


if FUSED:
    from triton import language
    from triton.runtime import interpreter

    def _patch_once(fn, patch=interpreter._patch_lang):
        """The interpreter patches its language anew in every function that a kernel calls: half of all its time."""
        modules = [m for m in (language, language.core) if any(m is value for value in fn.__globals__.values())]
        if any(language.core.is_builtin(m.load) for m in modules):
            return patch(fn)
        return interpreter._LangPatchScope()

    interpreter._patch_lang = _patch_once


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def precision():
    """Sets that of float32's products, until the test is over."""
    before = torch.get_float32_matmul_precision()
    yield torch.set_float32_matmul_precision
    torch.set_float32_matmul_precision(before)


@pytest.fixture(params=BACKENDS)
def backend(request):
    """Each backend in turn: a new one joins the whole suite by its name here."""
    return request.param


@pytest.fixture
def small_tiles(monkeypatch):
    """Cut even the shapes of unit tests into several tiles, and a mapped one into several batches."""
    monkeypatch.setattr(tiling, "ROWS", 2)
    monkeypatch.setattr(tiling, "COLS", 3)
    monkeypatch.setattr(tiling, "TILE", 2**12)


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs a CUDA device")
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(skip)
