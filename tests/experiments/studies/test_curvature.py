"""Spectra of Hessians during adaptation, against the full Hessian by autograd of dense attention."""

import json
import sys
from dataclasses import replace

import pytest
import torch
from omegaconf import OmegaConf
from torch.func import functional_call

from experiments.errors import UserError
from experiments.studies import curvature
from experiments.studies.curvature import Settings, Study
from experiments.training import checkpoint
from tests.helpers import assert_close, dense

pytest.importorskip("curvlinops")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The directory of a run of two meta-steps."""
    return curvature.train_small(Settings(meta_steps=2, device="cpu"), tmp_path_factory.mktemp("curvature") / "run")


def study(run, **settings):
    return Study(run / "best.pt", Settings(device="cpu", **settings))


def dense_hessian(study, params, x, y):
    """Return the Hessian of the squared error, by double backward through PyTorch operations."""
    sizes = [p.numel() for p in params.values()]
    flat = torch.cat([p.detach().flatten() for p in params.values()]).requires_grad_()
    named = {k: t.view_as(params[k]) for k, t in zip(params, flat.split(sizes), strict=True)}
    for block in study.run.model.blocks:
        block.attention.attention = lambda q, k, v, **_: dense(q, k, v)[0]
    loss = (functional_call(study.run.model, named, (x,)) - y).square().mean()
    (gradient,) = torch.autograd.grad(loss, flat, create_graph=True)
    return torch.stack([torch.autograd.grad(g, flat, retain_graph=True)[0] for g in gradient])


def test_all_eigenvalues(run):
    s = study(run)
    support = [t[0] for t in s.run.tasks("test", 0, 1).support]
    params = s.run.learner.trajectory(s.meta, support)[-1]
    got = s.spectrum(s.hessian(params, support))
    assert s.asymmetry < 1e-12
    assert torch.equal(got.counts, torch.ones(s.size))
    want = torch.linalg.eigvalsh(dense_hessian(s, params, *support))
    assert want[-1] > 0.1
    assert_close(got.values, want)


def test_lanczos(run):
    """The weights of the quadrature sum to the number of eigenvalues; its extremes and its trace are close."""
    support = [t[0] for t in study(run).run.tasks("test", 0, 1).support]
    exact, quadrature = (study(run, lanczos=n) for n in (None, 40))
    params = exact.run.learner.trajectory(exact.meta, support)[-1]
    want, got = (s.spectrum(s.hessian(params, support)) for s in (exact, quadrature))
    assert len(got.values) == 40
    assert got.counts.sum().item() == pytest.approx(quadrature.size)
    assert_close(got.values[[0, -1]], want.values[[0, -1]], factor=1e4)
    spread = (want.values.square().sum() * 2).sqrt()  # the standard deviation of a Gaussian probe's estimate
    assert (got.values @ got.counts - want.values.sum()).abs() < 4 * spread


def test_a_task_that_adapts_some_parameters(run, tmp_path):
    content = checkpoint.load(run / "best.pt")
    content["config"]["algorithm"]["adapts"] = ["head.*"]
    torch.save(content, tmp_path / "best.pt")
    s = study(tmp_path)
    assert s.size == 8 + 1
    # The loss is quadratic in the head, so that its Hessian is constant.
    (task,) = s.points(1)
    assert_close(task[0].spectrum.values, task[-1].spectrum.values)
    assert task[0].spectrum.values.min() > -1e-12


def test_the_stability_limit_needs_one_fixed_rate(run):
    config = study(run).run.config
    assert curvature.stability_limit(config) == pytest.approx(40)
    learned = replace(config, algorithm=replace(config.algorithm, learns=curvature.Learns.tensor))
    assert curvature.stability_limit(learned) is None


def _main(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["curvature", "device=cpu", *arguments])
    try:
        curvature.main()
    except SystemExit as end:
        return end.code
    return 0


def test_command(run, monkeypatch, tmp_path, capsys):
    options = [f"checkpoint={run}", f"out={tmp_path}", "tasks=1", "lanczos=3"]
    assert _main(monkeypatch, *options) == 0
    content = json.loads((tmp_path / "curvature.json").read_text())
    assert [len(task) for task in content["tasks"]] == [6]
    assert len(content["tasks"][0][0]["values"]) == len(content["tasks"][0][0]["counts"]) == 3
    assert content["stable_up_to"] == 40
    assert (tmp_path / "curvature.png").stat().st_size > 10_000
    out = capsys.readouterr().out
    assert "Hessian of the support loss in 721 parameters, means of 1 held-out tasks" in out
    # Products that are not symmetric are reported.
    points = [[curvature.Point(1.0, 1.0, curvature.Spectrum(*torch.ones(2, 3)))] * 6]
    monkeypatch.setattr(Study, "points", lambda s, _: (setattr(s, "asymmetry", 0.1), points)[1])
    assert _main(monkeypatch, *options) == 1
    assert "not those of a symmetric matrix" in capsys.readouterr().err


def test_mistakes(run, monkeypatch, tmp_path, capsys):
    def message(*arguments):
        assert _main(monkeypatch, f"out={tmp_path}", *arguments) == 2
        return capsys.readouterr().err

    assert "lanczos must be at least 2, or null; got 1" in message("lanczos=1")
    assert "no checkpoint at" in message(f"checkpoint={tmp_path}/none.pt")
    monkeypatch.setitem(sys.modules, "curvlinops", None)
    assert message().endswith('pip install -r requirements.txt -c requirements-integrations.txt -e ".[curvlinops]"\n')
    monkeypatch.setattr(curvature, "MAX_PARAMETERS", 100)
    with pytest.raises(UserError, match=r"adapts 721 parameters, too many for all eigenvalues .*lanczos=60"):
        study(run)
    content = checkpoint.load(run / "best.pt")
    content["config"] = OmegaConf.to_container(OmegaConf.create(content["config"]))
    content["config"]["algorithm"] |= {"kind": "cavia", "name": "cavia"}
    torch.save(content, tmp_path / "best.pt")
    with pytest.raises(UserError, match="algorithm=cavia adapt more than the model's parameters"):
        study(tmp_path)
