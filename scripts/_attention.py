"""Measurements of ``bench_attention.py``: one rule of one implementation in one setting, checked before it is timed."""

from __future__ import annotations

import functools
import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves
from tqdm import tqdm
from triton.testing import do_bench

import metaattn
from metaattn.cli._derivatives import Attention, derivative
from metaattn.cli._metrics import relative_error

PRODUCTS = {"fwd": 2, "bwd": 5, "jvp": 6, "hvp": 20, "dbl": 21}
SHAPES = [(32, 16, 512, 64), (8, 16, 2048, 64), (2, 16, 8192, 64), (4, 16, 2048, 128), (1, 16, 8192, 128)]
SMALL = [(512, 4, 64, 32), (1024, 8, 64, 64), (256, 8, 197, 64)]
GRAPH_BELOW = 2**14  # MiB: a larger call takes longer than its launches, and a graph would keep the memory
BOUND = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 2e-3}
BOUND_HIGHEST = 1e-5  # float32 without tf32
SDPA = {
    "SDPA flash": SDPBackend.FLASH_ATTENTION,
    "SDPA cuDNN": SDPBackend.CUDNN_ATTENTION,
    "SDPA efficient": SDPBackend.EFFICIENT_ATTENTION,
    "SDPA math": SDPBackend.MATH,
}
OURS = {"metaattn auto": "auto", "metaattn triton": "triton"}


class Setting(NamedTuple):
    """Sizes and options of a measured call."""

    shape: tuple[int, int, int, int]
    causal: bool
    dtype: torch.dtype = torch.bfloat16
    kv_heads: int | None = None
    mask: bool = False
    window: int | None = None
    precision: str = "high"  # torch.get_float32_matmul_precision()

    def label(self) -> str:
        """Return the setting in words."""
        extra = [str(self.dtype)[6:] + " highest" * self.highest, "causal" if self.causal else "full"]
        extra += [f"{self.kv_heads} key heads"] * (self.kv_heads is not None)
        extra += ["boolean mask"] * self.mask + [f"window {self.window}"] * (self.window is not None)
        return f"{','.join(map(str, self.shape))} {', '.join(extra)}"

    @property
    def highest(self) -> bool:
        """Return whether products are in float32 without tf32."""
        return self.dtype == torch.float32 and self.precision == "highest"

    def pairs(self) -> float:
        """Return the number of elements of the score matrices that the band shows."""
        b, h, n, _ = self.shape
        if self.window is not None:
            return b * h * n * min(self.window, n)
        return b * h * n * n * (0.5 if self.causal else 1.0)

    def tensors(self, batch: int | None = None) -> list[Tensor]:
        """Return query, key, value, a cotangent, and tangents of the first three."""
        g = torch.Generator("cuda").manual_seed(0)
        b, h, n, d = self.shape
        kv = self.kv_heads or h
        sizes = [h, kv, kv, h, h, kv, kv]
        return [torch.randn(batch or b, heads, n, d, device="cuda", generator=g).to(self.dtype) for heads in sizes]

    def bool_mask(self) -> Tensor | None:
        """Return a mask that hides a fifth of the keys; ``None`` if the setting has none."""
        if not self.mask:
            return None
        g = torch.Generator("cuda").manual_seed(1)
        return torch.rand(1, 1, 1, self.shape[2], device="cuda", generator=g) > 0.2


def attention(name: str, s: Setting) -> Attention:
    """Return the attention of a name for a setting."""
    mask = s.bool_mask()
    if name in OURS:
        window = None if s.window is None else (s.window - 1, None)
        return functools.partial(
            metaattn.sdpa,
            attn_mask=mask,
            is_causal=s.causal and not s.mask,
            enable_gqa=s.kv_heads is not None,
            window=window,
            backend=OURS[name],
        )
    if name == "FlexAttention":
        return flex(s)
    backend = SDPA[name]

    def peer(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=s.causal and not s.mask, enable_gqa=s.kv_heads is not None
            )

    return peer


