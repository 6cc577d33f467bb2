"""JAX's XLA attention and its derivatives under jit: JSON lines for ``bench_attention.py``."""

import functools
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
import jax
import jax.numpy as jnp

PRODUCTS = {"fwd": 2, "jvp": 6, "hvp": 20, "dbl": 21}


def milliseconds(f: Callable[..., Any], x: tuple[Any, ...], repeats: int = 10) -> float:
    """Return the median time of some calls, after two that compile and warm up."""
    for _ in range(2):
        jax.block_until_ready(f(*x))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(f(*x))
        times.append(time.perf_counter() - start)
    return 1e3 * sorted(times)[repeats // 2]


def main() -> None:
    """Measure every rule on every shape."""
    for shape in json.loads(sys.argv[1]):
        b, h, n, d = shape
        keys = jax.random.split(jax.random.PRNGKey(0), 7)
        x = tuple(jax.random.normal(key, (b, n, h, d), jnp.bfloat16) for key in keys)
        for causal in (False, True):
            f = functools.partial(jax.nn.dot_product_attention, is_causal=causal, implementation="xla")

            def gradient(q: Any, k: Any, v: Any, w: Any, f: Any = f) -> Any:
                return jax.vjp(f, q, k, v)[1](w)

            calls = {
                "fwd": lambda q, k, v, w, *t, f=f: f(q, k, v),
                "jvp": lambda q, k, v, w, *t, f=f: jax.jvp(f, (q, k, v), t),
                "hvp": lambda q, k, v, w, *t, g=gradient: jax.jvp(functools.partial(g, w=w), (q, k, v), t),
                "dbl": lambda q, k, v, w, *t, g=gradient: jax.vjp(g, q, k, v, w)[1](t),
            }
            for name, call in calls.items():
                row = {"who": "JAX XLA", "rule": name, "shape": shape, "causal": causal}
                row["setting"] = f"{','.join(map(str, shape))} bfloat16, {'causal' if causal else 'full'}"
                try:
                    row["ms"] = milliseconds(jax.jit(call), x)
                    row["tflops"] = PRODUCTS[name] * 2 * b * h * n * n * d * (0.5 if causal else 1) / row["ms"] / 1e9
                except Exception as error:
                    row["failed"] = f"{type(error).__name__}: {str(error).splitlines()[0][:80]}"
                print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
