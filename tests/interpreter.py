"""Make Triton's interpreter faster, in which the kernels run on a machine without a GPU.

Every operation of a kernel on a block is some hundred calls in Python there. What is avoided here is half of them, and
none of it changes a result.
"""

import functools

from triton import language
from triton.runtime import interpreter


def accelerate():
    """Replace the parts of the interpreter that repeat the same work in every call."""
    interpreter._patch_lang = _patch_once
    interpreter._get_np_dtype = _numpy_dtype
    # In each sum and product of integers: the same in 64 bits, and a comparison. Kernels on a GPU have no such check.
    interpreter.interpreter_builder.options = interpreter.InterpreterOptions(sanitize_overflow=False)


@functools.cache
def _language_modules(fn):
    """Return the modules that the interpreter patches for a function: Triton's language, by whatever name."""
    return [m for m in (language, language.core) if any(m is value for value in fn.__globals__.values())]


def _patch_once(fn, patch=interpreter._patch_lang):
    """Patch Triton's language for the outermost kernel only.

    The interpreter does it again for every function that a kernel calls, which took half of its time.
    """
    if any(language.core.is_builtin(m.load) for m in _language_modules(fn)):
        return patch(fn)
    return interpreter._LangPatchScope()


_scalar_dtype = functools.cache(interpreter._get_np_dtype)
_POINTER = interpreter._get_np_dtype(language.pointer_type(language.int8))


def _numpy_dtype(dtype):
    """Return NumPy's dtype of a type's elements from a table, which the interpreter builds again in every call."""
    scalar = dtype.scalar
    return _POINTER if isinstance(scalar, language.pointer_type) else _scalar_dtype(scalar)
