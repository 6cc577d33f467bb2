"""Vision Transformer of timm under replace_sdpa, against its own attention in elementary operations."""

from importlib.util import find_spec

import pytest
import torch

import metaattn
from tests.helpers import assert_close
from tests.integrations.models import DERIVATIVES, F64, loss_of_model

if find_spec("timm") is None:
    pytest.skip("timm is not installed", allow_module_level=True)


def _import_timm():
    """Import timm, if necessary after declaring operators of torchvision without implementing them.

    timm imports torchvision, whose package contains its operators for CUDA only. On another machine its Python part
    does not import either, for these two are missing; the model uses none of them.
    """
    try:
        import timm
    except RuntimeError:
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import timm

        timm.declared = library  # an operator lives as long as the object that declared it
    return timm


def _vit(fused):
    shape = {"img_size": 8, "patch_size": 4, "embed_dim": 8, "depth": 2, "num_heads": 2, "num_classes": 3}
    model = _import_timm().models.VisionTransformer(**shape, qkv_bias=True, init_values=0.1).to(**F64)
    for block in model.blocks:
        block.attn.fused_attn = fused
    return model


@pytest.mark.parametrize("derivative", DERIVATIVES)
def test_vision_transformer(derivative):
    fused, written_out = _vit(fused=True), _vit(fused=False)
    images = torch.randn(2, 3, 8, 8, **F64)
    loss, point = loss_of_model(fused, [images])
    dense_loss, _ = loss_of_model(written_out, [images])
    ours, oracle = DERIVATIVES[derivative]
    if derivative != "vmap":
        with pytest.raises((RuntimeError, NotImplementedError), match="_scaled_dot_product_flash_attention"):
            ours(loss, point)
    with metaattn.replace_sdpa():
        got = ours(loss, point)
    assert_close(got, oracle(dense_loss, point))
