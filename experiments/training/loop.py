"""The outer loop: meta-training, and what a run does from its start to its end."""

from __future__ import annotations

import functools
import math
import signal
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch
from omegaconf import OmegaConf
from torch import Tensor
from tqdm import tqdm

from metaattn.compile import capture

from ..errors import RunStoppedError, UserError
from . import checkpoint, distributed, evaluate, report
from .config import Compile, Config, Kind, Schedule
from .setup import Setup


class StoppedBySignal(Exception):  # noqa: N818 - no error: the user or the machine asked for it
    """A signal ended the run after its state was saved."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.code = 128 + number


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Collect Ctrl-C and SIGTERM, so that the step under way can end; a second one ends it at once."""
    seen: list[int] = []

    def note(number: int, _: Any) -> None:
        if seen:
            raise KeyboardInterrupt
        seen.append(number)

    old = {s: signal.signal(s, note) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        try:
            yield seen
        finally:
            for s, handler in old.items():
                signal.signal(s, handler)
    except BaseException:
        distributed.outlive_torchrun()
        raise


def learning_rate(config: Config, step: int) -> float:
    """The outer learning rate at a step: a linear warm-up, then constant or a cosine down to a hundredth."""
    c = config.train
    if step < c.warmup:
        return c.learning_rate * (step + 1) / c.warmup
    if c.schedule is Schedule.constant:
        return c.learning_rate
    progress = (step - c.warmup) / max(1, c.steps - c.warmup)
    return c.learning_rate * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))


