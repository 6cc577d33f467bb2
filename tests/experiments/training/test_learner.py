"""The table of tasks, algorithms and gradients of the defaults: each learns, or is rejected before any work."""

import itertools
import math
import os
import subprocess
import sys
from datetime import datetime

import pytest
import torch
from hydra import compose, initialize_config_dir

from experiments.errors import UserError
from experiments.training import choices, config, evaluate, loop, setup
from tests.experiments.training.runs import ROOT

ALGORITHMS = choices.groups()["algorithm"]
GRADIENTS = [g.value for g in config.GradientName]
CASES = [
    (task, algorithm, gradient)
    for task, algorithm, gradient in itertools.product(["glyphs", "sinusoid"], ALGORITHMS, GRADIENTS)
]
# Tasks do not adapt by gradient steps, or the inner loop is not differentiated.
WITHOUT_GRADIENT = ("prototypical", "reptile")


def _rejection(task, algorithm, gradient):
    """Return what the error says, or ``None`` for what learns."""
    if task == "sinusoid" and algorithm in ("prototypical", "proto_maml"):
        return f"algorithm={algorithm} is for classification"
    if gradient == "implicit" and algorithm == "cavia":
        return "algorithm.gradient=implicit does not train algorithm=cavia"
    if gradient == "implicit" and task == "glyphs" and algorithm not in (*WITHOUT_GRADIENT, "imaml"):
        return "algorithm.gradient=implicit needs an inner loop that ends near its minimum"
    return None


def _config(*overrides):
    config.register(datetime(2026, 1, 1))
    with initialize_config_dir(choices.CONF, version_base="1.3"):
        return config.checked(compose("config", [*overrides, "threads=1", "device=cpu"]))


def _learn(c, folder):
    """Train; return the loss on validation tasks after adaptation, at the start and at the end."""
    c.train.validation_tasks, c.train.validate_every = 16, c.train.steps
    run = setup.setup(c)
    trainer = loop.Trainer(run, folder, None)
    trainer.save("latest.pt")
    before = evaluate.held_out(run, trainer.state.meta, "validation", 16, 16, c.algorithm.steps)[0]["loss"]

    class Log:
        rows = ()
        training = advance = staticmethod(lambda *_: None)

        def validation(self, step, row):
            self.loss = row["loss_after"]

    log = Log()
    trainer.train(log)
    return before[:, -1].mean().item(), log.loss


@pytest.mark.parametrize(("task", "algorithm", "gradient"), CASES)
def test_what_is_rejected(task, algorithm, gradient):
    arguments = (f"task={task}", f"algorithm={algorithm}", f"algorithm.gradient={gradient}", "model=tiny")
    if message := _rejection(task, algorithm, gradient):
        with pytest.raises(UserError, match=message):
            setup.setup(_config(*arguments))
    else:
        setup.setup(_config(*arguments))


@pytest.mark.exhaustive
@pytest.mark.parametrize(("task", "algorithm", "gradient"), [case for case in CASES if _rejection(*case) is None])
def test_the_defaults_learn(task, algorithm, gradient, tmp_path):
    """On the default model: 30 steps lower the loss of new tasks after adaptation, below what guessing has."""
    arguments = (f"task={task}", f"algorithm={algorithm}", f"algorithm.gradient={gradient}", "train.steps=30")
    before, after = _learn(_config(*arguments), tmp_path)
    assert after < before
    assert after < (math.log(5) if task == "glyphs" and algorithm != "reptile" else before)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("algorithm", ["maml", "meta_sgd"])
def test_sinusoids_do_not_diverge(algorithm, seed, tmp_path):
    before, after = _learn(
        _config("task=sinusoid", f"algorithm={algorithm}", f"seed={seed}", "train.steps=8"), tmp_path
    )
    assert after < before


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["algorithm.gradient=truncated", "algorithm.last_steps=2"],
            "with algorithm.last_steps=2 of",
        ),
        (["algorithm.gradient=implicit", "algorithm.proximal=20"], r"= 27 is left, and may be at most 0\.2"),
    ],
)
def test_a_gradient_that_reaches_nothing_is_rejected(overrides, message):
    with pytest.raises(UserError, match=message):
        setup.setup(_config("model=tiny", *overrides))


@pytest.mark.parametrize(
    "overrides",
    [
        ["algorithm.gradient=truncated", "algorithm.last_steps=3"],
        ["algorithm=anil", "algorithm.gradient=truncated", "algorithm.last_steps=1"],
        ["algorithm.gradient=implicit", "algorithm.proximal=10", "algorithm.learning_rate=0.05"],
        ["algorithm.gradient=implicit", "algorithm.optimizer=adam"],
    ],
)
def test_a_gradient_that_reaches_something_is_not(overrides):
    setup.setup(_config("model=tiny", *overrides))


def test_threads_follow_the_size_of_the_work(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    monkeypatch.setattr(setup, "OWN_THREADS", 8)
    for overrides in ([], ["threads=3"], ["model.dim=512", "model.patch_size=4", "train.tasks=64"]):
        config_ = _config(*overrides)
        if "threads=3" not in overrides:
            config_.threads = None
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(setup, "build_learner", lambda *_: (_ for _ in ()).throw(ValueError("far enough")))
            with pytest.raises(UserError, match="far enough"):
                setup.setup(config_)
    assert chosen == [1, 1, 8]


@pytest.mark.parametrize("chosen", [None, "ACTIVE"])
def test_threads_wait_passively(chosen):
    """OpenMP reads the variable when PyTorch is imported; what the user chose stays."""
    code = "import os, sys, experiments.errors; print(os.environ['OMP_WAIT_POLICY'], 'torch' in sys.modules)"
    env = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"}
    if chosen is not None:
        env["OMP_WAIT_POLICY"] = chosen
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [chosen or "PASSIVE", "False"]
