"""Small models of PyTorch and other authors, as functions of parameters and inputs, and derivatives of them."""

import contextlib

import torch
from torch import nn
from torch.func import functional_call, grad, jvp, vmap
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

F64 = {"dtype": torch.float64}
PADDING = torch.tensor([[False] * 4, [False, False, True, True]])
CAUSAL = nn.Transformer.generate_square_subsequent_mask(4, **F64)


@contextlib.contextmanager
def dense_pytorch():
    """Use PyTorch's dense attention, which has all derivatives, everywhere in the block."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


class DiTBlock(nn.Module):
    """A block of a diffusion Transformer: attention and MLP, modulated by a condition (adaLN-Zero).

    Source:
        Peebles and Xie 2023 (arXiv 2212.09748), section 3.2.
    """

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(dim, elementwise_affine=False, **F64)
        self.qkv, self.out = nn.Linear(dim, 3 * dim, **F64), nn.Linear(dim, dim, **F64)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim, **F64), nn.GELU("tanh"), nn.Linear(2 * dim, dim, **F64))
        self.modulation = nn.Linear(dim, 6 * dim, **F64)

    def forward(self, x, condition):
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = (
            self.modulation(F.silu(condition)).unsqueeze(1).chunk(6, -1)
        )
        y = self.norm(x) * (1 + scale_a) + shift_a
        q, k, v = self.qkv(y).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v)
        x = x + gate_a * self.out(y.transpose(1, 2).flatten(-2))
        return x + gate_m * self.mlp(self.norm(x) * (1 + scale_m) + shift_m)


def _layer(kind, **options):
    return kind(8, 2, 12, dropout=0.0, **options, **F64)


def encoder(norm_first=False, batch_first=True, layers=2):
    layer = _layer(nn.TransformerEncoderLayer, norm_first=norm_first, batch_first=batch_first)
    return nn.TransformerEncoder(layer, layers, enable_nested_tensor=batch_first and not norm_first)


def decoder():
    return nn.TransformerDecoder(_layer(nn.TransformerDecoderLayer, batch_first=True), 1)


class _Output(nn.Module):
    """Output of a MultiheadAttention and, if present, its weights, as one tensor."""

    def __init__(self, **options):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, **options, **F64)

    def forward(self, x, memory, **masks):
        out, weights = self.attention(x, memory, memory, **masks)
        return out if weights is None else torch.cat((out.flatten(), weights.flatten()))


def _attention(**options):
    return lambda: _Output(**options)


# The model, its number of inputs, and its other arguments.
MODELS = {
    "encoder": (encoder, 1, {}),
    "encoder padded": (encoder, 1, {"src_key_padding_mask": PADDING}),
    "encoder norm first": (lambda: encoder(norm_first=True), 1, {"src_key_padding_mask": PADDING}),
    "encoder causal": (lambda: encoder(norm_first=True), 1, {"mask": CAUSAL, "is_causal": True}),
    "encoder length first": (lambda: encoder(batch_first=False), 1, {}),
    "decoder": (decoder, 2, {"tgt_mask": CAUSAL, "tgt_is_causal": True, "memory_key_padding_mask": PADDING}),
    "attention": (_attention(batch_first=True), 2, {"need_weights": False, "attn_mask": CAUSAL}),
    "attention length first": (_attention(), 2, {"need_weights": False}),
    "attention weights": (_attention(batch_first=True), 2, {"need_weights": True, "attn_mask": CAUSAL < 0}),
    "DiT": (lambda: DiTBlock(8, 2), 2, {}),
}


def loss_of(name, training=False):
    """:func:`loss_of_model` for one of :data:`MODELS`."""
    build, count, options = MODELS[name]
    shapes = [(2, 4, 8), (2, 8) if name == "DiT" else (2, 4, 8)]
    return loss_of_model(build().train(training), [torch.randn(shape, **F64) for shape in shapes[:count]], **options)


def loss_of_model(model, inputs, **options):
    """Return a loss as a function of a dict of the model's parameters and inputs, and such a dict."""
    point = {f"model.{k}": torch.randn_like(p) / 2 for k, p in model.named_parameters()}
    point |= {str(i): x for i, x in enumerate(inputs)}

    def loss(point):
        parameters = {k.removeprefix("model."): p for k, p in point.items() if k.startswith("model.")}
        return functional_call(model, parameters, tuple(point[str(i)] for i in range(len(inputs))), options).sin().sum()

    return loss, point


def _direction(point):
    return {k: torch.linspace(-1, 1, t.numel(), **F64).view_as(t) for k, t in point.items()}


def jvp_(loss, point):
    return jvp(loss, (point,), (_direction(point),))[1]


def double_backward(loss, point):
    leaves = {k: t.clone().requires_grad_() for k, t in point.items()}
    gradients = torch.autograd.grad(loss(leaves), list(leaves.values()), create_graph=True)
    return torch.autograd.grad(sum(g.square().sum() for g in gradients), list(leaves.values()))


def forward_over_reverse(loss, point):
    return jvp(grad(loss), (point,), (_direction(point),))[1]


def reverse_over_reverse(loss, point):
    t = _direction(point)
    return grad(lambda p: sum((g * t[k]).sum() for k, g in grad(loss)(p).items()))(point)


def vmap_forward_over_reverse(loss, point):
    """Forward over reverse at two points at once, by vmap."""
    points = {k: torch.stack([t, 0.9 * t]) for k, t in point.items()}
    return vmap(lambda p: forward_over_reverse(loss, p))(points)


def each_forward_over_reverse(loss, point):
    """Forward over reverse at the same two points, one after the other."""
    each = [forward_over_reverse(loss, {k: s * t for k, t in point.items()}) for s in (1, 0.9)]
    return {k: torch.stack([e[k] for e in each]) for k in point}


# A derivative, and the one with which it is compared.
DERIVATIVES = {
    "jvp": (jvp_, jvp_),
    "double backward": (double_backward, double_backward),
    "forward over reverse": (forward_over_reverse, forward_over_reverse),
    "reverse over reverse": (reverse_over_reverse, reverse_over_reverse),
    "vmap": (vmap_forward_over_reverse, each_forward_over_reverse),
}
