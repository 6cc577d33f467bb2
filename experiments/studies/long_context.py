"""Train a language model that stores a long text in its weights while it reads (test-time training).

A causal byte-level Transformer with a short attention window reads a long text in chunks. After each chunk it takes a
gradient step on the chunk's loss in some of its weights, so that text outside of the window can still help. The initial
weights and the learning rates are meta-learned through all of these steps: the outer loss is the loss of every chunk
before the model has learned from it. For comparison: the same model without the steps, and a model of the same size
after ordinary training, without and with steps. Prints a table, writes JSON and a plot; exits with code 1 if the steps
do not help the meta-learned model.

Settings for a GPU, with longer text and a larger model:
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
from ..output import legend_below, save_figure, write_json
from ..training.config import ONE, POSITIVE, Backend, GradientName, Limit, check_limits
from ..training.setup import find_device
from ._settings import fail, parse, plain
from .text import byte_model, corpus, windows

BIT = math.log(2)


@dataclass
class Settings:
    """The text, the model, and the settings of both training levels."""

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
    """Check that every setting is valid.

    Raises:
        UserError: A setting is not; the message names it.
    """
    check_limits(s, LIMITS)
    if s.chunks < 2:
        raise UserError(f"chunks must be at least 2, because the first has nothing to remember; got {s.chunks}")
    if s.gradient is GradientName.implicit:
        raise UserError(
            "gradient=implicit assumes a minimum of the inner loss, and a chunk is one step; give gradient=mixed"
        )


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
            raise UserError(f"no parameter matches adapts={s.adapts}; the parameters are {', '.join(self.start)}")
        self.rates: Params = {k: torch.tensor(s.inner_learning_rate, device=self.device) for k in self.adapts}

    def texts(self, split: str, step: int, count: int) -> Tensor:
        """Return texts of a split, ``[count, chunks * chunk + 1]``; they depend only on the seed and the step."""
        g = generator(self.s.seed + (split != "train"), step)
        return windows(self.text[split], count, self.s.chunks * self.s.chunk, g).to(self.device)

    def chunk_loss(self, params: Params, tokens: Tensor) -> Tensor:
        """Return the mean cross-entropy of the last ``chunk`` tokens given those before them, in nats per byte."""
        logits = functional_call(self.model, params, (tokens[:-1],))
        return F.cross_entropy(logits[-self.s.chunk :], tokens[1:][-self.s.chunk :])

    def read(self, params: Params, rates: Params, tokens: Tensor) -> Tensor:
        """Read one text.

        Args:
            params: The initial parameters.
            rates: The learning rate of each adapted parameter; empty to read without steps.
            tokens: ``[chunks * chunk + 1]``.

        Returns:
            The loss of every chunk before the step on it, ``[chunks]``.
        """
        s, losses = self.s, []
        for i in range(s.chunks):
            # The first token that influences the chunk: each layer looks back by one window.
            first = max(0, i * s.chunk - s.depth * s.window)
            context = tokens[first : (i + 1) * s.chunk + 1]
            losses.append(self.chunk_loss(params, context))
            if rates and i + 1 < s.chunks:
                params = adapt(
                    self.chunk_loss,
                    params,
                    (context,),
                    optimizer=sgd(),
                    rates=rates,
                    steps=1,
                    adapts=self.adapts,
                    gradient=s.gradient.value,
                )
        return torch.stack(losses)

    def train(self, name: str, rates: Params) -> tuple[Params, Params, list[float]]:
        """Train the initial weights, and the learning rates if there are any.

        Args:
            name: The label of the progress bar.
            rates: The initial learning rates; empty for ordinary training.

        Returns:
            The weights, the learning rates, and the loss of each step in bits per byte.

        Raises:
            UserError: The loss or its gradient is not finite.
        """
        s = self.s
        groups = [{k: t.clone().requires_grad_() for k, t in group.items()} for group in (self.start, rates)]
        optimizer = torch.optim.Adam([t for group in groups for t in group.values()], s.meta_learning_rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, s.meta_steps, 0.1 * s.meta_learning_rate)
        read: Callable[..., Tensor] = vmap(self.read, (None, None, 0))
        losses = []
        for step in (bar := tqdm(range(s.meta_steps), desc=name, leave=False)):
            loss = read(groups[0], groups[1], self.texts("train", step, s.batch)).mean()
            optimizer.zero_grad()
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_([t for group in groups for t in group.values()], 1.0)
            if not (math.isfinite(loss.item()) and math.isfinite(norm.item())):
                raise UserError(f"the loss or its gradient is not finite at step {step}; lower inner_learning_rate")
            optimizer.step()
            schedule.step()
            losses.append(loss.item() / BIT)
            bar.set_postfix_str(f"{losses[-1]:.3f} bits per byte")
        params, learned = ({k: t.detach() for k, t in group.items()} for group in groups)
        return params, learned, losses

    def test(self, params: Params, rates: Params) -> Tensor:
        """Return the bits per byte of each chunk, averaged over all test texts, ``[chunks]``."""
        read: Callable[..., Tensor] = vmap(self.read, (None, None, 0), chunk_size=self.s.batch)
        with torch.no_grad():
            return read(params, rates, self.texts("test", 0, self.s.test_texts)).mean(0).cpu() / BIT


def plot(path: Path, chunk: int, curves: dict[str, Tensor], training: dict[str, list[float]]) -> None:
    """Plot bits per byte against the position in the text, and against training steps."""
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
        legend_below(axis, 2)
    save_figure(figure, path)


def main() -> None:
    """Run the study; exit with code 1 if the inner steps do not help."""
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
        "the same, without steps": study.test(params, {}),
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
    write_json(out / "long_context.json", content)
    plot(out / "long_context.png", s.chunk, curves, content["training"])
    print(f"Bits per byte of {s.test_texts} held-out texts, by chunks of {s.chunk} bytes; a window of {s.window} bytes")
    print(f"  {'':<30} {'first':>7} {'last':>7} {'mean':>7}")
    for name, values in curves.items():
        print(f"  {name:<30} {values[0]:7.3f} {values[-1]:7.3f} {values.mean():7.3f}")
    print(f"written to {out}")
    if not curves["learns as it reads"][1:].mean() < curves["the same, without steps"][1:].mean():
        print("the steps on the text do not help the meta-learned model", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
