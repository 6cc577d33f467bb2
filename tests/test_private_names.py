"""Private names of PyTorch: which ones the project uses, with what parameters, and in which files."""

import ast
import importlib
import inspect
import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
FILES = [*sorted((ROOT / "metaattn").rglob("*.py")), *sorted((ROOT / "experiments").rglob("*.py"))]

# The files in which private names of PyTorch stand; all others use the names that these files give them.
HOMES = {
    "metaattn/autodiff/_functorch.py",
    "metaattn/autodiff/_torch_internals.py",
    "metaattn/compile/inductor.py",
}

# Names that may stand in other files too, each with the reason.
ANYWHERE = {
    "torch.utils._pytree": "documented functions (tree_map, tree_leaves) that have no public module yet",
    "torch._ops.HigherOrderOperator": "a class for isinstance, of what torch.ops.higher_order holds",
    "torch._ops.OpOverload": "a class for isinstance, of what torch.ops holds",
    "torch._C._nn": "the module that functions of torch.nn.functional are bindings of",
    "torch._foreach_copy_": "a copy of many tensors at once; optimizers outside of PyTorch use it too",
    "torch.utils._python_dispatch.TorchDispatchMode": "documented, without a public module",
}

# Every private name in the homes in autodiff. For functions, their parameters; ``None`` for the others. PyTorch 2.13.
NAMES = {
    "torch.Tensor._is_zerotensor": None,
    "torch._C._AutoDispatchBelowAutograd": None,
    "torch._C._DisableAutocast": None,
    "torch._C._after_autograd_keyset": None,
    "torch._C._functorch": None,
    "torch._C._functorch.TransformType": None,
    "torch._C._functorch._add_batch_dim": "arg0, arg1, arg2",
    "torch._C._functorch._unwrap_batched": "arg0, arg1",
    "torch._C._functorch._unwrap_for_grad": "arg0, arg1",
    "torch._C._functorch._wrap_for_grad": "arg0, arg1",
    "torch._C._functorch.get_interpreter_stack": "",
    "torch._C._functorch.get_unwrapped": "arg0",
    "torch._C._functorch.is_batchedtensor": "arg0",
    "torch._C._functorch.is_functorch_wrapped_tensor": "arg0",
    "torch._C._functorch.is_legacy_batchedtensor": "arg0",
    "torch._C._functorch.maybe_get_level": "arg0",
    "torch._C._functorch.peek_interpreter_stack": "",
    "torch._C._functorch.unwrap_if_dead": "arg0",
    "torch._C._is_fwd_grad_enabled": None,
    "torch._functorch.autograd_function.VmapInfo": None,
    "torch._functorch.eager_transforms": None,
    "torch._functorch.eager_transforms.JVP_NESTING": None,
    "torch._functorch.pyfunctorch.FuncTorchInterpreter": None,
    "torch._functorch.pyfunctorch.retrieve_all_functorch_interpreters": "",
    "torch._functorch.pyfunctorch.retrieve_current_functorch_interpreter": "",
    "torch._functorch.pyfunctorch.temporarily_clear_interpreter_stack": "",
    "torch._functorch.utils.enable_single_level_autograd_function": "",
    "torch._ops.HigherOrderOperator": None,
    "torch._ops._compute_keyset": "args, kwargs, non_fallthrough_keys",
    "torch.autograd.forward_ad._current_level": None,
    "torch.autograd.forward_ad._set_fwd_grad_enabled": None,
    "torch.autograd.function._SingleLevelFunction": None,
    "torch.overrides._get_current_function_mode_stack": "",
    "torch.overrides.redispatch_function": "func, types, args, kwargs",
    "torch.utils._python_dispatch._disable_current_modes": "",
    "torch.utils._python_dispatch._get_current_dispatch_mode": "",
    "torch.utils._pytree": None,
    "torch.utils._pytree.SUPPORTED_NODES": None,
    "torch.utils._pytree.TreeSpec": None,
    "torch.utils._pytree._LEAF_SPEC": None,
    "torch.utils._pytree._get_node_type": "tree",
    "torch.utils._pytree.tree_is_leaf": "tree, is_leaf",
}

