"""Docstrings: complete on every public name, and a noun or a verb first everywhere."""

import ast
import functools
import importlib
import inspect
import pkgutil
import re
from pathlib import Path

import pytest

import metaattn

ROOT = Path(__file__).parent.parent
PACKAGES = ["metaattn", "metaattn.meta", "metaattn.meta.algorithms", "metaattn.nn", "metaattn.tasks"]
INTEGRATIONS = [
    f"metaattn.integrations.{m.name}"
    for m in pkgutil.iter_modules(importlib.import_module("metaattn.integrations").__path__)
    if not m.name.startswith("_")
]
MODULES = [*PACKAGES, "metaattn.integrations", *INTEGRATIONS]
QUESTIONS = ("What", "Whether", "How", "Which", "Likewise")  # first words that no docstring has
RIDDLES = (*QUESTIONS, "Those", "Where", "Why", "If")  # nor a public one
MADE = ("Captured", "Explanation")  # classes whose objects are made by a function, which documents the arguments
SECTION = re.compile(r"^(Args|Attributes|Returns|Yields|Raises|Source|Example|Examples):$", re.MULTILINE)


def _public(module):
    """The public functions and classes of a module: those in ``__all__``, or defined in a module without."""
    names = getattr(module, "__all__", None)
    if names is None:
        names = [n for n, v in vars(module).items() if not n.startswith("_") and _home(v) == module.__name__]
    for name in names:
        value = getattr(module, name)
        if inspect.isclass(value) or inspect.isroutine(value):
            yield name, value


def _home(value):
    return getattr(value, "__module__", None) if inspect.isclass(value) or inspect.isroutine(value) else None


def _methods(cls):
    """Public methods that a class of ours defines itself, without those that override a documented one."""
    for name, value in vars(cls).items():
        function = value.__func__ if isinstance(value, classmethod | staticmethod) else value
        if name.startswith("_") or not inspect.isfunction(function):
            continue
        doc = inspect.cleandoc(function.__doc__ or "")
        if any(name in vars(base) for base in cls.__mro__[1:]) and doc.startswith("See :class:`"):
            continue
        yield f"{cls.__name__}.{name}", function


@functools.cache
def _objects():
    """Each public object once, by its full name: functions, classes and their methods."""
    found = {}
    for module in map(importlib.import_module, MODULES):
        for name, value in _public(module):
            if value in found.values():
                continue
            found[f"{module.__name__}.{name}"] = value
            if inspect.isclass(value):
                found |= {f"{module.__name__}.{n}": f for n, f in _methods(value)}
    return found


def _sections(doc):
    """The text of each section of a docstring in Google style, by its title; the introduction has none."""
    parts = SECTION.split(doc)
    return {"": parts[0], **dict(zip(parts[1::2], parts[2::2], strict=True))}


def _parameters(value):
    """Names of the arguments that a docstring must explain."""
    if inspect.isclass(value) and value.__init__ is object.__init__ and value.__new__ is object.__new__:
        return []
    try:
        signature = inspect.signature(value)
    except ValueError:
        return []
    return [name for name in signature.parameters if name not in ("self", "cls")]


def _returns(value):
    return not inspect.isclass(value) and inspect.signature(value).return_annotation not in (
        None,
        "None",
        inspect.Signature.empty,
    )


def _faults(name, value):
    """List what is missing in the docstring of a public object."""
    module = max((m for m in MODULES if name.startswith(f"{m}.")), key=len)
    doc, is_method = inspect.cleandoc(value.__doc__ or ""), "." in name.removeprefix(f"{module}.")
    if not doc:
        return ["has no docstring"]
    sections, faults = _sections(doc), []
    first = doc.split(maxsplit=1)[0]
    if not first[0].isupper() or first.rstrip(":,.") in RIDDLES:
        faults.append(f"opens with {first!r} instead of a capitalised noun or verb")
    for parameter in [] if getattr(value, "__name__", "") in MADE else _parameters(value):
        entry = rf"^ {{4}}(\*{{0,2}}\w+, )*\*{{0,2}}{parameter}(, \*{{0,2}}\w+)*: "
        if not re.search(entry, sections.get("Args", ""), re.MULTILINE):
            faults.append(f"does not explain {parameter} in Args")
    if not is_method and _returns(value) and not {"Returns", "Yields"} & set(sections):
        faults.append("has no section Returns")
    if not is_method and getattr(value, "__name__", "") not in MADE and ">>>" not in sections.get("Example", ""):
        faults.append("has no Example with >>>")
    return faults


