"""Importing the library loads no module beside PyTorch that takes long. The modules are looked at, not a clock."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
# Each takes from a tenth of a second to a second to import, and PyTorch does not import it by itself.
SLOW = ("torch._dynamo", "torch._inductor", "torch._functorch.aot_autograd", "sympy", "triton", "matplotlib", "hydra")

# Imports packages of the library without metaattn/__init__.py, which imports all of them.
BARE = f"""
import sys, types
package = types.ModuleType("metaattn")
package.__path__ = [{str(ROOT / "metaattn")!r}]
sys.modules["metaattn"] = package
"""

EAGER = """
import torch
from metaattn.ops import sdpa, sdpa_hvp
q = torch.randn(1, 2, 3, 4, requires_grad=True)
sdpa(q, q, q).sum().backward()
sdpa_hvp((q, q, q), (q, q, q), torch.ones_like(q))
"""

COMPILED = """
import torch, metaattn.ops
assert "torch._dynamo" not in sys.modules
q = torch.randn(1, 2, 3, 4)
f = torch.func.grad(lambda q: metaattn.ops.sdpa(q, q, q).sin().sum())
graphs = []

def backend(graph, inputs):
    graphs.append([n.target for n in graph.graph.nodes])
    return graph

torch.testing.assert_close(torch.compile(f, backend=backend, fullgraph=True)(q), f(q))
assert [metaattn.ops._rules._forward in targets for targets in graphs] == [True]
"""


def run(code):
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def loads(code):
    """The slow modules that a program loads and that importing PyTorch alone does not."""
    run(f"""
import sys, torch
before = set(sys.modules)
{code}
slow = [name for name in {SLOW} if name in sys.modules and name not in before]
assert not slow, f"loaded: {{slow}}"
""")


def test_importing_the_library():
    loads("import metaattn")


def test_packages_and_eager_derivatives():
    """By plain autograd: PyTorch imports sympy in autograd.grad, and Dynamo at the first transform of torch.func."""
    loads(f"{BARE}\nimport metaattn.backends, metaattn.autodiff, metaattn.ops, metaattn.nn\n{EAGER}")


def test_functions_are_marked_when_dynamo_is_imported_later():
    run(BARE + COMPILED)
