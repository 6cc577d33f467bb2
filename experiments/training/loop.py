"""The outer loop of meta-training, from the first step to the final evaluation."""

from __future__ import annotations

import functools
import math
import time
import warnings
from pathlib import Path
from typing import Any, NoReturn

import torch
from omegaconf import OmegaConf
from torch import Tensor

from metaattn.compile import capture
from metaattn.tasks.cache import replacing

from ..errors import RunStoppedError, UserError
from . import checkpoint, distributed, evaluate, report
from . import state as states
from .config import Compile, Config, Kind, Schedule
from .directory import set_aside
from .interrupts import StoppedBySignal, collect_signals
from .metrics import RunLog
from .setup import Setup


def learning_rate(config: Config, step: int) -> float:
    """Return the outer learning rate of a step: a linear warm-up, then constant or a cosine down to a hundredth."""
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
        out: The directory of the checkpoints.
        saved: The content of the checkpoint to resume, see :func:`.state.resume`, or ``None`` to start.

    Raises:
        UserError: There are fewer tasks than processes, or fewer steps than the checkpoint has.
    """

    def __init__(self, run: Setup, out: Path, saved: dict[str, Any] | None) -> None:
        self.run, self.out, self.config = run, out, run.config
        self.first_task, self.tasks = distributed.share(self.config.train.tasks)
        self.state = states.start(run) if saved is None else states.resume(run, saved, out)
        self._log: RunLog | None = None
        self._prefetched: tuple[int, Any] = (-1, None)  # a step and its tasks, on the CPU
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

    def save(self, name: str) -> None:
        """Write a checkpoint of the current state; only the first process does."""
        if distributed.is_first():
            if self._log is not None:
                self.state.rows = len(self._log.rows)
            checkpoint.save(self.out / name, self.state.content(self.config))

    def train(self, log: RunLog) -> None:
        """Take the remaining steps.

        Args:
            log: Receives the metrics.

        Raises:
            RunStoppedError: The loss, its gradient or the metric of a validation is not finite.
            StoppedBySignal: SIGINT or SIGTERM was received; ``latest.pt`` holds the last complete step.
            LostProcessError: Another process has ended.
        """
        c, state, self._log = self.config.train, self.state, log
        with collect_signals() as signals:
            start, first = time.perf_counter(), state.step
            while state.step < c.steps:
                try:
                    before = self._metrics_before() if self._is_logged(state.step + 1) else None
                    metrics, rate = self._take_step()
                except distributed.LostProcessError:
                    self.save("latest.pt")  # the parameters are still those of the last complete step
                    raise
                state.step += 1
                if before is not None:
                    speed = (state.step - first) / (time.perf_counter() - start)
                    log.training(state.step, {**before, **metrics, "learning_rate": rate, "steps_per_second": speed})
                log.advance()
                if state.step % c.validate_every == 0 or state.step == c.steps:
                    self._validate(log)
                if state.step % c.checkpoint_every == 0 or state.step == c.steps:
                    self.save("latest.pt")
                if number := distributed.largest(signals[0] if signals else 0):
                    self.save("latest.pt")
                    distributed.largest(0)  # a barrier: no process ends before the first one has saved
                    raise StoppedBySignal(number)
            if state.best == -math.inf:  # a resumed run without remaining steps and without best.pt
                self._validate(log)

    def _is_logged(self, step: int) -> bool:
        return step == 1 or step % self.config.train.log_every == 0

    def _batch(self) -> Any:
        """Return this process's tasks of the current step."""
        self._prefetch(self.state.step)
        return self.run.move(self._prefetched[1])

    def _prefetch(self, step: int) -> None:
        if step != self._prefetched[0]:
            first = step * self.config.train.tasks + self.first_task
            self._prefetched = step, self.run.draw("train", first, self.tasks)

    def _mean(self, when: str, values: dict[str, Tensor]) -> dict[str, float]:
        """Return the means over the tasks of all processes; ``when`` becomes the suffix of the names."""
        means = {f"{k}_{when}": v.mean().item() for k, v in values.items()}
        return distributed.mean(means, self.tasks / self.config.train.tasks)

    def _metrics_before(self) -> dict[str, float]:
        """Return the metrics of the current step's tasks before adaptation."""
        return self._mean("before", evaluate.adaptation(self.run, self.state.meta, self._batch(), 0))

    def _take_step(self) -> tuple[dict[str, float], float]:
        """Update the meta-parameters once; return the metrics after adaptation and the learning rate."""
        c, state = self.config.train, self.state
        distributed.seed(self.config.seed, state.step)
        rate = learning_rate(self.config, state.step)
        for group in state.optimizer.param_groups:
            group["lr"] = rate
        (losses, metrics), gradient = self._value_and_grad(self._batch())
        if state.step + 1 < c.steps:
            self._prefetch(state.step + 1)  # while a GPU still computes this step
        means = self._mean("after", {"loss": losses, **metrics})
        gradient = distributed.mean_gradient(gradient, self.tasks / c.tasks)
        for group_name, group in state.meta.items():
            for k, t in group.items():
                t.grad = gradient[group_name][k]
        norm = torch.nn.utils.clip_grad_norm_(state.tensors, math.inf if c.clip is None else c.clip)
        loss = means["loss_after"]
        if not (math.isfinite(loss) and math.isfinite(norm.item())):
            what = f"loss is {loss}" if not math.isfinite(loss) else f"gradient's norm is {norm.item()}"
            self._stop(f"{what} at step {state.step + 1}")
        state.optimizer.step()
        return means, rate

    def _value_and_grad(self, batch: Any) -> Any:
        """Return losses, metrics and the meta-gradient of this process's tasks, compiled or captured if requested."""
        state = self.state
        meta = {name: {k: t.detach() for k, t in group.items()} for name, group in state.meta.items()}
        learner = self.run.learner.at(state.step / self.config.train.steps)
        if learner is self.run.learner:
            return self.captured(meta, tuple(batch.support), tuple(batch.query))
        # Annealed settings are constants of a graph: each step would need another graph.
        return learner.value_and_grad(meta, *batch, chunk_size=self.config.train.chunk_size)

    def _stop(self, problem: str) -> NoReturn:
        last = self.out / "latest.pt"
        raise RunStoppedError(
            f"the {problem}; the last good checkpoint is {last}, of step {checkpoint.load(last, step=int)['step']}. "
            "Try a lower train.learning_rate or algorithm.learning_rate"
        )

    def _validate(self, log: RunLog) -> None:
        """Evaluate on validation tasks; save ``best.pt`` if the score is the best so far."""
        c, state = self.config, self.state
        curves, _ = evaluate.held_out(
            self.run, state.meta, "validation", c.train.validation_tasks, c.test.chunk_size, c.algorithm.steps
        )
        row = {f"{k}_before": v[:, 0].mean().item() for k, v in curves.items()}
        row |= {f"{k}_after": v[:, -1].mean().item() for k, v in curves.items()}
        log.validation(state.step, row)
        score = row[f"{self.run.metric}_after"] * (-1 if self.run.metric == "loss" else 1)
        if not math.isfinite(score):
            self._stop(f"{self.run.metric} of validation is {score} at step {state.step}")
        if score > state.best:
            state.best = score
            self.save("best.pt")


