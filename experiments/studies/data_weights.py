"""Learn how much each data source is worth, by differentiating through the training of a language model.

A byte-level Transformer is trained on a weighted mixture of sources: the text of Python's standard library, clean, with
bytes replaced by noise at several rates, and with shuffled bytes. Every few steps the weights are updated by the
derivative of the loss on clean held-out text, taken through those steps. Afterwards new models are trained on the
learned mixture, on equal parts and on the clean source only. Prints a table, writes JSON and a plot; exits with code 1
if the clean source does not get the largest weight.

It takes a minute on a CPU. Settings for a GPU, with longer text and a larger model:
  python -m experiments.data_weights device=cuda dim=384 depth=6 heads=6 length=512 batch=32 inner_steps=8
  meta_steps=1000 meta_learning_rate=0.02

The inner learning rate must be small enough for the loss to decrease throughout. Where the steps are too long, shorter
steps lower the loss: the weights move to noise, whose gradients are small (the short-horizon bias of Wu et al. 2018,
arXiv 1803.02021). With inner_learning_rate=0.2 pure noise ends above the clean source.

Source: Ren et al. 2018 (arXiv 1803.09050), with weights of sources in place of weights of examples.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from matplotlib import pyplot as plt
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F
from tqdm import tqdm

from metaattn.meta import adapt, sgd
from metaattn.meta.optim import Params
from metaattn.tasks.episodes import generator

from ..errors import UserError
from ..output import integer_ticks, legend_below, save_figure, write_json
from ..training.config import ONE, POSITIVE, Backend, GradientName, Limit, check_limits
from ..training.setup import find_device
from ._settings import fail, parse, plain
from .text import byte_model, corpus, windows

MIXTURE = "mixture"  # the key of the mixture's logits among the parameters


@dataclass
class Settings:
    """The sources, the model, and the settings of both training levels."""

    noise: list[float] = field(default_factory=lambda: [0.2, 0.5, 1.0])
    shuffled: bool = True
    length: int = 32
    batch: int = 8
    dim: int = 32
    depth: int = 2
    heads: int = 4
    inner_steps: int = 4
    meta_steps: int = 60
    inner_learning_rate: float = 0.05
    meta_learning_rate: float = 0.2
    gradient: GradientName = GradientName.reverse
    backend: Backend = Backend.auto
    device: str = "auto"
    threads: int = 1  # so small a model is not faster on more
    seed: int = 0
    out: str = "outputs/data_weights"


LIMITS: dict[str, Limit] = {
    **dict.fromkeys(("length", "batch", "inner_steps", "meta_steps", "threads"), ONE),
    **dict.fromkeys(("inner_learning_rate", "meta_learning_rate"), POSITIVE),
}


def check(s: Settings) -> None:
    """Check that every setting is valid.

    Raises:
        UserError: A setting is not; the message names it.
    """
    check_limits(s, LIMITS)
    if len(names(s)) < 2 or not all(0 < rate <= 1 for rate in s.noise):
        raise UserError(
            f"noise must be rates above 0 and at most 1, for at least one source besides the clean one; got {s.noise}"
        )
    if s.gradient not in (GradientName.reverse, GradientName.mixed):
        raise UserError(
            f"gradient={s.gradient.value} does not differentiate through the inner gradients, and the weights act only "
            "through them; give gradient=reverse or gradient=mixed"
        )


def names(s: Settings) -> list[str]:
    """Return the names of the sources, the clean one first."""
    return ["clean", *(f"{rate:.0%} noise" for rate in s.noise), *(["shuffled"] if s.shuffled else [])]


def mixed_batch(s: Settings, text: Tensor, step: int) -> Tensor:
    """Return a batch of every source, ``[sources, batch, length + 1]``; it depends only on the seed and the step."""
    g = generator(s.seed, step)
    sources = [windows(text, s.batch, s.length, g)]
    for rate in s.noise:
        x = windows(text, s.batch, s.length, g)
        noise = torch.randint(256, x.shape, generator=g)
        sources.append(torch.where(torch.rand(x.shape, generator=g) < rate, noise, x))
    if s.shuffled:
        x = windows(text, s.batch, s.length, g)
        sources.append(x.gather(1, torch.rand(x.shape, generator=g).argsort(1)))
    return torch.stack(sources)


class Study:
    """The model, its data and the losses of both levels.

    Args:
        s: The settings.
    """

    def __init__(self, s: Settings) -> None:
        self.s, self.device, self.text = s, find_device(s.device), corpus()
        self.model = byte_model(s.seed, backend=s.backend, dim=s.dim, depth=s.depth, heads=s.heads).to(self.device)
        self.start: Params = {k: p.detach() for k, p in self.model.named_parameters()}

    def losses(self, params: Params, tokens: Tensor) -> Tensor:
        """Return the mean cross-entropy of each source, in nats per byte.

        Args:
            params: The parameters of the model.
            tokens: ``[sources, batch, length + 1]``.

        Returns:
            ``[sources]``.
        """
        of_model = {k: p for k, p in params.items() if k != MIXTURE}
        logits = functional_call(self.model, of_model, (tokens[..., :-1],))
        targets = tokens[..., 1:]
        losses = F.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="none")
        return losses.view_as(targets).mean((1, 2))

    def mixture_loss(self, params: Params, tokens: Tensor) -> Tensor:
        """Return the inner loss: the weighted sum of the sources' losses."""
        return params[MIXTURE].softmax(0) @ self.losses(params, tokens)

    def steps(self, params: Params, mixture: Tensor, first: int, count: int) -> Params:
        """Return the parameters after steps ``first`` to ``first + count - 1``, differentiable in ``mixture``."""
        for step in range(first, first + count):
            # One call for each step, which has its own batch; gradient descent has no state to pass between them.
            params = adapt(
                self.mixture_loss,
                {**params, MIXTURE: mixture},
                (mixed_batch(self.s, self.text["train"], step).to(self.device),),
                optimizer=sgd(),
                rates=self.s.inner_learning_rate,
                steps=1,
                adapts=list(self.start),
                gradient=self.s.gradient.value,
            )
        return {k: params[k] for k in self.start}

    def held_out(self, params: Params, split: str, step: int, count: int) -> Tensor:
        """Return the loss on ``count`` pieces of clean text of a split, a scalar."""
        g = generator(self.s.seed + 1, step)
        return self.losses(params, windows(self.text[split], count, self.s.length, g)[None].to(self.device))[0]


