"""Calls that the mode of replace_sdpa rejects with an error, and calls that it cannot see."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention.varlen import varlen_attn

import metaattn
from tests.integrations.models import F64, encoder

X = torch.randn(2, 4, 5, 8, **F64)
Y = torch.randn(2, 4, 5, 8)
LAYER = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True).eval()
FUSED = {
    "flash": lambda: torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(Y, Y, Y),
    "flash overload": lambda: torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default(Y, Y, Y),
    "flash binding": lambda: torch._scaled_dot_product_flash_attention_for_cpu(Y, Y, Y),
    "efficient": lambda: torch.ops.aten._scaled_dot_product_efficient_attention(Y, Y, Y, None, True),
    "varlen": lambda: varlen_attn(*[Y[0]] * 3, *[torch.tensor([0, 4], dtype=torch.int32)] * 2, 4, 4),
    "native": lambda: torch._native_multi_head_attention(
        *[Y[0]] * 3, 8, 2, *(p.data for p in LAYER.self_attn.parameters())
    ),
}


@pytest.mark.parametrize("name", FUSED)
def test_fused_kernels_are_rejected(name):
    with metaattn.replace_sdpa(), pytest.raises(NotImplementedError, match="replace_sdpa cannot replace _"):
        FUSED[name]()


@pytest.mark.filterwarnings("ignore")  # FlexAttention warns that it is not compiled
def test_flex_attention_is_rejected():
    from torch.nn.attention.flex_attention import flex_attention

    with metaattn.replace_sdpa(), pytest.raises(Exception, match="replace_sdpa cannot replace flex_attention"):
        flex_attention(Y, Y, Y)
    torch._dynamo.reset()


def test_nested_tensors_are_rejected():
    nested = torch.nested.nested_tensor([Y[0, :2], Y[0]], layout=torch.jagged).transpose(1, 2)
    with metaattn.replace_sdpa(), pytest.raises(TypeError, match="query must be a dense tensor; got a nested one"):
        F.scaled_dot_product_attention(nested, nested, nested)


def test_arguments_that_are_rejected():
    with metaattn.replace_sdpa(), pytest.raises(ValueError, match="attn_mask and is_causal exclude each other"):
        F.scaled_dot_product_attention(X, X, X, torch.ones(5, 5, dtype=torch.bool), is_causal=True)
    with pytest.raises(ValueError, match=r"backend must be one of .*; got 'flash'"):
        metaattn.replace_sdpa(backend="flash")
    with pytest.raises(ValueError, match=r"backend must be one of .*; got 'flash'"):
        metaattn.replace_sdpa.install(backend="flash")


def test_generators_and_coroutines_are_not_decorated():
    def steps():
        yield 1

    async def wait():
        return 1

    for function in (steps, wait):
        with pytest.raises(TypeError, match=r"got the generator or coroutine function .*Open one inside"):
            metaattn.replace_sdpa()(function)


def test_a_mask_of_a_wrong_shape_is_an_error():
    model, padding = encoder(), torch.zeros(4, 2, dtype=torch.bool)  # transposed
    with (
        metaattn.replace_sdpa(),
        pytest.raises(ValueError, match=r"key_padding_mask must have shape \[2, 4\]; got \[4, 2\]"),
    ):
        model.layers[0].self_attn(*[torch.randn(2, 4, 8, **F64)] * 3, key_padding_mask=padding)


def _scriptable(x: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(x, x, x)


def test_scripts_are_left_as_they_are(used):
    """PyTorch does not show the calls of a script to any mode."""
    script = torch.jit.script(_scriptable)
    with metaattn.replace_sdpa():
        script(Y)
    assert not used
