"""Fixtures that all tests share, and what makes the suite fast.

The fixtures are seeds, backends, and tiles so small that small shapes are cut into many of them.
"""

import contextlib
import ctypes
import os
import re

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads of the programs that tests start do not wait by spinning

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # the kernels in Triton's interpreter, before Triton is imported

import matplotlib as mpl
import pytest

from metaattn.backends import registry, tiling
from metaattn.backends.base import Operands, Problem

mpl.use("Agg")
with contextlib.suppress(AttributeError, TypeError):  # only glibc has mallopt
    # Keep the memory of freed tensors: returning it to the system and asking for it again took a quarter of the time.
    M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
    ctypes.CDLL(None).mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    ctypes.CDLL(None).mallopt(M_MMAP_MAX, 0)
torch.set_num_threads(1)  # pytest-xdist starts a process for each core
os.environ["METAATTN_COMPILE_PROCESSES"] = "0"  # so that no test starts more

BACKENDS = ["reference", "blockwise"]  # those that support float64
# The reason why the kernels cannot run on the tensors of this suite, which are on the CPU: either there is a GPU, so
# that the kernels are not interpreted, or the interpreter does not work here. None if they can.
NO_KERNELS = registry.unsupported_reason("triton", Problem(1.0), Operands(*torch.zeros(3, 1, 1, 1, 1)))
FUSED = [] if NO_KERNELS else ["triton"]  # float32 is their widest dtype


if FUSED:
    from tests import interpreter

    interpreter.accelerate()


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def precision():
    """Set the precision of float32 matrix products until the test ends."""
    before = torch.get_float32_matmul_precision()
    yield torch.set_float32_matmul_precision
    torch.set_float32_matmul_precision(before)


@pytest.fixture(params=BACKENDS)
def backend(request):
    """Run the test on each backend. A new backend joins the suite by its name in BACKENDS."""
    return request.param


@pytest.fixture
def small_tiles(monkeypatch):
    """Cut the small shapes of unit tests into several tiles, and mapped ones into several batches."""
    monkeypatch.setattr(tiling, "ROWS", 2)
    monkeypatch.setattr(tiling, "COLS", 3)
    monkeypatch.setattr(tiling, "TILE", 2**12)


def pytest_collection_modifyitems(config, items):
    """Skip what needs a GPU where there is none, leave out the exhaustive tests, and put the slow ones first.

    The order is for several processes: none of them starts a long test when the others have finished.
    """
    if "exhaustive" not in config.option.markexpr and "exhaustive" not in config.option.keyword:
        left_out = [item for item in items if "exhaustive" in item.keywords]
        if left_out:
            config.hook.pytest_deselected(items=left_out)
            items[:] = [item for item in items if "exhaustive" not in item.keywords]
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs a CUDA device")
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(skip)
    if hasattr(config, "workerinput"):  # a process of pytest-xdist
        items.sort(key=lambda item: "slow" not in item.keywords)


def pytest_addoption(parser):
    parser.addoption("--skipped-to", metavar="FILE", help="write the tests that were skipped for want of a library")


def pytest_configure(config):
    path = config.getoption("--skipped-to")
    if path and not hasattr(config, "workerinput"):  # processes of pytest-xdist report to the first
        config.pluginmanager.register(_Skipped(path))


class _Skipped:
    """Writes what was skipped for want of a library as arguments of a later run: tests, or whole files."""

    def __init__(self, path):
        self.path, self.found = path, set()

    def pytest_runtest_logreport(self, report):
        if report.skipped and re.search("could not import|is not installed", report.longrepr[2]):
            self.found.add(report.nodeid)

    pytest_collectreport = pytest_runtest_logreport

    def pytest_sessionfinish(self):
        with open(self.path, "w") as file:
            file.writelines(f"{test}\n" for test in sorted(self.found))