@functools.cache
def flex(s: Setting) -> Attention:
    """Return FlexAttention, compiled for the setting."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    n, block = s.shape[2], None
    if s.causal or s.window is not None:
        left = s.window or n
        block = create_block_mask(lambda b, h, i, j: (j <= i) & (i - j < left), None, None, n, n, device="cuda")
    torch.compiler.reset()  # after eight compilations it would run uncompiled, with all scores in memory
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda q, k, v: compiled(q, k, v, block_mask=block, enable_gqa=s.kv_heads is not None)


def rule(name: str, f: Attention, x: list[Tensor]) -> Callable[[], Any]:
    """Return a rule as a call to time. Passes that are not to be timed run before."""
    query, key, value, cotangent, *tangents = x
    return derivative(name, f, (query, key, value), tangents, cotangent)


def exact_attention(s: Setting) -> Attention:
    """Return the attention that gives exact results in float64: blockwise, whose memory is linear in length."""
    window = None if s.window is None else (s.window - 1, None)
    return functools.partial(
        metaattn.sdpa,
        attn_mask=s.bool_mask(),
        is_causal=s.causal and not s.mask,
        enable_gqa=s.kv_heads is not None,
        window=window,
        backend="blockwise",
    )


@functools.cache
def oracle(s: Setting, name: str) -> list[Tensor]:
    """Return the exact results of a rule on one batch, in float64."""
    x = [t.double() for t in s.tensors(1)]
    return [t.detach() for t in tree_leaves(rule(name, exact_attention(s), x)())]


def times(call: Callable[[], Any], quick: bool) -> dict[str, Any]:
    """Return the time on the GPU, the time of an eager call, and the peak memory above that before the call."""
    call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    peak = (torch.cuda.max_memory_allocated() - before) / 2**20
    warmup, rep = (4, 16) if quick else (10, 40)
    eager = do_bench(call, warmup=warmup, rep=rep, return_mode="median")
    row = {"peak_mib": peak, "eager_ms": eager, "ms": eager}
    if peak < GRAPH_BELOW:
        torch.cuda.empty_cache()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
            call()
        row["ms"] = do_bench(graph.replay, warmup=warmup, rep=rep, return_mode="median")
    return row


def measure(who: str, name: str, s: Setting, quick: bool) -> dict[str, Any]:
    """Return one row: a time, or the reason why there is none."""
    row: dict[str, Any] = {"who": who, "rule": name, "setting": s.label(), "shape": s.shape, "causal": s.causal}
    torch.set_float32_matmul_precision(s.precision)
    try:
        f = attention(who, s)
        if s.shape[2] <= 2048:
            row["error"] = relative_error(rule(name, f, s.tensors(1))(), oracle(s, name))  # on one batch
        if not row.get("error", 0.0) < (BOUND_HIGHEST if s.highest else BOUND[s.dtype]):
            return row | {"failed": f"wrong: relative error {row['error']:.1e}"}
        # A backward pass runs on the stream of its forward pass: use a stream that a graph can capture for both.
        with torch.cuda.stream(torch.cuda.Stream()):
            row |= times(rule(name, f, s.tensors()), quick)
        row["tflops"] = PRODUCTS[name] * 2 * s.pairs() * s.shape[3] / row["ms"] / 1e9
    except Exception as error:  # an implementation that does not support the call: the row says so
        row["failed"] = f"{type(error).__name__}: {str(error).splitlines()[0][:100] if str(error) else ''}"
    finally:
        torch.cuda.empty_cache()
    return row


def compile_one(work: tuple[Setting, list[str]]) -> None:
    """Compile our kernels for a setting and some rules into Triton's cache on disk."""
    s, names = work
    torch.set_float32_matmul_precision(s.precision)
    for name in names:
        rule(name, attention("metaattn triton", s), s.tensors())()
    torch.cuda.synchronize()


def compile_all(settings: list[tuple[Setting, list[str]]]) -> None:
    """Compile our kernels for all settings in parallel."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(14, os.cpu_count() or 1), mp_context=spawn) as pool:
        list(tqdm(pool.map(compile_one, settings), total=len(settings), desc="compile", mininterval=10))
