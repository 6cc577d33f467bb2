"""Matrix products with their tangents: the kernel, in Triton's interpreter without a GPU, and PyTorch's kernels."""

import pytest
import torch

from metaattn.backends import matmul_jvp
from metaattn.backends.matmul_jvp import Product, in_pytorch, multiply, supported
from tests.conftest import NO_KERNELS
from tests.helpers import assert_close

kernel = pytest.importorskip("metaattn.backends.triton.matmul_jvp", exc_type=ImportError)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.skipif(DEVICE == "cpu" and NO_KERNELS is not None, reason=NO_KERNELS or "")
SIZES = [(20, 33, 17), (64, 16, 16), (5, 1, 40), (70, 130, 1), (1, 48, 32)]


def factor(batch, rows, columns, transposed=False, expanded=False):
    if expanded:
        return torch.randn(1, rows, columns, device=DEVICE).expand(batch, -1, -1)
    shape = (batch, columns, rows) if transposed else (batch, rows, columns)
    t = torch.randn(shape, device=DEVICE)
    return t.mT if transposed else t


def exact(jobs):
    wide = [Product(*(f if f is None else f.double() for f in job[:4]), job.value) for job in jobs]
    return [t for job in wide for t in in_pytorch(job)]


def jobs_of(m, n, k, transposed):
    """Return products with tangents, without tangents, and of which only the tangent is requested."""
    return {
        "both": Product(
            factor(2, m, k, transposed), factor(2, k, n, not transposed), factor(2, m, k), factor(2, k, n, transposed)
        ),
        "value": Product(factor(3, m, k), factor(3, k, n, transposed)),
        "tangent": Product(
            factor(3, n, m, transposed), factor(3, m, k, expanded=True), factor(3, n, m), factor(3, m, k), value=False
        ),
    }


NAMES = [("both",), ("value",), ("tangent",), ("both", "tangent"), ("tangent", "value")]


@pytest.mark.parametrize("names", NAMES, ids=str)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_kernel(size, transposed, names):
    jobs = [jobs_of(*size, transposed)[name] for name in names]
    got = kernel.multiply(jobs, kernel.Blocks(32, 32, 16, 4, 1))
    assert len(got) == sum(job.results for job in jobs)
    for a, b in zip(got, exact(jobs), strict=True):
        assert_close(a, b, torch.float32)


def test_16_bits_round_once():
    job = Product(*(f.half() for f in jobs_of(20, 33, 50, False)["both"][:4]))
    for got, want in zip(kernel.multiply([job]), exact([job]), strict=True):
        assert (got.double() - want).norm() < 1.01 * (want.half().double() - want).norm()


def test_fewer_stages_if_shared_memory_is_short(monkeypatch):
    from triton.runtime.errors import OutOfResources

    tried = []

    class Kernel:
        def __getitem__(self, grid):
            def launch(*arguments, num_stages, **options):
                tried.append(num_stages)
                if num_stages > 2:
                    raise OutOfResources(1, 0, "shared memory")

            return launch

    monkeypatch.setattr(kernel, "matmul_jvp", Kernel())
    monkeypatch.setattr(kernel, "_stages", {})
    for _ in range(2):
        kernel.multiply([jobs_of(64, 64, 64, False)["value"]], kernel.Blocks(64, 64, 32, 4, 4))
    assert tried == [4, 3, 2, 2]


def test_supported_dtypes_and_capabilities(precision, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    x = torch.empty(2, 3, 4)
    assert kernel.matmul_supported(x.half())
    assert kernel.matmul_supported(x.bfloat16())
    assert not kernel.matmul_supported(x)  # float32 without tf32
    assert not kernel.matmul_supported(x.double())
    precision("high")
    assert kernel.matmul_supported(x)
    precision("highest")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    assert not kernel.matmul_supported(x.half())
    assert not supported(x.half().cpu())


def test_pytorch_computes_what_does_not_fit(monkeypatch):
    from triton.runtime.errors import OutOfResources

    class Kernel:
        def __getitem__(self, grid):
            def launch(*arguments, **options):
                raise OutOfResources(1, 0, "shared memory")

            return launch

    job = jobs_of(4, 5, 6, False)["both"]
    assert kernel.multiply([Product(job.a[:, :0], job.b)]) is None
    wide = torch.empty(1, device=DEVICE).expand(1, 2**16, 2**16)
    assert kernel.multiply([Product(wide, wide)]) is None  # 2^32 results
    monkeypatch.setattr(kernel, "matmul_jvp", Kernel())
    monkeypatch.setattr(kernel, "_stages", {})
    assert kernel.multiply([job]) is None
    monkeypatch.setattr(kernel, "matmul_supported", lambda _: True)
    monkeypatch.setattr(matmul_jvp, "supported", lambda _: True)
    assert_close(multiply([job]), exact([job]), torch.float32)


def test_pytorch_computes_products_on_a_cpu():
    jobs = [jobs_of(4, 5, 6, False)[name] for name in ("both", "value")]
    jobs = [Product(*(f if f is None else f.cpu().double() for f in job[:4]), job.value) for job in jobs]
    (a, b, a_t, b_t, _), (c, d, *_) = jobs
    for got, want in zip(multiply(jobs), (a @ b, a_t @ b + a @ b_t, c @ d), strict=True):
        assert_close(got, want, torch.float64)
