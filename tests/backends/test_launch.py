"""Block sizes that do not fit a device, and the table of block sizes (triton/launch.py, triton/block_sizes.py)."""

import itertools

import pytest
import torch

from metaattn.backends.base import Operands

launch = pytest.importorskip("metaattn.backends.triton.launch", exc_type=ImportError)
from metaattn.backends.triton import block_sizes, layout  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def test_blocks_that_do_not_fit_shrink():
    from triton.runtime.errors import OutOfResources

    x = Operands(*(torch.randn(1, 1, 64, 16, device=DEVICE),) * 3)
    tried = []

    class Kernel:
        def __getitem__(self, grid):
            def launch(*arguments, BM, BN, num_warps, num_stages, **options):
                tried.append((BM, BN, num_warps, num_stages))
                if BM * BN * num_stages > 64 * 32:
                    raise OutOfResources(1, 0, "shared memory")

            return launch

    kernel, batch = Kernel(), layout.BatchLayout(x)
    for _ in range(2):
        launch.launch_kernel(kernel, "forward", block_sizes.Tile(128, 64, 8, 2), batch, lambda t: 1, (), {})
    assert tried == [(128, 64, 8, 2), (128, 64, 8, 1), (64, 64, 4, 1), (64, 32, 4, 1), (64, 32, 4, 1)]


def test_fixed_keys_that_do_not_fit():
    from triton.runtime.errors import OutOfResources

    x = Operands(*(torch.randn(1, 1, 64, 16, device=DEVICE),) * 3)
    tried = []

    class Kernel:
        def __getitem__(self, grid):
            def launch(*arguments, BM, BN, num_warps, num_stages, **options):
                tried.append((BM, BN))
                raise OutOfResources(1, 0, "shared memory")

            return launch

    kernel, batch = Kernel(), layout.BatchLayout(x)
    for _ in range(2):
        tile = block_sizes.Tile(32, 64, 4, 1)
        assert not launch.launch_kernel(kernel, "backward_keys", tile, batch, lambda t: 1, (), {}, fixed_keys=True)
    assert tried == [(32, 64), (16, 64)]
    with pytest.raises(OutOfResources):
        launch.launch_kernel(kernel, "backward_rows", tile, batch, lambda t: 1, (), {})


def test_table_has_no_more_warps_than_rows():
    """A warp needs 16 rows of a product. See block_sizes.fit."""
    for primitives in block_sizes.table().values():
        for (primitive, _), column in primitives.items():
            for tile in itertools.chain(*column.values()):
                assert block_sizes.fit(primitive, tile, "half") == tile, (primitive, tile)


@pytest.mark.parametrize(
    ("primitive", "tile", "fitting"),
    [
        ("forward_jvp", (64, 16, 4, 2), (32, 16, 4, 2)),
        ("forward_jvp", (64, 32, 4, 1), (64, 32, 4, 1)),
        ("backward_with_jvp_keys", (16, 64, 4, 1), (16, 32, 4, 1)),
        ("backward_keys", (32, 128, 8, 2), (32, 128, 8, 2)),
    ],
)
def test_short_tiles_of_tf32_are_too_small_for_a_warp_group(primitive, tile, fitting):
    """Transposed blocks of such tiles have another layout than the rest. In 16 bits nothing is transposed."""
    assert block_sizes.fit(primitive, block_sizes.Tile(*tile), "tf32") == block_sizes.Tile(*fitting)
    assert block_sizes.fit(primitive, block_sizes.Tile(*tile), "half") == block_sizes.Tile(*tile)


def test_table_keeps_only_16_bits_in_registers():
    """A product with the identity is not exact in tf32."""
    for primitives in block_sizes.table().values():
        for (_, arithmetic), column in primitives.items():
            assert arithmetic == "half" or not any(tile.keep_in_registers for tile in itertools.chain(*column.values()))
