"""A GPU that need not exist, for tests of which backend supports a call."""

import pytest
import torch

from metaattn.backends.base import Operands


@pytest.fixture
def gpu(monkeypatch):
    """Operands on a simulated GPU of a given capability and shared memory."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    interface = pytest.importorskip("metaattn.backends.triton.interface", exc_type=ImportError)
    block_sizes = pytest.importorskip("metaattn.backends.triton.block_sizes", exc_type=ImportError)
    block_sizes._for_device.cache_clear()

    def make(size, dtype, capability, kib):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
        monkeypatch.setattr(interface, "shared_bytes", lambda _: kib * 1024)
        with FakeTensorMode():
            return Operands(*(torch.empty(1, 1, 4, size, dtype=dtype, device="cuda:0"),) * 3)

    yield make
    block_sizes._for_device.cache_clear()  # which keeps the capability of a device
