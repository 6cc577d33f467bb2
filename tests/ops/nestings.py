"""Nestings of derivatives: functions of attention, its inputs and three tangents that return tensors to compare."""

import numpy as np
import torch
from torch.autograd import forward_ad
from torch.func import grad, jacfwd, jacrev, jvp, linearize, vjp, vmap


def loss_of(attention):
    """Return a scalar loss, nonlinear in out, lse and all inputs, to which rows without keys contribute nothing."""

    def loss(*inputs):
        finite = (torch.where(torch.isinf(x), 0.0, x) for x in inputs)
        curved = (torch.where(torch.isinf(x), x, y + 0.1 * y.square()) for x, y in zip(inputs, finite, strict=True))
        out, lse = attention(*curved)
        lse = torch.where(torch.isinf(lse), 0.0, lse)
        return out.tanh().square().sum() + 0.3 * lse.sin().sum()

    return loss


def _all(inputs):
    return tuple(range(len(inputs)))


def _dot(a, b):
    return sum((x * y).sum() for x, y in zip(a, b, strict=True))


def _grad(f, inputs):
    return grad(f, _all(inputs))


def _along(f, tangents):
    """Return the directional derivative of f as a function of its inputs."""
    return lambda *x: jvp(f, x, tangents)[1]


def value(attention, x, ts):
    return attention(*x)


def grad_(attention, x, ts):
    return _grad(loss_of(attention), x)(*x)


def vjp_out(attention, x, ts):
    (out, lse), pull = vjp(attention, *x)
    return pull((out.sin(), torch.zeros_like(lse)))


def vjp_lse(attention, x, ts):
    (out, lse), pull = vjp(attention, *x)
    return pull((torch.zeros_like(out), torch.where(torch.isinf(lse), 0.0, lse).cos()))


def jvp_(attention, x, ts):
    return jvp(attention, x, ts[0])[1]


def jvp_each(attention, x, ts):
    out = []
    for i in range(len(x)):
        f = lambda t, i=i: attention(*x[:i], t, *x[i + 1 :])
        out.append(jvp(f, (x[i],), (ts[0][i],))[1])
    return out


def grad_each_hvp(attention, x, ts):
    """Forward over reverse along one input at a time: the terms that absent tangents leave out must be zero."""
    loss = loss_of(attention)
    out = []
    for i in range(len(x)):
        f = lambda t, i=i: _grad(loss, x)(*x[:i], t, *x[i + 1 :])
        out.append(jvp(f, (x[i],), (ts[0][i],))[1])
    return out


def grad_grad(attention, x, ts):
    g = _grad(loss_of(attention), x)
    return _grad(lambda *x: _dot(g(*x), ts[0]).sin(), x)(*x)


def grad_grad_square(attention, x, ts):
    g = _grad(loss_of(attention), x)
    return _grad(lambda *x: _dot(g(*x), g(*x)), x)(*x)


def jvp_grad(attention, x, ts):
    return jvp(_grad(loss_of(attention), x), x, ts[0])


def grad_jvp(attention, x, ts):
    return _grad(_along(loss_of(attention), ts[0]), x)(*x)


def jvp_vjp(attention, x, ts):
    """The cotangent moves too."""
    out, lse = attention(*x)
    w, w_t = out.cos(), out.sin()
    f = lambda w, *x: vjp(attention, *x)[1]((w, torch.zeros_like(lse)))
    return jvp(f, (w, *x), (w_t, *ts[0]))[1]


def grad_vjp(attention, x, ts):
    """Double backward, also with respect to the cotangent."""
    out, lse = attention(*x)
    f = lambda w, *x: _dot(vjp(attention, *x)[1]((w, torch.zeros_like(lse))), ts[0])
    return grad(f, tuple(range(len(x) + 1)))(out.cos(), *x)


def jvp_jvp(attention, x, ts):
    f = loss_of(attention)
    return jvp(_along(f, ts[0]), x, ts[1])[1]


def vjp_jvp_tangent(attention, x, ts):
    """The derivative of a JVP with respect to its tangent is the VJP."""
    f = lambda *t: jvp(attention, x, t)[1][0].sin().sum()
    return _grad(f, x)(*ts[0])


def jvp_jvp_tangent(attention, x, ts):
    """Both the point and the tangent move."""
    f = lambda x, t: jvp(attention, x, t)[1]
    return jvp(f, (x, ts[0]), (ts[1], ts[2]))[1]


