"""Memory in the weights: a language model of a short window that learns, while it reads, from what it has read.

A causal byte-level Transformer sees a window of a few bytes. It reads a long text in chunks; after each chunk it
takes a gradient step on that chunk's loss in a part of its weights, so that what left the window can still help.
Initial weights and learning rates are meta-learned through all of these steps: the outer loss is that of every chunk
before the model learned from it. Beside it: the same model with its steps left out, and a model of the same size
trained in the ordinary way, without steps and with them. Prints a table, writes JSON and a plot; exits 1 if reading
does not help the meta-learned model.

On a GPU, longer and larger:
  python -m experiments.long_context device=cuda chunks=32 chunk=512 window=256 dim=384 depth=6 heads=6 batch=8
  meta_steps=3000

Source: test-time training of language models, Tandon et al. 2025 (arXiv 2512.23675).
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from matplotlib import pyplot as plt
from torch import Tensor
from torch.func import functional_call, vmap
from torch.nn import functional as F
from tqdm import tqdm

from metaattn.meta import adapt, sgd
from metaattn.meta.optim import Params
from metaattn.tasks.episodes import generator

from ..errors import UserError
from ..training import report
from ..training.config import ONE, POSITIVE, Backend, GradientName, Limit, check_limits
from ..training.setup import find_device
from ._settings import fail, parse, plain
from .text import byte_model, corpus, windows

BIT = math.log(2)


@dataclass
class Settings:
    """The text, the model, and how both levels are trained."""

    chunks: int = 16
    chunk: int = 32
    window: int = 32
    batch: int = 4
    dim: int = 64
    depth: int = 2
    heads: int = 4
    adapts: list[str] = field(default_factory=lambda: ["blocks.1.mlp.*"])
    inner_learning_rate: float = 1.0
    meta_steps: int = 150
    meta_learning_rate: float = 0.003
    test_texts: int = 64
    gradient: GradientName = GradientName.reverse
    backend: Backend = Backend.auto
    device: str = "auto"
    seed: int = 0
    out: str = "outputs/long_context"


LIMITS: dict[str, Limit] = {
    **dict.fromkeys(("chunk", "window", "batch", "meta_steps", "test_texts"), ONE),
    **dict.fromkeys(("inner_learning_rate", "meta_learning_rate"), POSITIVE),
}


def check(s: Settings) -> None:
    """Every setting is one that there can be.

    Raises:
        UserError: One that is not, by its name.
    """
    check_limits(s, LIMITS)
    if s.chunks < 2:
        raise UserError(f"chunks must be at least 2, for there is nothing to remember in the first; got {s.chunks}")
    if s.gradient is GradientName.implicit:
        raise UserError("gradient=implicit is that of a minimum, and a chunk is one step; give gradient=mixed")


class Study:
    """The model, its text and the losses of both levels.

    Args:
        s: The settings.
    """

    def __init__(self, s: Settings) -> None:
        self.s, self.device, self.text = s, find_device(s.device), corpus()
        self.model = byte_model(
            s.seed, backend=s.backend, dim=s.dim, depth=s.depth, heads=s.heads, window=(s.window - 1, None)
        ).to(self.device)
        self.start: Params = {k: p.detach() for k, p in self.model.named_parameters()}
        self.adapts = [k for k in self.start if any(fnmatchcase(k, pattern) for pattern in s.adapts)]
        if not self.adapts:
            raise UserError(f"no parameter matches adapts={s.adapts}; there are {', '.join(self.start)}")
        self.rates: Params = {k: torch.tensor(s.inner_learning_rate, device=self.device) for k in self.adapts}

    def texts(self, split: str, step: int, count: int) -> Tensor:
        """Stretches of a split, ``[count, chunks * chunk + 1]``: a function of the seed and the step alone."""
        g = generator(self.s.seed + (split != "train"), step)
        return windows(self.text[split], count, self.s.chunks * self.s.chunk, g).to(self.device)

    def chunk_loss(self, params: Params, tokens: Tensor) -> Tensor:
        """Nats for each byte of the last ``chunk`` ones, after those before them."""
        predicted = functional_call(self.model, params, (tokens[:-1],))
        return F.cross_entropy(predicted[-self.s.chunk :], tokens[1:][-self.s.chunk :])

    def read(self, params: Params, rates: Params, tokens: Tensor) -> Tensor:
        """The loss of every chunk of one text before the step on it, ``[chunks]``; without rates there are no steps."""
        s, losses = self.s, []
        for i in range(s.chunks):
            # What the window of the chunk's first byte reaches: at each layer one window further back.
            first = max(0, i * s.chunk - s.depth * s.window)
            seen = tokens[first : (i + 1) * s.chunk + 1]
            losses.append(self.chunk_loss(params, seen))
            if rates and i + 1 < s.chunks:
                params = adapt(
                    self.chunk_loss,
                    params,
                    (seen,),
                    optimizer=sgd(),
                    rates=rates,
                    steps=1,
                    adapts=self.adapts,
                    gradient=s.gradient.value,
                )
        return torch.stack(losses)

    def train(self, name: str, rates: Params) -> tuple[Params, Params, list[float]]:
        """Train initial weights, and learning rates if there are any; with the loss of each step."""
        s = self.s
        leaves = [{k: t.clone().requires_grad_() for k, t in group.items()} for group in (self.start, rates)]
        optimizer = torch.optim.Adam([t for group in leaves for t in group.values()], s.meta_learning_rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, s.meta_steps, 0.1 * s.meta_learning_rate)
        read: Callable[..., Tensor] = vmap(self.read, (None, None, 0))
        losses = []
        for step in (bar := tqdm(range(s.meta_steps), desc=name, leave=False)):
            loss = read(leaves[0], leaves[1], self.texts("train", step, s.batch)).mean()
            optimizer.zero_grad()
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_([t for group in leaves for t in group.values()], 1.0)
            if not (math.isfinite(loss.item()) and math.isfinite(norm.item())):
                raise UserError(f"the loss or its gradient is not finite at step {step}; lower inner_learning_rate")
            optimizer.step()
            schedule.step()
            losses.append(loss.item() / BIT)
            bar.set_postfix_str(f"{losses[-1]:.3f} bits per byte")
        params, learned = ({k: t.detach() for k, t in group.items()} for group in leaves)
        return params, learned, losses

    def test(self, params: Params, rates: Params) -> Tensor:
        """Bits per byte of each chunk, the mean of all test texts: ``[chunks]``."""
        read: Callable[..., Tensor] = vmap(self.read, (None, None, 0), chunk_size=self.s.batch)
        with torch.no_grad():
            return read(params, rates, self.texts("test", 0, self.s.test_texts)).mean(0).cpu() / BIT


def plot(path: Path, chunk: int, curves: dict[str, Tensor], training: dict[str, list[float]]) -> None:
    """Bits per byte against the position in the text, and against training steps."""
    figure, axes = plt.subplots(1, 2, figsize=(12, 4.8))
    for name, values in curves.items():
        x = [chunk * (i + 1) for i in range(len(values))]
        axes[0].plot(x, values.numpy(), "-o", ms=4, label=name, lw=2.5 if name == "learns as it reads" else 1.5)
    axes[0].set(xlabel="bytes read", ylabel="bits per byte of the last chunk", title="Held-out text")
    for name, losses in training.items():
        axes[1].plot(losses, label=name, lw=1)
    axes[1].set(xlabel="training step", ylabel="bits per byte", title="Training")
    for axis in axes:
        axis.grid(alpha=0.3)
        report._legend_below(axis, 2)
    report._save(figure, path)


def main() -> None:
    """Train, test, show and judge."""
    s = parse(Settings, "experiments.long_context")
    try:
        check(s)
        study = Study(s)
        params, rates, losses = study.train("meta-training", study.rates)
        ordinary, _, ordinary_losses = study.train("ordinary training", {})
    except (UserError, NotImplementedError, ValueError) as error:
        fail(str(error).splitlines()[0])
    curves = {
        "learns as it reads": study.test(params, rates),
        "the same, steps left out": study.test(params, {}),
        "ordinary training": study.test(ordinary, {}),
        "ordinary training, with steps": study.test(ordinary, study.rates),
    }
    out = Path(s.out)
    out.mkdir(parents=True, exist_ok=True)
    content: dict[str, Any] = {
        "settings": plain(s),
        "learning_rates": {k: r.item() for k, r in rates.items()},
        "bits_per_byte": {name: values.tolist() for name, values in curves.items()},
        "training": {"meta-training": losses, "ordinary training": ordinary_losses},
    }
    report.write_json(out / "long_context.json", content)
    plot(out / "long_context.png", s.chunk, curves, content["training"])
    print(f"Bits per byte of {s.test_texts} held-out texts, by chunks of {s.chunk} bytes; a window of {s.window} bytes")
    print(f"  {'':<30} {'first':>7} {'last':>7} {'mean':>7}")
    for name, values in curves.items():
        print(f"  {name:<30} {values[0]:7.3f} {values[-1]:7.3f} {values.mean():7.3f}")
    print(f"written to {out}")
    if not curves["learns as it reads"][1:].mean() < curves["the same, steps left out"][1:].mean():
        print("reading does not help", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