@pytest.mark.parametrize("name", _objects())
def test_public_docstrings(name):
    """Each public name has its arguments explained, its result, and an example that runs."""
    assert not (faults := _faults(name, _objects()[name])), f"the docstring of {name} " + "; ".join(faults)


@pytest.mark.parametrize(
    "name", ["init", "trajectory", "at", "adapt", "task_loss", "objective", "losses", "value_and_grad"]
)
def test_methods_of_learners(name):
    """Their result and an example, too."""
    sections = _sections(inspect.cleandoc(getattr(metaattn.meta.Learner, name).__doc__))
    assert {"Args", "Returns", "Raises", "Example"} <= set(sections)
    assert ">>>" in sections["Example"]


@pytest.mark.parametrize("name", ["Explanation", "Gradients", "Hvp", "Jvp", "Vjp"])
def test_results_of_the_operator(name):
    """Each field of a result is explained."""
    cls = getattr(importlib.import_module("metaattn.ops"), name)
    sections = _sections(inspect.cleandoc(cls.__doc__))
    fields = sections.get("Args", "") + sections.get("Attributes", "")
    missing = [f for f in inspect.signature(cls).parameters if not re.search(rf"\b{f}\b.*: ", fields)]
    assert not missing, f"the docstring of metaattn.ops.{name} does not explain {', '.join(missing)}"


@pytest.mark.parametrize("name", MODULES)
def test_modules(name):
    doc = importlib.import_module(name).__doc__
    assert doc
    assert doc.split(maxsplit=1)[0] not in RIDDLES


def test_algorithms_name_their_options():
    """No ``**settings``: an editor shows the options, and an unknown one is an error of the function called."""
    algorithms = importlib.import_module("metaattn.meta.algorithms")
    hidden = {
        f"{name}({parameter})"
        for name, value in _public(algorithms)
        for parameter in ([] if inspect.isabstract(value) else inspect.signature(value).parameters.values())
        if parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
    }
    assert not hidden


def _docstrings(path):
    """Line and text of every docstring in a file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            doc = ast.get_docstring(node)
            if doc:
                yield node.body[0].lineno, doc


@pytest.mark.parametrize("folder", ["metaattn", "experiments", "scripts", "tests"])
def test_docstrings_open_with_a_noun_or_a_verb(folder):
    """A docstring says what its function does or is; one that opens with a question leaves that open."""
    offenders = [
        f"{path.relative_to(ROOT)}:{line}: {doc.splitlines()[0]}"
        for path in sorted((ROOT / folder).rglob("*.py"))
        for line, doc in _docstrings(path)
        if re.match(rf"({'|'.join(QUESTIONS)})\b", doc)
    ]
    assert not offenders, f"{len(offenders)} docstrings open with {', '.join(QUESTIONS)}:\n" + "\n".join(offenders)


def test_the_faults_are_found():
    """The checks above fail where they should."""

    def bad(x, *, y=1, **settings) -> int:
        return x

    name = "metaattn.meta.bad"
    bad.__doc__ = "Whether x.\n\nArgs:\n    x: A number."
    assert _faults(name, bad) == [
        "opens with 'Whether' instead of a capitalised noun or verb",
        "does not explain y in Args",
        "does not explain settings in Args",
        "has no section Returns",
        "has no Example with >>>",
    ]
    bad.__doc__ = (
        "Return x.\n\nArgs:\n    x, y: Numbers.\n    **settings: Rest.\n\nReturns:\n    x\n\nExample:\n    >>> 1\n    1"
    )
    assert _faults(name, bad) == []
    bad.__doc__ = None
    assert _faults(name, bad) == ["has no docstring"]
