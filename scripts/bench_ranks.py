"""Tasks per second of one meta-training run on several numbers of processes, and that it is the same run.

    python scripts/bench_ranks.py [experiment=smoke device=cpu …] [--ranks 1 2] [--out docs/benchmarks/ranks]

Each is ``train_maml.py`` as ``torchrun`` starts it, with a GPU for each process (NCCL) or on the CPU (gloo); the tasks
of a step are the same and split over the processes. The speed is that between the first and the last logged step, after
what a first step takes. Overrides are Hydra's. Runs whose losses differ by more than a hundredth are refused. Writes
JSON and a table (Markdown).
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

APART = 1e-2  # losses of the same run: in tf32 they drift apart by 3e-4 in 160 steps


def run(ranks: int, overrides: list[str], out: Path) -> dict[str, Any]:
    """Train, and read what was logged."""
    program = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    program += [str(ROOT / "train_maml.py"), *overrides, f"hydra.run.dir={out}"]
    done = subprocess.run(program, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(program)} ended with {done.returncode}:\n{done.stderr[-3000:]}")
    rows = [r for r in read_metrics(out / "metrics.csv") if r["split"] == "train"]
    if len(rows) < 3:
        sys.exit(
            f"a speed is between two rows after the first; got {len(rows)}: more train.steps, or fewer train.log_every"
        )
    first, last = rows[1], rows[-1]  # the row before is of the first step
    seconds = last["step"] / last["steps_per_second"] - first["step"] / first["steps_per_second"]
    losses = {r["step"]: r["loss_after"] for r in rows}
    return {"ranks": ranks, "steps_per_second": (last["step"] - first["step"]) / seconds, "losses": losses}


def main() -> None:
    """Run, write, show."""
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
    lines = ["| processes | steps/s | to one | largest difference of a logged loss |", "|---|---|---|---|"]
    for r in rows:
        apart = max(abs(loss - rows[0]["losses"][step]) for step, loss in r["losses"].items())
        if not apart < APART:
            sys.exit(f"{r['ranks']} processes are another run than {rows[0]['ranks']}: a loss differs by {apart:.1e}")
        speed = r["steps_per_second"]
        lines.append(f"| {r['ranks']} | {speed:.2f} | {speed / rows[0]['steps_per_second']:.2f} | {apart:.1e} |")
    a.out.parent.mkdir(parents=True, exist_ok=True)
    a.out.with_suffix(".json").write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")
    table = "\n".join(lines)
    a.out.with_suffix(".md").write_text(f"# Several processes\n\n{json.dumps(machine)}\n\n{table}\n")
    print(table)


if __name__ == "__main__":
    main()
