"""The oracle, which is dense attention written out, and the one way to compare results with it."""

import math
import re

import torch
from torch.utils._pytree import tree_leaves

# The relative error in the 2-norm, against float64, that a result may have in each dtype. In float64 this is a few
# hundred roundings of 1e-16. In the others it is about 2 (float32, bfloat16) to 4 (float16, whose range is smaller)
# units in the last place on the worst of the cases here.
TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def dense(
    query,
    key,
    value,
    attn_mask=None,
    *,
    is_causal=False,
    scale=None,
    enable_gqa=False,
    window=None,
    dropout=None,
):
    """Compute out and lse by the definition, in operations that every mode differentiates.

    The softmax is written with ``exp``: PyTorch's softmax and logsumexp fail in reverse mode over a forward_ad level.
    ``dropout`` is the matrix of dropout weights, each 0 or 1/(1-p).
    """
    if enable_gqa:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
        value = value.repeat_interleave(query.shape[-3] // value.shape[-3], -3)
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    scores = scale * (query @ key.mT)
    i = torch.arange(query.shape[-2])[:, None]
    j = torch.arange(key.shape[-2])
    left, right = window or (None, None)
    shown = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool)
    if is_causal:
        shown = shown & (j <= i)
    if left is not None:
        shown = shown & (j >= i - left)
    if right is not None:
        shown = shown & (j <= i + right)
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            shown = shown & attn_mask
        else:
            scores = scores + attn_mask
    e = torch.where(shown, torch.exp(scores), 0.0)
    total = e.sum(-1, keepdim=True)
    empty = total.detach() == 0
    total = torch.where(empty, 1.0, total)
    p = e / total
    if dropout is not None:
        p = p * dropout
    lse = torch.where(empty, -math.inf, torch.log(total)).squeeze(-1)
    return p @ value, lse


def error(got, want):
    """Return the largest relative error of a leaf in the 2-norm; it is absolute where the expected leaf is tiny."""
    got, want = ([x for x in tree_leaves(tree) if x is not None] for tree in (got, want))
    assert len(got) == len(want), f"{len(got)} results, expected {len(want)}"
    worst = 0.0
    for g, w in zip(got, want, strict=True):
        assert g.shape == w.shape, f"shape {tuple(g.shape)}, expected {tuple(w.shape)}"
        g, w = g.detach().double(), w.detach().double()
        infinite = torch.isinf(w)
        assert torch.equal(torch.where(infinite, g, 0.0), torch.where(infinite, w, 0.0)), "infinities differ"
        g, w = g[~infinite], w[~infinite]
        assert torch.isfinite(g).all(), "NaN or infinity"
        if w.numel():
            size = max(w.norm().item(), 1e-3 * math.sqrt(w.numel()))
            worst = max(worst, (g - w).norm().item() / size)
    return worst


def as_vector(tree):
    """Return all leaves as one vector, with zeros for infinities.

    For low precision: a leaf whose exact value is zero by cancellation, such as the gradient of a bias that shifts
    whole rows, has no meaningful relative error by itself.
    """
    leaves = [t for t in tree_leaves(tree) if t is not None]
    return torch.cat([torch.where(torch.isinf(t), 0.0, t).double().flatten() for t in leaves])


def assert_close(got, want, dtype=torch.float64, factor=1.0):
    """Assert that every leaf of ``got`` is within the dtype's tolerance (times ``factor``) of ``want``."""
    e, limit = error(got, want), factor * TOLERANCE[dtype]
    assert e <= limit, f"relative error {e:.1e}, at most {limit:.1e} allowed"


def python_blocks(path):
    """Return the Python blocks of a Markdown page, in order."""
    return re.findall(r"^```python\n(.*?)^```", path.read_text(), re.DOTALL | re.MULTILINE)
