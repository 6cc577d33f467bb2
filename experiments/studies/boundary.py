"""Find out which attention supports which nesting of derivatives on this machine.

PyTorch's scaled_dot_product_attention with each of its backends, FlexAttention, plain PyTorch operations and metaattn
are called under each nesting, and their results are compared with the dense formula in float64. Prints a table, writes
JSON and an image.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib import pyplot as plt
from matplotlib.patches import Patch, Rectangle
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, hessian, jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

import metaattn

from ..errors import UserError
from ..output import save_figure, write_json
from ..training.setup import find_device
from ._dense import dense_attention
from ._settings import fail, parse

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
LIMIT = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.05}  # largest relative error of a correct result


@dataclass
class Settings:
    """The device, and the directory of the results."""

    device: str = "auto"
    out: str = "outputs/boundary"


def _torch_sdpa(kind: SDPBackend) -> Attention:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(kind):
            return F.scaled_dot_product_attention(q, k, v)

    return attention


def _ours(backend: str) -> Attention:
    return lambda q, k, v: metaattn.sdpa(q, k, v, backend=backend)


def attentions(device: str) -> dict[str, Attention]:
    """Return the attentions to try on a type of device, by name."""
    pytorch = {
        "PyTorch flash": SDPBackend.FLASH_ATTENTION,
        "PyTorch memory-efficient": SDPBackend.EFFICIENT_ATTENTION,
        "PyTorch cuDNN": SDPBackend.CUDNN_ATTENTION,
        "PyTorch math": SDPBackend.MATH,
    }
    out: dict[str, Attention] = {name: _torch_sdpa(kind) for name, kind in pytorch.items()}
    out |= {"PyTorch FlexAttention": flex_attention, "written out": dense_attention}
    names = ["reference", "blockwise"] + (["triton"] if device == "cuda" else [])
    return out | {f"metaattn {name}": _ours(name) for name in names}


def _loss(a: Attention, k: Tensor, v: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda q: a(q, k, v).float().square().sum() if q.dtype != torch.float64 else a(q, k, v).square().sum()


def _double_backward(a: Attention, q: Tensor, k: Tensor, v: Tensor, t: Tensor) -> Any:
    x = q.clone().requires_grad_()
    (g,) = torch.autograd.grad(_loss(a, k, v)(x), x, create_graph=True)
    return torch.autograd.grad((g * t).sum(), x)


def _forward_ad(a: Attention, q: Tensor, k: Tensor, v: Tensor, t: Tensor) -> Any:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(a(forward_ad.make_dual(q, t), k, v)).tangent


def _backward(a: Attention, q: Tensor, k: Tensor, v: Tensor, t: Tensor) -> Any:
    x = q.clone().requires_grad_()
    return torch.autograd.grad(_loss(a, k, v)(x), x)


def _square_of_grad(a: Attention, k: Tensor, v: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda q: grad(_loss(a, k, v))(q).square().sum()


def _vmap_jvp_grad(a: Attention, q: Tensor, k: Tensor, v: Tensor, t: Tensor) -> Any:
    return vmap(lambda q: jvp(grad(_loss(a, k, v)), (q,), (t,))[1])(torch.stack([q, t]))


def _grad_vmap_grad(a: Attention, q: Tensor, k: Tensor, v: Tensor, t: Tensor) -> Any:
    return grad(lambda q: vmap(_square_of_grad(a, k, v))(torch.stack([q, t])).sum())(q)


Nesting = Callable[[Attention, Tensor, Tensor, Tensor, Tensor], Any]
NESTINGS: dict[str, Nesting] = {
    "forward": lambda a, q, k, v, t: a(q, k, v),
    "backward": _backward,
    "double backward": _double_backward,
    "forward_ad": _forward_ad,
    "func.grad": lambda a, q, k, v, t: grad(_loss(a, k, v))(q),
    "func.jvp": lambda a, q, k, v, t: jvp(lambda q: a(q, k, v), (q,), (t,))[1],
    "jvp∘grad": lambda a, q, k, v, t: jvp(grad(_loss(a, k, v)), (q,), (t,))[1],
    "grad∘jvp": lambda a, q, k, v, t: grad(lambda q: jvp(_loss(a, k, v), (q,), (t,))[1])(q),
    "grad∘grad": lambda a, q, k, v, t: grad(_square_of_grad(a, k, v))(q),
    "jvp∘jvp": lambda a, q, k, v, t: jvp(lambda q: jvp(_loss(a, k, v), (q,), (t,))[1], (q,), (t,))[1],
    "hessian": lambda a, q, k, v, t: hessian(lambda x: _loss(a, k, v)(torch.cat([x, q[:, :, 1:]], 2)))(q[:, :, :1]),
    "vmap": lambda a, q, k, v, t: vmap(lambda q: a(q, k, v))(torch.stack([q, t])),
    "vmap∘grad": lambda a, q, k, v, t: vmap(grad(_loss(a, k, v)))(torch.stack([q, t])),
    "vmap∘jvp∘grad": _vmap_jvp_grad,
    "grad∘vmap∘grad": _grad_vmap_grad,
}


def _flat(result: Any) -> Tensor:
    return torch.cat([t.detach().double().cpu().flatten() for t in tree_leaves(result)])


def probe(attention: Attention, nesting: Nesting, inputs: tuple[Tensor, ...]) -> dict[str, Any]:
    """Try one attention under one nesting.

    Args:
        attention: A function of query, key and value ``[B, H, N, D]``.
        nesting: One of :data:`NESTINGS`.
        inputs: Query, key, value and a tangent of the query.

    Returns:
        ``status``: ``"right"`` or ``"wrong"`` with the relative ``error``; ``"raises"`` or ``"absent"`` (not available
        on this machine) with the message as ``note``.
    """
    try:
        attention(*inputs[:3])
    except (RuntimeError, NotImplementedError, ValueError) as error:
        return {"status": "absent", "note": str(error).splitlines()[0][:200]}
    want = _flat(nesting(dense_attention, *(x.double() for x in inputs)))
    try:
        got = _flat(nesting(attention, *inputs))
    except Exception as error:  # any exception is a result of the study
        return {
            "status": "raises",
            "note": f"{type(error).__name__}: {(str(error) or '-').strip().splitlines()[0][:200]}",
        }
    e = ((got - want).norm() / want.norm()).item()
    return {"status": "right" if e < LIMIT[inputs[0].dtype] else "wrong", "error": e}


def plot(path: Path, table: dict[str, dict[str, Any]], machine: str) -> None:
    """Draw the table as coloured cells."""
    colours = {"right": "#2ca02c", "wrong": "#d62728", "raises": "#f2b45c", "absent": "#e5e5e5"}
    rows, columns = list(table), list(NESTINGS)
    figure, axis = plt.subplots(figsize=(0.8 * len(columns) + 3.2, 0.45 * len(rows) + 2.4))
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            status = table[row][column]["status"]
            axis.add_patch(Rectangle((j, i), 0.94, 0.9, color=colours[status]))
            mark = {"right": "✓", "wrong": "wrong", "raises": "✗", "absent": ""}[status]
            axis.text(j + 0.47, i + 0.45, mark, ha="center", va="center", fontsize=9)
    axis.set(xlim=(0, len(columns)), ylim=(len(rows), 0))
    axis.set_xticks([j + 0.47 for j in range(len(columns))], columns, rotation=40, ha="left", fontsize=9)
    axis.set_yticks([i + 0.45 for i in range(len(rows))], rows, fontsize=9)
    axis.xaxis.tick_top()
    axis.tick_params(length=0)
    for spine in axis.spines.values():
        spine.set_visible(False)
    labels = {"right": "correct", "raises": "raises", "wrong": "silently wrong", "absent": "not on this machine"}
    axis.legend(
        handles=[Patch(color=colours[k], label=v) for k, v in labels.items()],
        loc="upper center",
        bbox_to_anchor=(0.5, -0.02),
        ncol=4,
        frameon=False,
        fontsize=9,
    )
    figure.text(0.01, 0.01, machine, fontsize=7, color="grey")
    save_figure(figure, path)


def main() -> None:
    """Try every attention under every nesting, and report."""
    s = parse(Settings, "experiments.boundary")
    try:
        device = find_device(s.device)
    except UserError as error:
        fail(str(error))
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(0)
    inputs = tuple(torch.randn(1, 2, 16, 32, device=device).to(dtype) for _ in range(4))
    table: dict[str, dict[str, Any]] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, attention in tqdm(attentions(device.type).items(), desc="attentions", leave=False):
            table[name] = {n: probe(attention, nesting, inputs) for n, nesting in NESTINGS.items()}
    out = Path(s.out)
    out.mkdir(parents=True, exist_ok=True)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    machine = f"{name}, {str(dtype)[6:]}, torch {torch.__version__}"
    write_json(out / "boundary.json", {"where": machine, "table": table})
    plot(out / "boundary.png", table, machine)
    marks = {"right": "yes", "wrong": "WRONG", "raises": "-", "absent": "."}
    print(f"{machine}; yes: correct, -: raises, WRONG: silently wrong, .: not on this machine")
    width = max(map(len, table)) + 1
    print(" " * width + " ".join(NESTINGS))
    for row, cells in table.items():
        print(f"{row:<{width}}" + " ".join(f"{marks[cells[n]['status']]:>{len(n)}}" for n in NESTINGS))
    print(f"written to {out}")


if __name__ == "__main__":
    main()
