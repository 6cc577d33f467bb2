"""How far results are from what they should be."""

import math
from typing import Any

import torch
from torch.utils._pytree import tree_leaves


def relative_error(got: Any, want: Any) -> float:
    """In the 2-norm, over all tensors of two trees with the same leaves."""
    pairs = list(zip(tree_leaves(got), tree_leaves(want), strict=True))
    top = sum((a.detach().to(b.device, torch.float64) - b).square().sum().item() for a, b in pairs)
    return math.sqrt(top / max(1e-300, sum(b.double().square().sum().item() for _, b in pairs)))
