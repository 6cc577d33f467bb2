"""Compile the Triton kernels for GPUs that need not be here, and say what each takes of them.

    python scripts/compile_kernels.py [--gpus a100 rtx4090 h100] [--dtypes bfloat16] [--head-sizes 64] [--kinds bias]

Each primitive runs as it would on that GPU, with a driver that compiles and loads and launches nothing: block sizes
that do not fit its shared memory give way to smaller ones here as there. A table tells the blocks, registers of a
thread, bytes of its stack (spilled registers, mostly) and shared memory of each kernel. Exits with 1 if a kernel does
not compile, or fits with no block sizes. Triton's cache of compiled kernels is filled on the way: with --cache DIR that
folder, which a machine with the same Triton then need not compile again.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import math
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

os.environ.pop("TRITON_INTERPRET", None)  # before Triton is imported: interpreted kernels do not compile

import torch
import triton
from _dtypes import DTYPES, arithmetic
from torch import Tensor
from tqdm import tqdm
from triton.backends.compiler import GPUTarget

from metaattn.backends import triton as backend
from metaattn.backends.base import Operands, Problem, Rows, Tangent, Values
from metaattn.backends.matmul_jvp import Product
from metaattn.backends.triton import block_sizes, launch, matmul_jvp


class Gpu(NamedTuple):
    """What compiling depends on: the compute capability, and the shared memory that a block can ask for."""

    capability: tuple[int, int]
    shared_bytes: int


GPUS = {
    "a100": Gpu((8, 0), 163 * 1024),
    "rtx3090": Gpu((8, 6), 99 * 1024),
    "rtx4090": Gpu((8, 9), 99 * 1024),
    "h100": Gpu((9, 0), 227 * 1024),
    "b200": Gpu((10, 0), 227 * 1024),
    "rtx5090": Gpu((12, 0), 99 * 1024),
}
PRIMITIVES = ("forward", "forward_jvp", "forward_with_jvp", "backward", "backward_jvp", "backward_with_jvp", "products")
KINDS = ("full", "causal", "mask", "bias", "dropout", "short", "one_query")


class Job(NamedTuple):
    """A primitive of one kind of call on one GPU."""

    gpu: str
    dtype: str
    head_size: int
    kind: str
    primitive: str


class Loaded(NamedTuple):
    """A kernel as a GPU would have loaded it."""

    name: str
    blocks: str  # rows and keys, warps, stages
    registers: int
    stack_bytes: int
    shared_bytes: int


class Dry:
    """A driver of Triton's that stands for a GPU: what is loaded is noted, what is launched is not."""

    def __init__(self) -> None:
        """No GPU yet."""
        self.gpu = GPUS["h100"]
        self.loaded: list[Loaded] = []
        self.blocks = ""
        self.utils = self

    def use(self, gpu: Gpu) -> None:
        """Be that GPU from now on."""
        self.gpu = gpu
        block_sizes._device = lambda _: block_sizes.for_capability(gpu.capability)  # type: ignore[assignment]

    def get_current_target(self) -> GPUTarget:
        """What to compile for."""
        major, minor = self.gpu.capability
        return GPUTarget("cuda", 10 * major + minor, 32)

    def get_current_device(self) -> int:
        """A number for each GPU: Triton keeps what it has compiled by it."""
        return list(GPUS.values()).index(self.gpu)

    def get_current_stream(self, _: Any = None) -> int:
        """There are no streams."""
        return 0

    def get_device_properties(self, _: int) -> dict[str, int]:
        """What Triton asks before it loads a kernel."""
        return {"max_shared_mem": self.gpu.shared_bytes, "warpSize": 32}

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        """Note the blocks of the kernel that comes next; launch nothing."""
        constants = {source.fn.arg_names[path[0]]: value for path, value in source.constants.items() if len(path) == 1}
        sizes = constants["BM"], constants["BN"], metadata.num_warps, metadata.num_stages
        self.blocks = "{}x{} {} {}".format(*sizes)
        return lambda *_: None

    def load_binary(self, name: str, binary: bytes, shared: int, _: int) -> tuple[Any, ...]:
        """Note a kernel that fits."""
        registers, stack = usage(binary)
        self.loaded.append(Loaded(name, self.blocks, registers, stack, shared))
        return object(), object(), registers, stack, 1024