def grad3(attention, x, ts):
    g = _grad(loss_of(attention), x)
    h = _grad(lambda *x: _dot(g(*x), ts[0]).sin(), x)
    return _grad(lambda *x: _dot(h(*x), ts[1]), x)(*x)


def jvp3(attention, x, ts):
    f = loss_of(attention)
    return jvp(_along(_along(f, ts[0]), ts[1]), x, ts[2])[1]


def jvp_jvp_grad(attention, x, ts):
    return jvp(_along(_grad(loss_of(attention), x), ts[0]), x, ts[1])[1]


def jvp_grad_grad(attention, x, ts):
    g = _grad(loss_of(attention), x)
    return jvp(_grad(lambda *x: _dot(g(*x), ts[0]), x), x, ts[1])[1]


def jvp_grad_jvp(attention, x, ts):
    return jvp(_grad(_along(loss_of(attention), ts[0]), x), x, ts[1])[1]


def grad_jvp_grad(attention, x, ts):
    h = _along(_grad(loss_of(attention), x), ts[0])
    return _grad(lambda *x: _dot(h(*x), ts[1]), x)(*x)


def grad_jvp_jvp(attention, x, ts):
    return _grad(_along(_along(loss_of(attention), ts[0]), ts[1]), x)(*x)


def grad_grad_jvp(attention, x, ts):
    g = _grad(_along(loss_of(attention), ts[0]), x)
    return _grad(lambda *x: _dot(g(*x), ts[1]), x)(*x)


def _linearized(f, x):
    """Linearise without warnings: PyTorch traces with uninitialised tangents, which interpreted kernels warn about."""
    with np.errstate(over="ignore", invalid="ignore"):
        return linearize(f, *x)


def linearize_(attention, x, ts):
    out, tangent_map = _linearized(attention, x)
    return out, tangent_map(*ts[0])


def linearize_grad(attention, x, ts):
    return _linearized(_grad(loss_of(attention), x), x)[1](*ts[0])


def jacrev_(attention, x, ts):
    return jacrev(attention, _all(x))(*x)


def jacfwd_(attention, x, ts):
    return jacfwd(attention, _all(x), randomness="same")(*x)


def hessian_(attention, x, ts):
    return jacfwd(jacrev(loss_of(attention), _all(x)), _all(x), randomness="same")(*x)


def jacrev_jacrev(attention, x, ts):
    return jacrev(jacrev(loss_of(attention), _all(x)), _all(x))(*x)


def jacfwd_jacfwd(attention, x, ts):
    f = jacfwd(loss_of(attention), _all(x), randomness="same")
    return jacfwd(f, _all(x), randomness="same")(*x)


def jacrev_jacfwd(attention, x, ts):
    return jacrev(jacfwd(loss_of(attention), _all(x), randomness="same"), _all(x))(*x)


def _stack(x, ts):
    """Return inputs with a mapped dimension: the inputs and two perturbations of them."""
    return tuple(torch.stack([a, a + 0.1 * b, a - 0.2 * c]) for a, b, c in zip(x, ts[0], ts[1], strict=True))


def vmap_value(attention, x, ts):
    return vmap(attention, randomness="same")(*_stack(x, ts))


def vmap_grad_grad(attention, x, ts):
    f = lambda *x: grad_grad(attention, x, ts)
    return vmap(f, randomness="same")(*_stack(x, ts))


def vmap_jvp_grad(attention, x, ts):
    f = lambda *x: jvp_grad(attention, x, ts)
    return vmap(f, randomness="same")(*_stack(x, ts))


def vmap_jvp_jvp(attention, x, ts):
    f = lambda *x: jvp_jvp(attention, x, ts)
    return vmap(f, randomness="same")(*_stack(x, ts))


def grad_vmap(attention, x, ts):
    f = lambda *x: vmap(loss_of(attention), randomness="same")(*x).square().sum()
    return _grad(f, x)(*_stack(x, ts))


def jvp_vmap_jvp(attention, x, ts):
    """Forward mode over vmap over forward mode."""
    inner = lambda *x: vmap(_along(loss_of(attention), ts[0]), randomness="same")(*x)
    s = _stack(x, ts)
    return jvp(inner, s, tuple(a.sin() for a in map(torch.nan_to_num, s)))[1]


