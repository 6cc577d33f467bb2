"""Compile the Triton kernels for GPUs that this machine does not have, and show the resources that each kernel needs.

    python scripts/compile_kernels.py [--gpus a100 rtx4090 h100] [--dtypes bfloat16] [--head-sizes 64 256/16]
        [--kinds bias]
    python scripts/compile_kernels.py ... > before.txt; (change the kernels); ... --compare before.txt

Each primitive runs as it would on that GPU, with a driver that compiles and loads but launches nothing: block sizes
that do not fit its shared memory give way to smaller ones, as on the GPU. A table shows the blocks, registers per
thread, stack bytes per thread (mostly spilled registers) and shared memory of each kernel, and a digest of its machine
code (SASS). With --compare FILE, digests are compared with those of a saved table: equal digests mean equal machine
code. Triton's cache of compiled kernels is filled in the process; with --cache DIR it is that folder, and a machine
with the same Triton version can use it. The compiler is not entirely deterministic: a kernel that spills registers
(head size 128, "short", backward_jvp) compiles to one of two programs from run to run. Compile again, with an empty
cache, before a difference counts. A kernel is listed once: compare tables of the same GPUs, dtypes, sizes and kinds, in
the same order.

The PTX of each kernel is searched for the cause of a fault of CUDA 12.8's assembler: blocks of two layouts that share
an address in shared memory (docs/benchmarks/compiler_faults.md).

Exits with 1 if a kernel does not compile, fits with no block sizes, has that cause, or has a digest that differs.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
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
from triton.runtime.cache import get_cache_manager

from metaattn.backends import PRIMITIVES
from metaattn.backends import triton as triton_package
from metaattn.backends.base import BackwardJvpInputs, Operands, Problem, Rows, Tangent, Values
from metaattn.backends.matmul_jvp import Product
from metaattn.backends.triton import backend, block_sizes, launch, matmul_jvp


class Gpu(NamedTuple):
    """Properties that compilation depends on: compute capability, and shared memory that a block can request."""

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
KERNELS = (*PRIMITIVES, "matmul_jvp")
KINDS = ("full", "causal", "mask", "bias", "dropout", "short", "one_query")
# A row of the table: GPU, dtype, head size, kind, primitive, kernel; "blocks" is four numbers in three words.
HEADER = (
    f"{'gpu':8s} {'dtype':9s} {'size':>7s}  {'kind':8s} {'primitive':17s} {'kernel':24s} {'blocks':12s} "
    f"{'registers':>9s} {'stack B':>8s} {'shared KiB':>11s} digest"
)
Row = tuple[str, ...]  # what identifies a row: GPU, dtype, head size, kind, primitive, kernel, its number among equals


class Job(NamedTuple):
    """A primitive, in one kind of call, on one GPU."""

    gpu: str
    dtype: str
    head_size: int
    value_size: int
    kind: str
    primitive: str


class LoadedKernel(NamedTuple):
    """A kernel as a GPU would have loaded it."""

    name: str
    blocks: str  # rows x keys, warps, stages
    registers: int
    stack_bytes: int
    shared_bytes: int
    digest: str


class DryDriver:
    """A Triton driver that stands for a GPU: it records what is loaded, and launches nothing."""

    def __init__(self) -> None:
        """Start as an H100."""
        self.gpu = GPUS["h100"]
        self.loaded: list[LoadedKernel] = []
        self.faults: list[str] = []
        self.blocks = ""
        self.utils = self

    def use(self, gpu: Gpu) -> None:
        """Stand for that GPU from now on."""
        self.gpu = gpu
        block_sizes._for_device = lambda _: block_sizes.for_capability(gpu.capability)  # type: ignore[assignment]

    def get_current_target(self) -> GPUTarget:
        """Return what to compile for."""
        major, minor = self.gpu.capability
        return GPUTarget("cuda", 10 * major + minor, 32)

    def get_current_device(self) -> int:
        """Return a number for each GPU: Triton caches compiled kernels by it."""
        return list(GPUS.values()).index(self.gpu)

    def get_current_stream(self, _: Any = None) -> int:
        """Return a number: streams do not exist here."""
        return 0

    def get_device_properties(self, _: int) -> dict[str, int]:
        """Return what Triton requests before it loads a kernel."""
        return {"max_shared_mem": self.gpu.shared_bytes, "warpSize": 32}

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        """Record the blocks and faults of the kernel that is loaded next; return a launcher that does nothing."""
        constants = {source.fn.arg_names[path[0]]: value for path, value in source.constants.items() if len(path) == 1}
        sizes = constants["BM"], constants["BN"], metadata.num_warps, metadata.num_stages
        self.blocks = "{}x{} {} {}".format(*sizes)
        ptx = get_cache_manager(metadata.hash).get_file(f"{metadata.name}.ptx")
        if ptx is None:
            raise RuntimeError(f"Triton's cache has no PTX of {metadata.name}")
        self.faults += (f"{metadata.name} {self.blocks}: {found}" for found in shared_addresses(Path(ptx).read_text()))
        return lambda *_: None

    def load_binary(self, name: str, binary: bytes, shared: int, _: int) -> tuple[Any, ...]:
        """Record a kernel that fits."""
        registers, stack = usage(binary)
        self.loaded.append(LoadedKernel(name, self.blocks, registers, stack, shared, digest(binary)))
        return object(), object(), registers, stack, 1024


def cuobjdump(option: str, binary: bytes) -> str:
    """Return what NVIDIA's cuobjdump prints about a compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(binary)
        f.flush()
        program = [triton.knobs.nvidia.cuobjdump.path, option, f.name]
        return subprocess.run(program, capture_output=True, text=True, check=True).stdout


