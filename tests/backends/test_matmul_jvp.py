"""Products with their tangents: the kernel, in Triton's interpreter where there is no GPU, and PyTorch's own."""

import pytest
import torch

from metaattn.backends import matmul_jvp
from metaattn.backends.matmul_jvp import Product, in_pytorch, multiply, served
from tests.conftest import NO_KERNELS
from tests.helpers import assert_close

linear = pytest.importorskip("metaattn.backends.triton.matmul_jvp", exc_type=ImportError)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.skipif(DEVICE == "cpu" and NO_KERNELS is not None, reason=NO_KERNELS or "")
SIZES = [(20, 33, 17), (64, 16, 16), (5, 1, 40), (70, 130, 1), (1, 48, 32)]


def factor(batch, rows, columns, turned=False, expanded=False):
    if expanded:
        return torch.randn(1, rows, columns, device=DEVICE).expand(batch, -1, -1)
    shape = (batch, columns, rows) if turned else (batch, rows, columns)
    t = torch.randn(shape, device=DEVICE)
    return t.mT if turned else t


def exact(jobs):
    wide = [Product(*(f if f is None else f.double() for f in job[:4]), job.value) for job in jobs]
    return [t for job in wide for t in in_pytorch(job)]


def jobs_of(m, n, k, turned):
    """With tangents; without; the tangent alone."""
    return {
        "both": Product(factor(2, m, k, turned), factor(2, k, n, not turned), factor(2, m, k), factor(2, k, n, turned)),
        "value": Product(factor(3, m, k), factor(3, k, n, turned)),
        "tangent": Product(
            factor(3, n, m, turned), factor(3, m, k, expanded=True), factor(3, n, m), factor(3, m, k), value=False
        ),
    }


NAMES = [("both",), ("value",), ("tangent",), ("both", "tangent"), ("tangent", "value")]


@pytest.mark.parametrize("names", NAMES, ids=str)
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_kernel(size, turned, names):
    jobs = [jobs_of(*size, turned)[name] for name in names]
    got = linear.multiply(jobs, linear.Blocks(32, 32, 16, 4, 1))
    assert len(got) == sum(job.results for job in jobs)
    for a, b in zip(got, exact(jobs), strict=True):
        assert_close(a, b, torch.float32)


def test_16_bits_round_once():
    job = Product(*(f.half() for f in jobs_of(20, 33, 50, False)["both"][:4]))
    for got, want in zip(linear.multiply([job]), exact([job]), strict=True):
        assert (got.double() - want).norm() < 1.01 * (want.half().double() - want).norm()


def test_stages_give_way_to_shared_memory(monkeypatch):
    from triton.runtime.errors import OutOfResources

    tried = []

    class Kernel:
        def __getitem__(self, grid):
            def launch(*arguments, num_stages, **options):
                tried.append(num_stages)
                if num_stages > 2:
                    raise OutOfResources(1, 0, "shared memory")

            return launch

    monkeypatch.setattr(linear, "products", Kernel())
    monkeypatch.setattr(linear, "_stages", {})
    for _ in range(2):
        linear.multiply([jobs_of(64, 64, 64, False)["value"]], linear.Blocks(64, 64, 32, 4, 4))
    assert tried == [4, 3, 2, 2]


def test_what_the_kernel_takes(precision, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    x = torch.empty(2, 3, 4)
    assert linear.multiplies(x.half())
    assert linear.multiplies(x.bfloat16())
    assert not linear.multiplies(x)  # float32, exactly
    assert not linear.multiplies(x.double())
    precision("high")
    assert linear.multiplies(x)
    precision("highest")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    assert not linear.multiplies(x.half())
    assert not served(x.half().cpu())


def test_what_does_not_fit_is_pytorchs(monkeypatch):
    from triton.runtime.errors import OutOfResources

    class Kernel:
        def __getitem__(self, grid):
            def launch(*arguments, **options):
                raise OutOfResources(1, 0, "shared memory")

            return launch

    job = jobs_of(4, 5, 6, False)["both"]
    assert linear.multiply([Product(job.a[:, :0], job.b)]) is None
    wide = torch.empty(1, device=DEVICE).expand(1, 2**16, 2**16)
    assert linear.multiply([Product(wide, wide)]) is None  # 2^32 results
    monkeypatch.setattr(linear, "products", Kernel())
    monkeypatch.setattr(linear, "_stages", {})
    assert linear.multiply([job]) is None
    monkeypatch.setattr(linear, "multiplies", lambda _: True)
    monkeypatch.setattr(matmul_jvp, "served", lambda _: True)
    assert_close(multiply([job]), exact([job]), torch.float32)


def test_elsewhere_pytorch_multiplies():
    jobs = [jobs_of(4, 5, 6, False)[name] for name in ("both", "value")]
    jobs = [Product(*(f if f is None else f.cpu().double() for f in job[:4]), job.value) for job in jobs]
    (a, b, a_t, b_t, _), (c, d, *_) = jobs
    for got, want in zip(multiply(jobs), (a @ b, a_t @ b + a @ b_t, c @ d), strict=True):
        assert_close(got, want, torch.float64)
