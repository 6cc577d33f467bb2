"""Meta-step of ``bench_meta.py`` in JAX: jit of grad of vmap, with XLA's attention. Prints a JSON line for each row."""

import functools
import json
import math
import os
import sys
import time
from typing import Any

os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
import jax
import jax.numpy as jnp

jax.config.update("jax_default_matmul_precision", "tensorfloat32")
Params = dict[str, Any]


def normalised(x: Any) -> Any:
    """Apply layer norm without weights, with statistics in float32."""
    wide = x.astype(jnp.float32)
    centred = wide - wide.mean(-1, keepdims=True)
    return (centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + 1e-5)).astype(x.dtype)


def init(layers: int, width: int, tokens: int, dtype: Any) -> Params:
    """Return random weights of the shapes in ``bench_meta.py``."""
    shapes = {"in": (1, width), "positions": (tokens, width), "out": (width, 1)}
    for i in range(layers):
        shapes |= {f"{i}.qkv": (width, 3 * width), f"{i}.attention": (width, width)}
        shapes |= {f"{i}.up": (width, 4 * width), f"{i}.down": (4 * width, width)}
    keys = jax.random.split(jax.random.PRNGKey(0), len(shapes))
    draw = zip(shapes.items(), keys, strict=True)
    return {name: (jax.random.normal(k, s) / math.sqrt(s[0])).astype(dtype) for (name, s), k in draw}


def model(p: Params, x: Any, layers: int, heads: int) -> Any:
    """Apply a pre-norm causal Transformer to ``[sequences, tokens, 1]``; returns the same shape."""
    h = x @ p["in"] + p["positions"]
    for i in range(layers):
        b, n, d = h.shape
        q, k, v = jnp.moveaxis((normalised(h) @ p[f"{i}.qkv"]).reshape(b, n, 3, heads, d // heads), 2, 0)
        a = jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="xla")
        h = h + a.reshape(b, n, d) @ p[f"{i}.attention"]
        h = h + jax.nn.gelu(normalised(h) @ p[f"{i}.up"], approximate=False) @ p[f"{i}.down"]
    return normalised(h) @ p["out"]


def row(size: list[int], dtype: Any) -> dict[str, Any]:
    """Measure one row of the table."""
    tasks, sequences, tokens, layers, width, heads, steps = size
    p = init(layers, width, tokens, dtype)
    keys = jax.random.split(jax.random.PRNGKey(1))
    support, query = (jax.random.normal(k, (tasks, sequences, tokens, 1)).astype(dtype) for k in keys)

    def loss(p: Params, x: Any) -> Any:
        y = model(p, x, layers, heads)
        return jnp.square(y[:, :-1].astype(jnp.float32) - x[:, 1:].astype(jnp.float32)).mean()

    def task(p: Params, support: Any, query: Any) -> Any:
        for _ in range(steps):
            gradient = jax.grad(loss)(p, support)
            p = {k: (p[k] - 0.01 * gradient[k]).astype(dtype) for k in p}
        return loss(p, query)

    step = jax.jit(jax.grad(lambda p, s, q: jax.vmap(functools.partial(task, p))(s, q).mean()))
    out: dict[str, Any] = {"who": "JAX jit", "sizes": size}
    out["setting"] = f"{','.join(map(str, size))} {jnp.dtype(dtype).name}"
    try:
        start = time.perf_counter()
        compiled = step.lower(p, support, query).compile()
        jax.block_until_ready(compiled(p, support, query))
        out["first_s"] = time.perf_counter() - start
        memory = compiled.memory_analysis()
        out["peak_mib"] = (memory.temp_size_in_bytes + memory.output_size_in_bytes) / 2**20
        times = []
        for _ in range(10):
            start = time.perf_counter()
            jax.block_until_ready(compiled(p, support, query))
            times.append(time.perf_counter() - start)
        out["ms"] = 1e3 * sorted(times)[5]
    except Exception as error:
        out["failed"] = f"{type(error).__name__}: {str(error).splitlines()[0][:80]}"
    return out


def main() -> None:
    """Measure every size in every dtype."""
    for size in json.loads(sys.argv[1]):
        for dtype in sys.argv[2:]:
            print(json.dumps(row(size, jnp.dtype(dtype))), flush=True)


if __name__ == "__main__":
    main()
