"""The compiled module `mainspring._kernels`, if this installation has it, and the reason if it has not."""

from __future__ import annotations

import functools
import importlib
from types import ModuleType
from typing import Any

import torch

from mainspring.errors import BackendError

_FIX = (
    "install a C++20 compiler (GCC 11, Clang 14 or later) and run `pip install --force-reinstall --no-deps mainspring` "
    "(in a checkout: `pip install --no-build-isolation -e .`)"
)


@functools.cache
def _load() -> tuple[ModuleType | None, str | None]:
    try:
        return importlib.import_module("mainspring._kernels"), None
    except ImportError as error:
        return None, f"the C++ kernels cannot be imported ({error}): {_FIX}"


def kernels() -> ModuleType | None:
    """The compiled module, or None; the import is tried once."""
    return _load()[0]


def unavailable_reason() -> str | None:
    """Why `kernels()` is None (the import error and the fix), or None when it is there."""
    return _load()[1]


@functools.cache
def require_kernels() -> Any:
    """The compiled module.

    Raises:
        BackendError: this installation has no C++ kernels.
    """
    module, reason = _load()
    if module is None:
        raise BackendError(reason)
    return module


# The codes of kernels.h (ms_dtype). A dtype that is missing here has no CPU kernel.
DTYPE_CODES: dict[torch.dtype, int] = {torch.float32: 0, torch.bfloat16: 1}


def dtype_code(operation: str, tensor: torch.Tensor) -> int:
    """The kernels' code of `tensor`'s dtype, having checked that it lies on the CPU.

    Raises:
        BackendError: another device or dtype.
    """
    code = DTYPE_CODES.get(tensor.dtype)
    if code is None or tensor.is_cpu is not True:
        raise BackendError(
            f"{operation}: the CPU kernels take float32 and bfloat16 tensors on the CPU, "
            f"not {tensor.dtype} on {tensor.device}; convert the tensor or use another backend"
        )
    return code
