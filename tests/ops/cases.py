"""The calls of attention on which every backend is compared with the oracle."""

from dataclasses import dataclass, field
from functools import cache, cached_property

import torch

import metaattn
from tests.helpers import dense


@dataclass(frozen=True)
class Case:
    """Shapes of query, key and value, the options of a call, and its mask.

    ``mask`` is ``"bool"``, ``"bias"`` (additive and differentiated), ``"-inf"`` (additive, and hides) or ``None``.
    """

    query: tuple
    key: tuple
    value: tuple
    options: dict = field(default_factory=dict)
    mask: str | None = None
    mask_shape: tuple = ()
    layout: str = "dense"  # or "strided", "expanded"

    def inputs(self, dtype=torch.float64):
        """Return the differentiable inputs: query, key, value and, if it is additive, the mask."""
        shapes = [self.query, self.key, self.value] + ([self.mask_shape] if self.mask in ("bias", "-inf") else [])
        g = torch.Generator().manual_seed(1)
        out = []
        for shape in shapes:
            if self.layout == "strided":
                shape = (*shape[:-2], shape[-1], 2 * shape[-2])
            elif self.layout == "expanded":
                shape = (*shape[:-3], 1, *shape[-2:])
            out.append(torch.randn(shape, generator=g, dtype=torch.float64).to(dtype))
        if self.mask == "-inf":  # hides some keys, and all keys of the first row
            hide = torch.rand(self.mask_shape, generator=g) < 0.3
            hide[..., 0, :] = True
            out[3] = out[3].masked_fill(hide, -torch.inf)
        return tuple(out)

    def like(self, seed):
        """Return random tensors in the shapes of the inputs, to be their tangents."""
        g = torch.Generator().manual_seed(seed)
        return tuple(torch.randn(t.shape, generator=g, dtype=torch.float64) for t in self.inputs())

    @cached_property
    def bool_mask(self):
        if self.mask != "bool":
            return None
        g = torch.Generator().manual_seed(2)
        mask = torch.rand(self.mask_shape, generator=g) < 0.7
        if mask.shape[-2] > 1:
            mask[..., -1, :] = False  # hide all keys of the last row
        return mask

    def _split(self, inputs):
        """Return query, key and value in the layout of this case, and the mask."""
        mask = inputs[3] if len(inputs) == 4 else self.bool_mask
        if mask is not None:
            mask = mask.to(inputs[0].device)
        qkv = inputs[:3]
        if self.layout == "strided":  # every other row of a transposed tensor
            qkv = tuple(t[..., ::2].mT for t in qkv)
        elif self.layout == "expanded":  # one head for all
            qkv = tuple(t.expand(s) for t, s in zip(qkv, (self.query, self.key, self.value), strict=True))
        return qkv, mask

    def attention(self, backend):
        """Return the operator as a function of the differentiable inputs. Every call draws the same dropout mask."""
        _ = self.bool_mask  # draw it now, while no transform is active

        def f(*inputs):
            qkv, mask = self._split(inputs)
            torch.manual_seed(3)
            return metaattn.sdpa(*qkv, mask, **self.options, return_lse=True, backend=backend)

        return f

    def oracle(self):
        """Return the same function, written out as dense attention."""
        options = dict(self.options)
        p = options.pop("dropout_p", 0.0)
        _ = self.bool_mask  # draw it now, while no transform is active
        z = _dropout(self.query[:-1], self.key[-2], p) if p else None

        def f(*inputs):
            qkv, mask = self._split(inputs)
            return dense(*qkv, mask, **options, dropout=None if z is None else z.to(qkv[0].dtype))

        return f


@cache
def _dropout(rows, keys, p):
    """Return the dropout weights of a call on rows of this shape.

    They are read from the operator: with uniform attention to unit vectors its output is the weights over their number.
    """
    torch.manual_seed(3)
    query = torch.zeros(*rows, 1, dtype=torch.float64)
    eye = torch.eye(keys, dtype=torch.float64).expand(*rows[:-1], keys, keys)
    return keys * metaattn.sdpa(query, torch.zeros(*rows[:-1], keys, 1, dtype=torch.float64), eye, dropout_p=p)