def learn(study: Study) -> tuple[Tensor, list[float]]:
    """Learn the weights while the model is trained.

    Returns:
        The weights before, between and after the meta-steps, ``[meta_steps + 1, sources]``, and the loss on held-out
        text of each meta-step.

    Raises:
        UserError: The loss or its gradient is not finite.
    """
    s = study.s
    mixture = torch.zeros(len(names(s)), device=study.device, requires_grad=True)
    optimizer = torch.optim.Adam([mixture], s.meta_learning_rate)
    params, weights, losses = study.start, [mixture.detach().softmax(0).cpu()], []
    for meta_step in (bar := tqdm(range(s.meta_steps), desc="weights", leave=False)):
        adapted = study.steps(params, mixture, meta_step * s.inner_steps, s.inner_steps)
        loss = study.held_out(adapted, "validation", meta_step, 4 * s.batch)
        (mixture.grad,) = torch.autograd.grad(loss, mixture)
        if not (math.isfinite(loss.item()) and mixture.grad.isfinite().all()):
            raise UserError(f"the loss or its gradient is not finite at step {meta_step}; lower inner_learning_rate")
        optimizer.step()
        params = {k: p.detach() for k, p in adapted.items()}
        weights.append(mixture.detach().softmax(0).cpu())
        losses.append(loss.item())
        bar.set_postfix_str(f"loss {loss.item():.3f}, clean {weights[-1][0]:.1%}")
    return torch.stack(weights), losses


def retrain(study: Study, mixtures: dict[str, Tensor]) -> dict[str, list[float]]:
    """Train a new model on each mixture.

    Returns:
        For each mixture the loss on test text after every ``inner_steps`` steps.
    """
    s = study.s
    out: dict[str, list[float]] = {name: [] for name in mixtures}
    with tqdm(total=len(mixtures) * s.meta_steps, desc="new models", leave=False) as bar, torch.no_grad():
        for name, weights in mixtures.items():
            params, logits = study.start, weights.log().to(study.device)
            for meta_step in range(s.meta_steps):
                params = study.steps(params, logits, meta_step * s.inner_steps, s.inner_steps)
                out[name].append(study.held_out(params, "test", 0, 16 * s.batch).item())
                bar.update()
    return out


def plot(path: Path, labels: list[str], weights: Tensor, curves: dict[str, list[float]], s: Settings) -> None:
    """Plot the weights against meta-steps, and the losses of new models against steps."""
    figure, axes = plt.subplots(1, 2, figsize=(12, 4.8))
    for label, line in zip(labels, weights.T, strict=True):
        axes[0].plot(line.numpy(), label=label, lw=2.5 if label == "clean" else 1.5)
    axes[0].axhline(1 / len(labels), color="black", lw=0.8, ls="--", label="equal parts")
    axes[0].set(xlabel="meta-step", ylabel="weight", title="Learned weights of the sources", ylim=(0, None))
    x = [s.inner_steps * (i + 1) for i in range(s.meta_steps)]
    for name, losses in curves.items():
        axes[1].plot(x, [loss / math.log(2) for loss in losses], label=name)
    axes[1].set(xlabel="step", ylabel="bits per byte", title="New models on clean test text")
    for axis in axes:
        axis.grid(alpha=0.3)
        integer_ticks(axis)
        legend_below(axis, 3)
    save_figure(figure, path)


def main() -> None:
    """Run the study; exit with code 1 if the clean source does not get the largest weight."""
    s = parse(Settings, "experiments.data_weights")
    try:
        check(s)
        torch.set_num_threads(s.threads)
        study = Study(s)
        weights, losses = learn(study)
    except (UserError, NotImplementedError, ValueError, RuntimeError) as error:
        fail(str(error).splitlines()[0])
    labels, final = names(s), weights[-1]
    clean = torch.zeros(len(labels))
    clean[0] = 1
    curves = retrain(study, {"clean source only": clean, "learned weights": final, "equal parts": weights[0]})
    out = Path(s.out)
    out.mkdir(parents=True, exist_ok=True)
    content: dict[str, Any] = {
        "settings": plain(s),
        "sources": labels,
        "weights": weights.tolist(),
        "held_out_loss": losses,
        "test_loss": curves,
    }
    write_json(out / "data_weights.json", content)
    plot(out / "data_weights.png", labels, weights, curves, s)
    print(f"Learned weights of {len(labels)} sources after {s.meta_steps} meta-steps of {s.inner_steps} steps")
    for label, weight in zip(labels, final.tolist(), strict=True):
        print(f"  {label:<20} {weight:7.1%}")
    print("Bits per byte of clean test text, new models")
    for name, curve in curves.items():
        print(f"  {name:<20} {curve[-1] / math.log(2):7.3f}")
    print(f"written to {out}")
    if not (final[0] > final[1:]).all():
        print("the clean source does not have the largest weight", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