def usage(binary: bytes) -> tuple[int, int]:
    """Registers and bytes of stack of a compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(binary)
        f.flush()
        program = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", f.name]
        shown = subprocess.run(program, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", shown)
    if found is None:
        raise RuntimeError(f"cuobjdump tells no registers of a kernel: {shown[:200]!r}")
    return int(found[1]), int(found[2])


def call(job: Job) -> None:
    """Run the primitive; its results are whatever memory held."""
    arithmetic(job.dtype)
    dtype = DTYPES[job.dtype][0]
    heads, n, d = 4, 64 if job.kind == "short" else 1024, job.head_size
    rows = 1 if job.kind == "one_query" else n

    def tensor(*shape: int) -> Tensor:
        return torch.empty(1, heads, *shape, dtype=dtype)

    bias = tensor(n, n) if job.kind == "bias" else None
    mask = torch.empty(1, 1, n, n, dtype=torch.bool) if job.kind == "mask" else None
    seeds = torch.empty(1, heads, 1, 1, dtype=torch.int64) if job.kind == "dropout" else None
    x = Operands(tensor(rows, d), tensor(n, d), tensor(n, d), bias, mask, seeds)
    problem = Problem(d**-0.5, None, 0 if job.kind == "causal" else None, 0.1 if seeds is not None else 0.0)
    t = Tangent(tensor(rows, d), tensor(n, d), tensor(n, d), None if bias is None else tensor(n, n))
    w, values = Rows(tensor(rows, d)), Values(tensor(rows, d), torch.empty(1, heads, rows))
    options: dict[str, Any] = {"bias_grad": bias is not None}
    if job.primitive == "products":
        both = Product(x.query[0], x.key[0].mT, x.query[0], x.key[0].mT)
        backend.multiply([both])
        backend.multiply([both, both._replace(value=False)])
        backend.multiply([Product(x.query[0], x.key[0].mT)] * 2)
    elif job.primitive == "forward":
        backend.forward(problem, x)
    elif job.primitive == "forward_jvp":
        backend.forward_jvp(problem, x, values, t)
    elif job.primitive == "forward_with_jvp":
        backend.forward_with_jvp(problem, x, t)
    elif job.primitive == "backward":
        backend.backward(problem, x, values, w, **options)
    else:
        function = backend.backward_jvp if job.primitive == "backward_jvp" else backend.backward_with_jvp
        function(problem, x, values, values, w, t, cotangent_tangent=Rows(), **options)


@functools.cache
def driver() -> Dry:
    """The driver of this process, which Triton uses from then on."""
    dry = Dry()
    triton.runtime.driver.set_active(dry)
    return dry


def compile_one(job: Job) -> tuple[list[Loaded], str | None]:
    """What a job loads, and why it fails if it does."""
    dry = driver()
    dry.use(GPUS[job.gpu])
    dry.loaded.clear()
    launch._smaller.clear()
    matmul_jvp._stages.clear()
    try:
        call(job)
    except Exception as problem:
        return [], f"{type(problem).__name__}: {str(problem)[:300]}"
    return list(dry.loaded), None


def jobs(a: argparse.Namespace) -> Iterator[Job]:
    """All that was asked for and is served: B and S at once for some sizes, products for some dtypes and no masks."""
    for job in itertools.starmap(Job, itertools.product(a.gpus, a.dtypes, a.head_sizes, a.kinds, a.primitives)):
        fused = block_sizes.for_capability(GPUS[job.gpu].capability).get(
            ("backward_with_jvp_keys", arithmetic(job.dtype)), {}
        )
        if job.primitive == "backward_with_jvp" and (job.head_size > max(fused, default=0) or job.kind == "bias"):
            continue
        if job.primitive == "products" and (job.dtype == "float32" or job.kind != "full"):
            continue
        yield job


def main() -> None:
    """Compile all, print the table."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--gpus", nargs="+", default=["a100", "rtx4090", "h100"], choices=GPUS)
    p.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"], choices=DTYPES)
    p.add_argument("--head-sizes", type=int, nargs="+", default=[64, 128])
    p.add_argument("--kinds", nargs="+", default=["full", "causal"], choices=KINDS)
    p.add_argument("--primitives", nargs="+", default=PRIMITIVES, choices=PRIMITIVES)
    p.add_argument("--cache", type=Path, help="the folder of compiled kernels, in place of Triton's own")
    p.add_argument("--processes", type=int, default=os.cpu_count(), help="0: compile in this process")
    a = p.parse_args()
    if a.cache is not None:
        os.environ["TRITON_CACHE_DIR"] = str(a.cache.resolve())
    todo = list(jobs(a))
    failed = 0
    print(f"Triton {triton.__version__}")
    print("gpu      dtype     size  kind     primitive        kernel   blocks        registers  stack B  shared KiB")
    with contextlib.ExitStack() as stack:
        compiled: Iterable[tuple[list[Loaded], str | None]] = map(compile_one, todo)
        if a.processes:
            context = multiprocessing.get_context("spawn")
            pool = stack.enter_context(ProcessPoolExecutor(a.processes, mp_context=context))
            compiled = pool.map(compile_one, todo)
        done = tqdm(compiled, total=len(todo), desc="compile", mininterval=5, disable=None)
        for job, (loaded, problem) in zip(todo, done, strict=True):
            head = f"{job.gpu:8s} {job.dtype:9s} {job.head_size:4d}  {job.kind:8s} {job.primitive:16s}"
            for k in loaded:
                sizes = f"{k.registers:9d} {k.stack_bytes:8d} {math.ceil(k.shared_bytes / 1024):11d}"
                print(f"{head} {k.name:8s} {k.blocks:12s} {sizes}", flush=True)
            if problem is not None:
                print(f"{head} FAILED {problem}", flush=True)
                failed += 1
    print(f"{len(todo) - failed} of {len(todo)} compile")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
