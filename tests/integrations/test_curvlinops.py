"""Curvature matrices of curvlinops for metaattn's Transformer, against dense autodiff in float64."""

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.func import functional_call, jacrev

import metaattn
from tests.helpers import assert_close, python_blocks

curvlinops = pytest.importorskip("curvlinops")

PAGE = Path(__file__).parents[2] / "docs" / "integrations" / "curvlinops.md"
LOSSES = {"squared error": nn.MSELoss(), "cross-entropy": nn.CrossEntropyLoss()}


class Problem:
    """A tiny Transformer, the same model with dense attention, and two batches of different sizes."""

    def __init__(self, loss):
        shape = {"input": "token", "vocab_size": 5, "output": "pooled", "out_features": 3, "dim": 4}
        shape |= {"depth": 1, "heads": 2, "causal": True, "mlp_ratio": 1.0}
        self.model, self.dense = metaattn.Transformer(**shape), metaattn.Transformer(**shape, attention=self.attention)
        for model in (self.model.double(), self.dense.double()):
            for p in model.parameters():
                nn.init.normal_(p, std=0.5, generator=torch.Generator().manual_seed(p.numel()))
        self.loss, self.params = LOSSES[loss], list(self.model.parameters())
        self.x = torch.randint(5, (5, 6))
        targets = (torch.randn(5, 3, dtype=torch.float64), torch.randint(3, (5,)))
        self.y = targets[loss == "cross-entropy"]
        self.data = list(zip(self.x.split(3), self.y.split(3), strict=True))

    @staticmethod
    def attention(query, key, value, **_):
        shown = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool).tril()
        scores = (query @ key.mT * query.shape[-1] ** -0.5).masked_fill(~shown, -torch.inf)
        return torch.softmax(scores, -1) @ value

    def network(self, vector):
        """Output of the model on all data as a function of one vector of parameters."""
        named = dict(self.dense.named_parameters())
        parts = vector.split([p.numel() for p in named.values()])
        state = {k: t.view_as(p) for t, (k, p) in zip(parts, named.items(), strict=True)}
        return functional_call(self.dense, state, (self.x,))

    @property
    def vector(self):
        return torch.cat([p.detach().flatten() for p in self.params])

    def hessian(self):
        """Hessian of the loss by double backward."""
        at = self.vector.requires_grad_()
        (gradient,) = torch.autograd.grad(self.loss(self.network(at), self.y), at, create_graph=True)
        return torch.stack([torch.autograd.grad(g, at, retain_graph=True)[0] for g in gradient])

    def ggn(self):
        """Generalised Gauss-Newton matrix by its definition: Jacobian, Hessian of the loss in the output, Jacobian."""
        jacobian = jacrev(self.network)(self.vector).flatten(0, 1)
        out = self.network(self.vector).detach().flatten().requires_grad_()
        (gradient,) = torch.autograd.grad(self.loss(out.view(5, 3), self.y), out, create_graph=True)
        inner = torch.stack([torch.autograd.grad(g, out, retain_graph=True)[0] for g in gradient])
        return jacobian.T @ inner @ jacobian

    def operator(self, name):
        cls = {"hessian": curvlinops.HessianLinearOperator, "ggn": curvlinops.GGNLinearOperator}[name]
        return cls(self.model, self.loss, self.params, self.data)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", ["hessian", "ggn"])
def test_all_columns_at_once(name, loss):
    """Products with the whole identity: the derivative rules of attention under vmap of jvp of jacrev."""
    problem = Problem(loss)
    got = problem.operator(name) @ torch.eye(len(problem.vector), dtype=torch.float64)
    want = getattr(problem, name)()
    assert want.norm() > 0.1
    assert_close(got, want)


def test_one_column_and_blocks():
    problem = Problem("cross-entropy")
    want, sizes = problem.hessian(), [p.numel() for p in problem.params]
    v = torch.randn(len(want), dtype=torch.float64)
    assert_close(problem.operator("hessian") @ v, want @ v)
    by_tensor = curvlinops.HessianLinearOperator(
        problem.model, problem.loss, problem.params, problem.data, block_sizes=[1] * len(sizes)
    )
    blocks = torch.block_diag(*(b.split(sizes, 1)[i] for i, b in enumerate(want.split(sizes))))
    assert_close(by_tensor @ v, blocks @ v)


def test_spectrum():
    """Extreme eigenvalues by matrix-vector products only, and a spectral density between them."""
    problem = Problem("squared error")
    ends = torch.linalg.eigvalsh(problem.hessian())[[0, -1]]
    grid, density = curvlinops.lanczos_approximate_spectrum(problem.operator("hessian"), 10, boundaries_tol=1e-2)
    margin = 0.05 * (ends[1] - ends[0])  # that curvlinops adds
    assert_close(grid[[0, -1]], ends + torch.stack([-margin, margin]), factor=1e9)  # of 1e-11
    assert (density >= 0).all()
    assert density.max() > 0


def test_calls_that_curvlinops_rejects():
    """Curvlinops rejects dropout, because the loss is no function of the data, and KFAC for layers without a rule."""
    problem = Problem("squared error")
    with pytest.raises(NotImplementedError, match="un-supported layers"):
        curvlinops.KFACLinearOperator(problem.model, problem.loss, problem.params, problem.data)
    for block in problem.model.blocks:
        block.attention.dropout = 0.5
    with pytest.raises(RuntimeError, match=r"[Nn]on-determinis|deterministic"):
        problem.operator("hessian")
    problem.model.eval()
    assert problem.operator("hessian").shape == (len(problem.vector),) * 2


def test_page():
    session = {}
    for block in python_blocks(PAGE):
        exec(block, session)
    top, eigenvalues = session["top"], session["eigenvalues"]
    assert top == pytest.approx(eigenvalues.abs().max().item(), rel=1e-2)
    assert_close(session["hessian"] @ session["v"], session["hessian"] @ session["columns"] @ session["v"])
