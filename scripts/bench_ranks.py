"""Measure the speed of one meta-training run on several numbers of processes, and check that it is the same run.

    python scripts/bench_ranks.py [experiment=smoke device=cpu …] [--ranks 1 2] [--out docs/benchmarks/ranks]

Each run is ``train_maml.py`` started by ``torchrun``, with one GPU for each process (NCCL) or on the CPU (gloo). All
runs have the same tasks in each step, which are split over the processes. The speed is measured from the second to the
last logged step, because the first step includes the warm-up. Overrides are those of Hydra. The script fails if the
losses of two runs differ by more than ``MAX_DIFFERENCE``. It writes JSON and a Markdown table.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from experiments.training.metrics import read_metrics

ROOT = Path(__file__).parents[1]
OVERRIDES = ["experiment=glyphs_gpu", "train.tasks=128", "train.steps=160", "train.log_every=40"]
OVERRIDES += ["train.validate_every=160", "train.validation_tasks=32", "test.tasks=32"]

MAX_DIFFERENCE = 1e-2  # between losses of the same run: in tf32 they differ by 3e-4 after 160 steps


def run(ranks: int, overrides: list[str], out: Path) -> dict[str, Any]:
    """Train on a number of processes, and return the speed and the logged losses."""
    program = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    program += [str(ROOT / "train_maml.py"), *overrides, f"hydra.run.dir={out}"]
    done = subprocess.run(program, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(program)} ended with {done.returncode}:\n{done.stderr[-3000:]}")
    rows = [r for r in read_metrics(out / "metrics.csv") if r["split"] == "train"]
    if len(rows) < 3:
        sys.exit(
            f"expected at least 3 logged steps, to measure the speed after the first; got {len(rows)}. "
            "Give more train.steps or a smaller train.log_every"
        )
    first, last = rows[1], rows[-1]  # rows[0] is the first step
    seconds = last["step"] / last["steps_per_second"] - first["step"] / first["steps_per_second"]
    losses = {r["step"]: r["loss_after"] for r in rows}
    return {"ranks": ranks, "steps_per_second": (last["step"] - first["step"]) / seconds, "losses": losses}


def main() -> None:
    """Run on each number of processes, compare, write and print."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("overrides", nargs="*", default=OVERRIDES)
    p.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    p.add_argument("--out", type=Path, default=Path("docs/benchmarks/ranks"))
    a = p.parse_args()
    rows = []
    for ranks in a.ranks:
        with tempfile.TemporaryDirectory() as directory:
            rows.append(run(ranks, a.overrides, Path(directory) / "run"))
        print(json.dumps(rows[-1]), flush=True)
    on_cpu = "device=cpu" in a.overrides or not torch.cuda.is_available()
    device = "CPU" if on_cpu else torch.cuda.get_device_name()
    machine = {"device": device, "torch": str(torch.__version__), "overrides": a.overrides}
    lines = ["| processes | steps/s | speed-up | largest difference of a logged loss |", "|---|---|---|---|"]
    for r in rows:
        difference = max(abs(loss - rows[0]["losses"][step]) for step, loss in r["losses"].items())
        if not difference < MAX_DIFFERENCE:
            sys.exit(f"runs on {r['ranks']} and {rows[0]['ranks']} processes differ: a loss by {difference:.1e}")
        speed = r["steps_per_second"]
        lines.append(f"| {r['ranks']} | {speed:.2f} | {speed / rows[0]['steps_per_second']:.2f} | {difference:.1e} |")
    a.out.parent.mkdir(parents=True, exist_ok=True)
    a.out.with_suffix(".json").write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")
    table = "\n".join(lines)
    a.out.with_suffix(".md").write_text(f"# Several processes\n\n{json.dumps(machine)}\n\n{table}\n")
    print(table)


if __name__ == "__main__":
    main()