class Trainer:
    """Meta-training of a run, from its start or from a checkpoint.

    Args:
        run: What to train.
        out: Where to write.
        resume: The checkpoint to go on from.

    Raises:
        UserError: Fewer tasks than processes, or fewer steps than the checkpoint has.
    """

    def __init__(self, run: Setup, out: Path, resume: Path | None) -> None:
        self.run, self.out, self.config = run, out, run.config
        self.first_task, self.tasks = distributed.share(self.config.train.tasks)
        self.step, self.best, self._began = 0, -math.inf, time.perf_counter()
        entries = {"meta": dict, "optimizer": dict, "step": int, "best": float, "rng": dict}
        content = checkpoint.load(resume, **entries) if resume else None
        if content is None:
            self.meta = run.learner.init(dict(run.model.named_parameters()))
        else:
            self.meta = evaluate.restore_meta(run, content["meta"])
            self.step = content["step"]
            if (out / "best.pt").is_file():  # a copy may be without: then the next validation is the best
                self.best = content["best"]
            self._began -= content.get("seconds", 0.0)  # older checkpoints have none
            if self.step > self.config.train.steps:
                raise UserError(
                    f"the run is at step {self.step} already; train.steps={self.config.train.steps} would do nothing"
                )
        self.leaves = [t for group in self.meta.values() for t in group.values()]
        self.optimizer = torch.optim.Adam(self.leaves, self.config.train.learning_rate)
        if content is not None:
            self.optimizer.load_state_dict(content["optimizer"])
            checkpoint.set_rng_state(content["rng"])
        self.captured = capture(
            functools.partial(run.learner.value_and_grad, chunk_size=self.config.train.chunk_size),
            mode=self.config.compile.value,
        )
        if self.config.compile is not Compile.none and run.learner.at(0.0) is not run.learner:
            warnings.warn(
                f"the steps run eagerly: algorithm={self.config.algorithm.name} changes from step to step, and a "
                f"compiled or captured step has fixed settings; leave out compile={self.config.compile.value}",
                stacklevel=2,
            )
        self._drawn: tuple[int, Any] = (-1, None)  # the tasks of a step, on the CPU
        self.metrics = report.Metrics(out, self.step) if distributed.is_first() else None

    @property
    def seconds(self) -> float:
        """How long the run has trained, in all of its sessions."""
        return time.perf_counter() - self._began

    def save(self, name: str) -> None:
        """Write a checkpoint of now: the first rank does."""
        if not distributed.is_first():
            return
        content = {
            "meta": {g: {k: t.detach() for k, t in group.items()} for g, group in self.meta.items()},
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "best": self.best,
            "seconds": self.seconds,
            "rng": checkpoint.rng_state(),
            "config": OmegaConf.to_container(OmegaConf.structured(self.config), resolve=True, enum_to_str=True),
            "torch": str(torch.__version__),
        }
        checkpoint.save(self.out / name, content)

    def train(self) -> None:
        """Take the steps that are left.

        Raises:
            RunStoppedError: The loss, its gradient or a validation is no longer finite.
            StoppedBySignal: Ctrl-C or SIGTERM; ``latest.pt`` holds the last whole step.
            LostProcessError: Another process is gone.
        """
        c = self.config.train
        if self.step == 0:
            self.save("latest.pt")
        bar = tqdm(
            total=c.steps,
            initial=self.step,
            desc=f"{self.config.algorithm.name} on {self.config.task.name.value}",
            disable=not distributed.is_first(),
        )
        with bar, _signals() as signals:
            start, first = time.perf_counter(), self.step
            while self.step < c.steps:
                try:
                    before = self._before() if self._due(c.log_every) else None
                    metrics, rate = self._take_step()
                except distributed.LostProcessError:
                    self.save("latest.pt")  # nothing of the step is done
                    raise
                self.step += 1
                if before is not None:
                    speed = (self.step - first) / (time.perf_counter() - start)
                    row = {**before, **metrics, "learning_rate": rate, "steps_per_second": speed}
                    self._log("train", row)
                    bar.set_postfix_str(_postfix(row))
                bar.update()
                if self.step % c.validate_every == 0 or self.step == c.steps:
                    self._validate()
                if self.step % c.checkpoint_every == 0 or self.step == c.steps:
                    self.save("latest.pt")
                if number := distributed.largest(signals[0] if signals else 0):
                    self.save("latest.pt")
                    distributed.largest(0)  # no process ends before it is saved
                    raise StoppedBySignal(number)
            if self.best == -math.inf:  # no step was left to take
                self._validate()

    def _due(self, every: int) -> bool:
        return (self.step + 1) % every == 0 or self.step == 0

    def _batch(self) -> Any:
        """The tasks of the step that are this rank's."""
        self._draw(self.step)
        return self.run.move(self._drawn[1])

    def _draw(self, step: int) -> None:
        if step != self._drawn[0]:
            first = step * self.config.train.tasks + self.first_task
            self._drawn = step, self.run.draw("train", first, self.tasks)

    def _log(self, split: str, row: dict[str, float]) -> None:
        if self.metrics is not None:
            self.metrics.add({"step": self.step, "split": split, **row})

    def _mean(self, when: str, values: dict[str, Tensor]) -> dict[str, float]:
        """The means over all tasks of the step of what the tasks of this rank have."""
        means = {f"{k}_{when}": v.mean().item() for k, v in values.items()}
        return distributed.mean(means, self.tasks / self.config.train.tasks)

    def _before(self) -> dict[str, float]:
        """The metrics of the step's tasks without adaptation."""
        return self._mean("before", evaluate.adaptation(self.run, self.meta, self._batch(), 0))

    def _take_step(self) -> tuple[dict[str, float], float]:
        """One update; the metrics and the learning rate."""
        c = self.config.train
        distributed.seed(self.config.seed, self.step)
        rate = learning_rate(self.config, self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        batch = self._batch()
        (losses, metrics), gradient = self._value_and_grad(batch)
        if self.step + 1 < c.steps:
            self._draw(self.step + 1)  # while a GPU still works on this one
        means = self._mean("after", {"loss": losses, **metrics})
        gradient = distributed.mean_gradient(gradient, self.tasks / c.tasks)
        for group_name, group in self.meta.items():
            for k, t in group.items():
                t.grad = gradient[group_name][k]
        norm = torch.nn.utils.clip_grad_norm_(self.leaves, math.inf if c.clip is None else c.clip)
        loss = means["loss_after"]
        if not (math.isfinite(loss) and math.isfinite(norm.item())):
            what = f"loss is {loss}" if not math.isfinite(loss) else f"gradient's norm is {norm.item()}"
            self._stop(f"{what} at step {self.step + 1}")
        self.optimizer.step()
        return means, rate

    def _value_and_grad(self, batch: Any) -> Any:
        """Losses, metrics and the meta-gradient of this rank's tasks; compiled or as a replayed graph if so asked."""
        meta = {name: {k: t.detach() for k, t in group.items()} for name, group in self.meta.items()}
        learner = self.run.learner.at(self.step / self.config.train.steps)
        if learner is self.run.learner:
            return self.captured(meta, tuple(batch.support), tuple(batch.query))
        # Annealed settings are constants of a graph: it would be another one at each step.
        return learner.value_and_grad(meta, *batch, chunk_size=self.config.train.chunk_size)

    def _stop(self, what: str) -> NoReturn:
        last = self.out / "latest.pt"
        raise RunStoppedError(
            f"the {what}; the last good checkpoint is {last}, of step {checkpoint.load(last, step=int)['step']}. Try a "
            "lower train.learning_rate or algorithm.learning_rate"
        )

    def _validate(self) -> None:
        """Metrics on validation tasks; a new best is saved."""
        c, steps = self.config, self.config.algorithm.steps
        curves, _ = evaluate.held_out(
            self.run, self.meta, "validation", c.train.validation_tasks, c.test.chunk_size, steps
        )
        row = {f"{k}_before": v[:, 0].mean().item() for k, v in curves.items()}
        row |= {f"{k}_after": v[:, -1].mean().item() for k, v in curves.items()}
        self._log("validation", row)
        if distributed.is_first():
            tqdm.write(f"step {self.step:>6}  validation  {_postfix(row)}")
        score = row[f"{self.run.metric}_after"] * (-1 if self.run.metric == "loss" else 1)
        if not math.isfinite(score):
            self._stop(f"{self.run.metric} of validation is {score} at step {self.step}")
        if score > self.best:
            self.best = score
            self.save("best.pt")


def _postfix(row: dict[str, float]) -> str:
    text = f"loss {row['loss_before']:.3f} → {row['loss_after']:.3f}"
    if "accuracy_after" in row:
        text += f", accuracy {row['accuracy_before']:.1%} → {row['accuracy_after']:.1%}"
    return text


def train(run: Setup, out: Path, resume: Path | None) -> dict[str, Any]:
    """Meta-train, evaluate the best checkpoint on test tasks, write all that a run leaves; the summary."""
    trainer = Trainer(run, out, resume)
    if resume is None and distributed.is_first():
        (out / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.structured(run.config), resolve=True))
    try:
        trainer.train()
    finally:
        if trainer.metrics is not None:
            trainer.metrics.close()
            if trainer.metrics.rows:
                seen = run.config.algorithm.kind is Kind.reptile
                report.learning(out / "learning.png", trainer.metrics.rows, run.metric, run.chance, seen=seen)
    seconds = trainer.seconds
    summary = evaluate.run_evaluation(run, checkpoint.find(out, "best.pt"), out)
    summary |= {"seconds": seconds, "parameters": sum(p.numel() for p in run.model.parameters())}
    if distributed.is_first():
        report.write_json(out / "summary.json", summary)
    return summary
