"""Private names of Inductor, Dynamo and FX that we use: with a PyTorch that changed one, this list shows which."""

import importlib
import inspect
import re
from pathlib import Path

import pytest

from metaattn.compile import inductor

# Module, name, and the parameters that we give; of a class, those of its constructor.
NAMES = [
    ("torch._inductor.compile_fx", "compile_fx", ["model_", "example_inputs_", "config_patches", "ignore_shape_env"]),
    ("torch._inductor.config", "fx_graph_cache", None),
    ("torch._inductor.config", "force_disable_caches", None),
    ("torch._inductor.config", "compile_threads", None),
    ("torch._inductor.config", "worker_start_method", None),
    ("torch._inductor.config", "combo_kernels", None),
    ("torch._inductor.async_compile", "shutdown_compile_workers", []),
    ("torch._dynamo.convert_frame", "compile_lock", None),
    ("torch._dynamo.utils", "counters", None),
    ("torch._guards", "TracingContext", ["fake_mode"]),
    ("torch._guards", "tracing", ["context"]),
    ("torch._decomp", "get_decompositions", ["aten_ops"]),
    ("torch._functorch.compile_utils", "fx_graph_cse", ["fx_g"]),
    ("torch._subclasses", "FakeTensorMode", ["allow_non_fake_inputs", "shape_env"]),
    ("torch.compiler.config", "cache_key_tag", None),
    ("torch.compiler.config", "patch", None),
    ("torch.fx._graph_pickler", "GraphPickler", None),
    ("torch.fx._graph_pickler", "Options", ["ops_filter"]),
    ("torch.fx.experimental.symbolic_shapes", "ShapeEnv", None),
]


@pytest.mark.parametrize(("module", "name", "parameters"), NAMES, ids=[f"{module}.{name}" for module, name, _ in NAMES])
def test_name(module, name, parameters):
    thing = getattr(importlib.import_module(module), name)
    if parameters is not None:
        assert set(parameters) <= set(inspect.signature(thing).parameters)


PRIVATE = re.compile(
    r"^ *from (torch\.(?:_|fx\._|fx\.experimental|compiler)[\w.]*) import (.+?)(?:  #.*)?$", re.MULTILINE
)


def test_all_are_listed_and_in_one_file():
    """Each is imported in a function, when it is needed."""
    listed = {f"{module}.{name}" for module, name, _ in NAMES}
    for path in Path(inductor.__file__).parent.rglob("*.py"):
        found = PRIVATE.findall(path.read_text())
        if path.name != "inductor.py":
            assert not found, f"{path} imports {found}"
        for module, names in found:
            for name in names.split(", "):
                full = f"{module}.{name}"
                assert any(known.startswith(full) for known in listed), f"{full} is not in the list"
    assert not [line for line in Path(inductor.__file__).read_text().splitlines() if line.startswith("from torch._")]
