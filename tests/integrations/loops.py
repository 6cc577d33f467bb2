"""The training loop of the pages on Fabric and Accelerate in plain PyTorch, and those pages on several processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from torch.func import functional_call
from torch.nn import functional as F

import metaattn
from metaattn.tasks import Sinusoids
from tests.helpers import python_blocks

ROOT = Path(__file__).parent.parent.parent


def plain():
    """Losses and learned parameters of the pages' loop, one task after the other, by backward."""
    torch.manual_seed(0)
    model = metaattn.Transformer(
        input="features", in_features=1, feature_tokens=4, output="pooled", out_features=1, dim=16, depth=1
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=0.003)
    episodes, history = Sinusoids(shot=5, queries=5), []
    for step in range(6):
        optimizer.zero_grad()
        total = 0.0
        for i in range(4 * step, 4 * step + 4):
            (x, y), (xq, yq) = episodes[i]
            params = dict(model.named_parameters())
            for _ in range(2):
                loss = F.mse_loss(functional_call(model, params, (x,)), y)
                grads = torch.autograd.grad(loss, list(params.values()), create_graph=True)
                params = {k: p - 0.05 * g for (k, p), g in zip(params.items(), grads, strict=True)}
            loss = F.mse_loss(functional_call(model, params, (xq,)), yq) / 4
            loss.backward()
            total += loss.item()
        optimizer.step()
        history.append(total)
    return torch.tensor(history), dict(model.named_parameters())


def by_torchrun(page, processes, cwd):
    """Losses of a page's first block in each process, in float64."""
    end = 'import json, os; open(os.environ["RANK"] + ".json", "w").write(json.dumps(history))'
    program = cwd / "program.py"
    program.write_text(
        "\n".join(["import torch", "torch.set_default_dtype(torch.float64)", python_blocks(page)[0], end])
    )
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", program],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return [torch.tensor(json.loads((cwd / f"{rank}.json").read_text())) for rank in range(processes)]