def _check_best(run: Setup, out: Path) -> None:
    """Set a damaged ``best.pt`` of a resumed run aside, with a warning; the next validation writes another."""
    path = out / "best.pt"
    if distributed.is_first() and path.exists():
        try:
            states.restore_meta(run, checkpoint.load(path, meta=dict, step=int)["meta"])
        except UserError as error:
            aside = set_aside(path)
            warnings.warn(f"{path} cannot be used ({error}): it is now {aside}; the run validates again", stacklevel=2)
    distributed.largest(0)  # a barrier: the other processes look for the file afterwards


def train(run: Setup, out: Path, saved: dict[str, Any] | None = None) -> dict[str, Any]:
    """Meta-train, then evaluate the best checkpoint on test tasks.

    Args:
        run: What to train.
        out: The directory for checkpoints, metrics, plots and ``summary.json``.
        saved: The content of the checkpoint to resume, see :func:`.state.resume`, or ``None`` to start.

    Returns:
        The summary of the evaluation, see :func:`.evaluate.test`.

    Raises:
        UserError: The run cannot start or continue, see :class:`Trainer`.
        StoppedBySignal: SIGINT or SIGTERM was received.
    """
    config = run.config
    if saved is not None:
        _check_best(run, out)
    trainer = Trainer(run, out, saved)
    if distributed.is_first() and (saved is None or not (out / "latest.pt").exists()):  # or resumed elsewhere
        with replacing(out / "config.yaml") as file:
            file.write(OmegaConf.to_yaml(OmegaConf.structured(config), resolve=True).encode())
        trainer.save("latest.pt")
    title = f"{config.algorithm.name} on {config.task.name.value}"
    log = RunLog(out, trainer.state.step, config.train.steps, title, trainer.state.rows)
    try:
        with log:
            trainer.train(log)
    finally:
        if log.rows:
            adapts_to_query = config.algorithm.kind is Kind.reptile
            report.learning(out / "learning.png", log.rows, run.metric, run.chance, adapts_to_query=adapts_to_query)
    seconds = trainer.state.seconds
    content = checkpoint.load(checkpoint.find(out, "best.pt"), meta=dict, step=int)
    meta = states.restore_meta(run, content["meta"])
    parameters = sum(p.numel() for p in run.model.parameters())
    return evaluate.test(run, meta, out, content["step"], seconds=seconds, parameters=parameters)