def usage(binary: bytes) -> tuple[int, int]:
    """Return the registers and the stack bytes of a compiled kernel."""
    shown = cuobjdump("--dump-resource-usage", binary)
    found = re.search(r"REG:(\d+) STACK:(\d+)", shown)
    if found is None:
        raise RuntimeError(f"cuobjdump shows no registers of a kernel: {shown[:200]!r}")
    return int(found[1]), int(found[2])


def digest(binary: bytes) -> str:
    """Return a digest of a kernel's machine code: of its instructions with addresses and encodings, not its name."""
    instructions = [line for line in cuobjdump("--dump-sass", binary).splitlines() if re.match(r"\s*/\*", line)]
    if len(instructions) < 50:
        raise RuntimeError(f"cuobjdump shows only {len(instructions)} lines of instructions of a kernel")
    return hashlib.sha256("\n".join(instructions).encode()).hexdigest()[:12]


def shared_addresses(ptx: str) -> list[str]:
    """Return a line for each address in shared memory at which products of a kernel read blocks of two layouts.

    A product of a warp group takes an operand from shared memory by a descriptor of 64 bits: the address, to which the
    compiler adds constants. The high half of their sum is the layout.
    """
    definitions: dict[str, list[tuple[str, list[str]]]] = {}
    for operation, register, operands in re.findall(r"^\s*([a-z][\w.]*)\s+(%\w+), ([^;]*);", ptx, re.MULTILINE):
        definitions.setdefault(register, []).append((operation, [o.strip() for o in operands.split(",")]))

    def definition(register: str) -> tuple[str, list[str]]:
        found = definitions.get(register, [])
        return found[0] if len(found) == 1 else ("", [])

    def expression(register: str, depth: int = 0) -> str:
        operation, operands = definition(register)
        if not operation or depth > 12:
            return register
        return f"{operation}({', '.join(expression(o, depth + 1) if o.startswith('%') else o for o in operands)})"

    layouts: dict[str, set[str]] = {}
    for products in re.findall(r"wgmma\.mma_async\S*\s+\{[^}]*\}, (\{[^}]*\}|%\w+), (%\w+), ", ptx):
        for register in products:
            if register.startswith("{"):
                continue  # an operand in registers
            constant = 0
            while (found := definition(register))[0] in ("add.s64", "or.b64") and re.fullmatch(r"-?\d+", found[1][1]):
                constant += int(found[1][1])
                register = found[1][0]
            layouts.setdefault(expression(register), set()).add(f"{constant >> 32 & 0xFFFFFFFF:#x}")
    return [f"layouts {' and '.join(sorted(found))} at one address" for found in layouts.values() if len(found) > 1]