def grad_vmap_grad(attention, x, ts):
    """A gradient for each sample, and a gradient through all of them, as in MAML."""
    g = vmap(_grad(loss_of(attention), x), randomness="same")
    return _grad(lambda *x: sum(t.square().sum() for t in g(*x)), x)(*_stack(x, ts))


def vmap_vmap_grad(attention, x, ts):
    s = tuple(torch.stack([a, 1.1 * a]) for a in _stack(x, ts))
    f = lambda *x: grad_(attention, x, ts)
    return vmap(vmap(f, randomness="same"), randomness="same")(*s)


def _leaves(x):
    return tuple(t.detach().clone().requires_grad_() for t in x)


def eager_double(attention, x, ts):
    x = _leaves(x)
    g = torch.autograd.grad(loss_of(attention)(*x), x, create_graph=True)
    return torch.autograd.grad(_dot(g, ts[0]).sin(), x)


def eager_triple(attention, x, ts):
    x = _leaves(x)
    g = torch.autograd.grad(loss_of(attention)(*x), x, create_graph=True)
    h = torch.autograd.grad(_dot(g, ts[0]).sin(), x, create_graph=True)
    return torch.autograd.grad(_dot(h, ts[1]), x)


def eager_hvp(attention, x, ts):
    return torch.autograd.functional.hvp(loss_of(attention), x, ts[0])[1]


def eager_batched(attention, x, ts):
    """Batched cotangents, by the legacy vmap of ``is_grads_batched``."""
    x = _leaves(x)
    g = torch.autograd.grad(loss_of(attention)(*x), x, create_graph=True)
    w = tuple(torch.stack([t, 2 * t.cos()]) for t in ts[0])
    return torch.autograd.grad(g, x, w, is_grads_batched=True)


def dual_level(attention, x, ts):
    with forward_ad.dual_level():
        out = attention(*(forward_ad.make_dual(a, t) for a, t in zip(x, ts[0], strict=True)))
        return [forward_ad.unpack_dual(o).tangent for o in out]


def dual_over_reverse(attention, x, ts):
    with forward_ad.dual_level():
        duals = tuple(forward_ad.make_dual(a, t) for a, t in zip(_leaves(x), ts[0], strict=True))
        g = torch.autograd.grad(loss_of(attention)(*duals), duals)
        return [forward_ad.unpack_dual(t).tangent for t in g]


def reverse_over_dual(attention, x, ts):
    x = _leaves(x)
    with forward_ad.dual_level():
        duals = tuple(forward_ad.make_dual(a, t) for a, t in zip(x, ts[0], strict=True))
        tangent = forward_ad.unpack_dual(loss_of(attention)(*duals)).tangent
        return torch.autograd.grad(tangent, x)


# torch.func.linearize calls the function, then traces it. Where the function draws random numbers, its value and its
# tangent map belong to different draws, as with PyTorch's own dropout.
NOT_RANDOM = [linearize_, linearize_grad]
# Matrices of thousands of columns: minutes in the interpreter.
LARGE = [jacrev_, jacfwd_, hessian_, jacrev_jacrev, jacfwd_jacfwd, jacrev_jacfwd]
# torch.func.jacfwd raises for inputs without elements.
NOT_EMPTY = [hessian_, jacfwd_jacfwd, jacrev_jacfwd]
FIRST = [
    value,
    grad_,
    vjp_out,
    vjp_lse,
    jvp_,
    jvp_each,
    linearize_,
    jacrev_,
    jacfwd_,
    vmap_value,
    grad_vmap,
    dual_level,
]
SECOND = [
    grad_each_hvp,
    grad_grad,
    grad_grad_square,
    jvp_grad,
    grad_jvp,
    jvp_vjp,
    grad_vjp,
    jvp_jvp,
    vjp_jvp_tangent,
    jvp_jvp_tangent,
    linearize_grad,
    hessian_,
    jacrev_jacrev,
    jacfwd_jacfwd,
    jacrev_jacfwd,
    vmap_grad_grad,
    vmap_jvp_grad,
    vmap_jvp_jvp,
    jvp_vmap_jvp,
    grad_vmap_grad,
    vmap_vmap_grad,
    eager_double,
    eager_hvp,
    eager_batched,
    dual_over_reverse,
    reverse_over_dual,
]
THIRD = [
    grad3,
    jvp3,
    jvp_jvp_grad,
    jvp_grad_grad,
    jvp_grad_jvp,
    grad_jvp_grad,
    grad_jvp_jvp,
    grad_grad_jvp,
    eager_triple,
]
