"""Norms and activations of the Transformer in every nesting of derivatives, against their formulas.

PyTorch's derivatives of some such operations are wrong at some orders (``layer_norm``, see ``tests/boundaries``). A
comparison of one Transformer with another would not show that.
"""

import math

import pytest
import torch
from torch.func import functional_call

from metaattn import Transformer
from metaattn.nn.norm import LayerNorm, RMSNorm
from tests.helpers import assert_close
from tests.ops import nestings

SIZE = 4
LAYER = LayerNorm(SIZE, eps=1e-3).to(torch.float64)
RMS = RMSNorm(SIZE, eps=1e-3).to(torch.float64)


def _layer(x, w, b):
    centred = x - x.sum(-1, keepdim=True) / SIZE
    return centred / ((centred * centred).sum(-1, keepdim=True) / SIZE + 1e-3) ** 0.5 * w + b


def _rms(x, w, b):
    return x / ((x * x).sum(-1, keepdim=True) / SIZE + 1e-3) ** 0.5 * w + b


def _mlp(activation):
    """Only the activation of a Transformer's MLP: both of its linear maps are replaced by the identity."""
    options = {"input": "continuous", "in_features": 1, "dim": SIZE, "position": "none", "activation": activation}
    mlp = Transformer(**options).blocks[0].mlp
    mlp.up = mlp.down = torch.nn.Identity()
    return mlp


GELU, SWIGLU = _mlp("gelu"), _mlp("swiglu")
PAIRS = {
    "layer_norm": (lambda x, w, b: functional_call(LAYER, {"weight": w, "bias": b}, (x,)), _layer),
    "rms_norm": (lambda x, w, b: functional_call(RMS, {"weight": w}, (x,)) + b, _rms),
    "gelu": (lambda x, w, b: GELU(x * w + b), lambda x, w, b: _gelu(x * w + b)),
    "swiglu": (
        lambda x, w, b: SWIGLU(torch.cat((x * w, x + b), -1)),
        lambda x, w, b: x * w / (1 + torch.exp(-x * w)) * (x + b),
    ),
}


def _gelu(x):
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def _inputs(seed):
    g = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(s, generator=g, dtype=torch.float64) for s in ((3, SIZE), (SIZE,), (SIZE,)))


@pytest.mark.parametrize("nesting", [*nestings.FIRST, *nestings.SECOND, *nestings.THIRD], ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", PAIRS)
def test_every_nesting(name, nesting):
    x, ts = _inputs(1), [_inputs(seed) for seed in (2, 3, 4)]
    # The nestings take functions with two outputs, like attention.
    got, want = (nesting(lambda *x, f=f: (f(*x), f(*x).cos().sum(-1)), x, ts) for f in PAIRS[name])
    assert_close(got, want)