def call(job: Job) -> None:
    """Run the primitive. Its inputs and results are uninitialised memory."""
    arithmetic(job.dtype)
    dtype = DTYPES[job.dtype][0]
    heads, n, d, dv = 4, 64 if job.kind == "short" else 1024, job.head_size, job.value_size
    rows = 1 if job.kind == "one_query" else n

    def tensor(*shape: int) -> Tensor:
        return torch.empty(1, heads, *shape, dtype=dtype)

    bias = tensor(n, n) if job.kind == "bias" else None
    mask = torch.empty(1, 1, n, n, dtype=torch.bool) if job.kind == "mask" else None
    seeds = torch.empty(1, heads, 1, 1, dtype=torch.int64) if job.kind == "dropout" else None
    x = Operands(tensor(rows, d), tensor(n, d), tensor(n, dv), bias, mask, seeds)
    problem = Problem(d**-0.5, None, 0 if job.kind == "causal" else None, 0.1 if seeds is not None else 0.0)
    t = Tangent(tensor(rows, d), tensor(n, d), tensor(n, dv), None if bias is None else tensor(n, n))
    w, values = Rows(tensor(rows, dv)), Values(tensor(rows, dv), torch.empty(1, heads, rows))
    inputs = BackwardJvpInputs(values, values, w, t, bias_grad=bias is not None)
    if job.primitive == "matmul_jvp":
        both = Product(x.query[0], x.key[0].mT, x.query[0], x.key[0].mT)
        triton_package.multiply([both])
        triton_package.multiply([both, both._replace(value=False)])
        triton_package.multiply([Product(x.query[0], x.key[0].mT)] * 2)
    elif job.primitive == "forward":
        backend.forward(problem, x)
    elif job.primitive == "forward_jvp":
        backend.forward_jvp(problem, x, values, t)
    elif job.primitive == "forward_with_jvp":
        backend.forward_with_jvp(problem, x, t)
    elif job.primitive == "backward":
        backend.backward(problem, x, values, w, bias_grad=inputs.bias_grad)
    elif job.primitive == "backward_jvp":
        backend.backward_jvp(problem, x, inputs)
    else:
        backend.backward_with_jvp(problem, x, inputs)


@functools.cache
def driver() -> DryDriver:
    """Return the driver of this process, which Triton uses from then on."""
    dry = DryDriver()
    triton.runtime.driver.set_active(dry)
    return dry


def compile_one(job: Job) -> tuple[list[LoadedKernel], str | None]:
    """Return the kernels that a job loads, and the error message if it fails."""
    dry = driver()
    dry.use(GPUS[job.gpu])
    dry.loaded.clear()
    dry.faults.clear()
    launch._smaller.clear()
    matmul_jvp._stages.clear()
    try:
        call(job)
    except Exception as problem:
        return [], f"{type(problem).__name__}: {str(problem)[:300]}"
    return list(dry.loaded), "; ".join(dry.faults) or None


def jobs(a: argparse.Namespace) -> Iterator[Job]:
    """Yield the requested jobs that have kernels.

    ``backward_with_jvp`` has one only for some head sizes and no bias; ``matmul_jvp`` has none for float32, and no
    masks.
    """
    for gpu, dtype, sizes, kind, primitive in itertools.product(a.gpus, a.dtypes, a.head_sizes, a.kinds, a.primitives):
        query_size, value_size = sizes
        job = Job(gpu, dtype, query_size, value_size, kind, primitive)
        fused = block_sizes.for_capability(GPUS[job.gpu].capability).get(
            ("backward_with_jvp_keys", arithmetic(job.dtype)), {}
        )
        if job.primitive == "backward_with_jvp" and (max(sizes) > max(fused, default=0) or job.kind == "bias"):
            continue
        if job.primitive == "matmul_jvp" and (job.dtype == "float32" or job.kind != "full" or query_size != value_size):
            continue
        yield job


def line(job: Job, k: LoadedKernel) -> str:
    """Return a row of the table."""
    sizes = f"{k.registers:9d} {k.stack_bytes:8d} {math.ceil(k.shared_bytes / 1024):11d}"
    return f"{head(job)} {k.name:24s} {k.blocks:12s} {sizes} {k.digest}"