CASES = {
    "plain": Case((2, 2, 5, 4), (2, 2, 5, 4), (2, 2, 5, 4)),
    "causal": Case((1, 2, 5, 4), (1, 2, 5, 4), (1, 2, 5, 4), {"is_causal": True}),
    "cross": Case((1, 2, 3, 4), (1, 2, 7, 4), (1, 2, 7, 4), {"is_causal": True}),
    "more_rows": Case((1, 2, 7, 3), (1, 2, 4, 3), (1, 2, 4, 3)),
    "value_size": Case((1, 2, 4, 3), (1, 2, 5, 3), (1, 2, 5, 6), {"scale": 0.7}),
    "gqa": Case((1, 4, 4, 3), (1, 2, 5, 3), (1, 2, 5, 3), {"enable_gqa": True}),
    "gqa_uneven": Case((1, 4, 4, 3), (1, 2, 5, 3), (1, 1, 5, 2), {"enable_gqa": True, "is_causal": True}),
    "mask": Case((2, 2, 5, 4), (2, 2, 4, 4), (2, 2, 4, 4), {}, "bool", (2, 1, 5, 4)),
    "mask_keys": Case((2, 2, 4, 4), (2, 2, 5, 4), (2, 2, 5, 4), {}, "bool", (2, 1, 1, 5)),
    "bias": Case((2, 2, 4, 3), (2, 2, 5, 3), (2, 2, 5, 3), {}, "bias", (2, 1, 5)),
    "bias_full": Case((1, 2, 4, 3), (1, 2, 5, 3), (1, 2, 5, 3), {}, "bias", (1, 2, 4, 5)),
    "bias_column": Case((2, 4, 3, 2), (2, 2, 4, 2), (2, 2, 4, 2), {"enable_gqa": True}, "bias", (4, 3, 1)),
    "bias_hides": Case((1, 2, 4, 3), (1, 2, 5, 3), (1, 2, 5, 3), {}, "-inf", (4, 5)),
    "window": Case((1, 2, 6, 3), (1, 2, 6, 3), (1, 2, 6, 3), {"window": (2, 1)}),
    "window_causal": Case((1, 2, 7, 3), (1, 2, 5, 3), (1, 2, 5, 3), {"window": (1, None), "is_causal": True}),
    "window_mask": Case((1, 1, 6, 3), (1, 1, 6, 3), (1, 1, 6, 3), {"window": (None, 2)}, "bool", (6, 6)),
    "dropout": Case((2, 2, 4, 3), (2, 2, 5, 3), (2, 2, 5, 3), {"dropout_p": 0.4}),
    "everything": Case(
        (1, 4, 5, 3),
        (1, 2, 6, 3),
        (1, 2, 6, 2),
        {"dropout_p": 0.3, "enable_gqa": True, "window": (3, 2), "scale": 0.5},
        "bias",
        (4, 1, 6),
    ),
    "two_dims": Case((4, 3), (5, 3), (5, 2)),
    "three_dims": Case((2, 4, 3), (2, 5, 3), (2, 5, 3)),
    "five_dims": Case((2, 1, 2, 3, 2), (2, 1, 2, 4, 2), (2, 1, 2, 4, 2), {}, "bias", (1, 3, 4)),
    "broadcast": Case((2, 1, 3, 3), (1, 2, 4, 3), (2, 4, 3)),
    "strided": Case((1, 2, 4, 3), (1, 2, 5, 3), (1, 2, 5, 3), layout="strided"),
    "expanded": Case((1, 2, 4, 3), (1, 2, 5, 3), (1, 2, 5, 3), layout="expanded"),
    "one": Case((1, 1, 1, 1), (1, 1, 1, 1), (1, 1, 1, 1)),
    "empty": Case((0, 2, 3, 2), (0, 2, 4, 2), (0, 2, 4, 2)),
}