# Methods and attributes of such objects, which no reading of the sources finds.
MEMBERS = {
    "torch._functorch.autograd_function.VmapInfo.batch_size": None,
    "torch._functorch.autograd_function.VmapInfo.randomness": None,
    "torch._functorch.pyfunctorch.FuncTorchInterpreter.key": "self",
    "torch._functorch.pyfunctorch.FuncTorchInterpreter.level": "self",
    "torch._functorch.pyfunctorch.FuncTorchInterpreter.lower": "self",
    "torch._functorch.pyfunctorch.VmapInterpreter.batch_size": "self",
    "torch._functorch.pyfunctorch.VmapInterpreter.randomness": "self",
    "torch._ops.HigherOrderOperator.dispatch": "self, dispatch_key, args, kwargs",
    "torch._ops.OpOverload.redispatch": "self, keyset, args, kwargs",
    "torch.fx.experimental.proxy_tensor.get_proxy_mode": "",
    "torch.overrides.has_torch_function": None,
    "torch.overrides.has_torch_function_unary": None,
    "torch.overrides.has_torch_function_variadic": None,
}

# Not in every version that is supported.
OPTIONAL = {"torch.overrides.redispatch_function"}


def _resolve(name):
    """The object that a dotted name refers to."""
    parts = name.split(".")
    for i in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:i]))
        except ImportError:
            continue
        for part in parts[i:]:
            found = getattr(found, part)
        return found
    raise AttributeError(name)


def _parameters(thing):
    """Names of the parameters of a function; one that is built in says them in its docstring."""
    if inspect.isbuiltin(thing):
        return ", ".join(re.findall(r"(\w+): ", (thing.__doc__ or "").split("->")[0]))
    return ", ".join(inspect.signature(thing).parameters)


def _is_private(name):
    parts = name.split(".")
    private = any(part.startswith("_") and not part.startswith("__") for part in parts[1:])
    return parts[0] == "torch" and private and parts[:2] != ["torch", "ops"]


def _dotted(node, names):
    """The dotted name of an expression of names and attributes, where the first is an import of PyTorch."""
    parts = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    if not isinstance(node, ast.Name) or node.id not in names:
        return None
    return ".".join([names[node.id], *reversed(parts)])


def private_names(path):
    """The private names of PyTorch in a file, each up to and including the part after the last private one."""
    tree, names, found = ast.parse(path.read_text()), {}, set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                names[alias.asname or alias.name.split(".")[0]] = (
                    alias.name if alias.asname else alias.name.split(".")[0]
                )
                if _is_private(alias.name):
                    found.add(alias.name)
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module.split(".")[0] == "torch":
            for alias in node.names:
                names[alias.asname or alias.name] = f"{node.module}.{alias.name}"
                if _is_private(f"{node.module}.{alias.name}"):
                    found.add(f"{node.module}.{alias.name}")
    inner = {n.value for n in ast.walk(tree) if isinstance(n, ast.Attribute)}  # parts of longer names
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node not in inner:
            name = _dotted(node, names)
            if name is not None and _is_private(name):
                found.add(name)
    return found


def _covered(name, allowed):
    return any(name == a or name.startswith(f"{a}.") for a in allowed)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_private_names_stand_in_few_files(path):
    if str(path.relative_to(ROOT)) in HOMES:
        return
    strays = sorted(n for n in private_names(path) if not _covered(n, ANYWHERE))
    assert not strays, (
        f"{path.relative_to(ROOT)} uses private names of PyTorch: {strays}; give them a name in "
        "autodiff/_functorch.py, autodiff/_torch_internals.py or compile/inductor.py"
    )


def test_this_file_lists_all_of_them():
    files = [ROOT / home for home in HOMES if home.startswith("metaattn/autodiff")]
    used = set().union(*map(private_names, files)) | OPTIONAL
    assert used == set(NAMES)


def test_pytorch_has_them_with_these_parameters():
    """Where this fails, the list says what a new PyTorch has changed; the homes above are the files to adapt."""
    changed = []
    inductor = ROOT / "metaattn/compile/inductor.py"
    of_compiler = private_names(inductor) if inductor.exists() else ()
    for name, parameters in {**dict.fromkeys((*ANYWHERE, *of_compiler)), **NAMES, **MEMBERS}.items():
        try:
            found = _resolve(name)
        except AttributeError:
            if name not in OPTIONAL:
                changed.append(f"{name} is gone")
            continue
        if parameters is not None and _parameters(found) != parameters:
            changed.append(f"{name} takes ({_parameters(found)}); it took ({parameters})")
    assert not changed, f"PyTorch {torch.__version__} has changed private names that we use:\n" + "\n".join(changed)