def head(job: Job) -> str:
    """Return the first columns of a row."""
    size = str(job.head_size) if job.value_size == job.head_size else f"{job.head_size}/{job.value_size}"
    return f"{job.gpu:8s} {job.dtype:9s} {size:>7s}  {job.kind:8s} {job.primitive:17s}"


def head_sizes(text: str) -> tuple[int, int]:
    """Return the head sizes of query and value from ``64`` or ``256/16``."""
    query, _, value = text.partition("/")
    return int(query), int(value or query)


def digests(lines: Iterable[str]) -> dict[Row, tuple[str, str]]:
    """Return the blocks and the digest of each row of a table; other lines are ignored.

    A job may load a kernel several times, with different block sizes; the rows are then numbered.
    """
    found: dict[Row, tuple[str, str]] = {}
    for text in lines:
        words = text.split()
        if len(words) != 13 or words[0] not in GPUS:
            continue
        row = next(r for i in itertools.count() if (r := (*words[:6], str(i))) not in found)
        found[row] = " ".join(words[6:9]), words[-1]
    return found


def differences(before: dict[Row, tuple[str, str]], now: dict[Row, tuple[str, str]]) -> list[str]:
    """Return a line for each row of ``now`` whose digest differs from that of ``before``, or is not in ``before``."""
    found = []
    for row, (blocks, code) in now.items():
        name = " ".join(row[:6])
        if row not in before:
            found.append(f"{name}: not in the saved table")
        elif before[row][1] != code:
            blocks = blocks if before[row][0] == blocks else f"{before[row][0]} -> {blocks}"
            found.append(f"{name} {blocks}: {before[row][1]} -> {code}")
    return found


def main() -> None:
    """Compile all, print the table, compare."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--gpus", nargs="+", default=["a100", "rtx4090", "h100"], choices=GPUS)
    p.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"], choices=DTYPES)
    p.add_argument("--head-sizes", type=head_sizes, nargs="+", default=[(64, 64), (128, 128)], metavar="QUERY[/VALUE]")
    p.add_argument("--kinds", nargs="+", default=["full", "causal"], choices=KINDS)
    p.add_argument("--primitives", nargs="+", default=KERNELS, choices=KERNELS)
    p.add_argument("--cache", type=Path, help="folder of compiled kernels, instead of Triton's own")
    p.add_argument("--compare", type=Path, metavar="FILE", help="a saved table to compare the digests with")
    p.add_argument("--processes", type=int, default=os.cpu_count(), help="0: compile in this process")
    a = p.parse_args()
    saved = None if a.compare is None else digests(a.compare.read_text().splitlines())
    if a.cache is not None:
        os.environ["TRITON_CACHE_DIR"] = str(a.cache.resolve())
    todo = list(jobs(a))
    failed = 0
    lines: list[str] = []
    print(f"Triton {triton.__version__}")
    print(HEADER)
    with contextlib.ExitStack() as stack:
        compiled: Iterable[tuple[list[LoadedKernel], str | None]] = map(compile_one, todo)
        if a.processes:
            context = multiprocessing.get_context("spawn")
            pool = stack.enter_context(ProcessPoolExecutor(a.processes, mp_context=context))
            compiled = pool.map(compile_one, todo)
        done = tqdm(compiled, total=len(todo), desc="compile", mininterval=5, disable=None)
        for job, (loaded, problem) in zip(todo, done, strict=True):
            for k in loaded:
                lines.append(line(job, k))
                print(lines[-1], flush=True)
            if problem is not None:
                print(f"{head(job)} FAILED {problem}", flush=True)
                failed += 1
    print(f"{len(todo) - failed} of {len(todo)} compile")
    differ = [] if saved is None else differences(saved, digests(lines))
    if saved is not None:
        print(f"{len(lines) - len(differ)} of {len(lines)} kernels have the digest of {a.compare}")
        print("\n".join(f"DIFFERS {text}" for text in differ))
    sys.exit(1 if failed or differ else 0)


if __name__ == "__main__":
    main()
