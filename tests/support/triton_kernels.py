"""Where the tests of the Triton kernels run: on a GPU, or under TRITON_INTERPRET=1 on the CPU.

On a CPU `test_triton_interpreter.py` runs them all in a process of its own, because Triton reads that variable
when it is first imported.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from typing import Any

import pytest
import torch
from torch import Tensor

from mainspring.ops.triton.support import interpreted

INTERPRETED = interpreted()
DEVICE = "cpu" if INTERPRETED else "cuda"
AVAILABLE = importlib.util.find_spec("triton") is not None
# The interpreter has no bf16 arithmetic: it computes garbage, silently.
DTYPES = (torch.float32, torch.float16) if INTERPRETED else (torch.float32, torch.float16, torch.bfloat16)
EXAMPLES = 3 if INTERPRETED else 16

needs_triton = [
    pytest.mark.skipif(not AVAILABLE, reason="Triton is not installed"),
    *([] if INTERPRETED else [pytest.mark.gpu]),
]


def _index_of_one_element() -> None:
    """The interpreter asks numpy for the integer in an array of one element, which numpy 2.4 refuses."""
    import triton.runtime.interpreter as interpreter

    patch = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patched


def _rows_of_products() -> None:
    """The interpreter multiplies by numpy's BLAS, where a row's bits may depend on its place in the tile (they do
    on some processors). A tensor core's do not: here, products are added in the order of k."""
    import numpy as np
    import triton.runtime.interpreter as interpreter

    def create_dot(
        self: Any, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any
    ) -> Any:
        x, y = (handle.data.astype(d.data.dtype) for handle in (a, b))
        total = np.zeros_like(d.data)
        for k in range(x.shape[1]):
            total += x[:, k, None] * y[None, k]
        return interpreter.TensorHandle(total + d.data, d.dtype.scalar)

    interpreter.InterpreterBuilder.create_dot = create_dot


def _without_overflow_checks() -> None:
    """Every sum and product of integers is computed a second time in 64 bits, to look for what tiny shapes have not."""
    import triton.runtime.interpreter as interpreter

    options = interpreter.interpreter_builder.options
    interpreter.interpreter_builder.options = dataclasses.replace(options, sanitize_overflow=False)


def _patched_once() -> None:
    """The interpreter patches Triton's language anew in every call of a function from a kernel, a quarter of its time;
    what the kernel's own patch has covered needs no second one."""
    import triton.runtime.interpreter as interpreter

    patch = interpreter._patch_lang
    covered: set[int] = set()

    def languages(function: Any) -> set[int]:
        modules = (interpreter.tl, interpreter.tl.core)
        return {id(value) for value in function.__globals__.values() if any(value is m for m in modules)}

    def patched(function: Any) -> Any:
        needed = languages(function)
        if needed <= covered:
            return None  # of a call in a kernel, which keeps no scope
        scope = patch(function)
        if covered:
            outermost[0]._changes.extend(scope._changes)
        else:
            restore = scope.restore
            outermost[0] = scope

            def restored() -> None:
                covered.clear()
                restore()

            scope.restore = restored
        covered.update(needed)
        return scope

    outermost: list[Any] = [None]
    interpreter._patch_lang = patched


if INTERPRETED and AVAILABLE:
    _patched_once()
    _without_overflow_checks()
    _index_of_one_element()
    _rows_of_products()


def random_tensor(seed: int, *shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    """Normal values on the tests' device, the same for the same seed and shape."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * scale).to(DEVICE, dtype)


def bits(x: Tensor) -> Tensor:
    """The bit patterns."""
    return x.contiguous().view(torch.int16 if x.element_size() == 2 else torch.int32)


def assert_same_bits(a: Tensor, b: Tensor) -> None:
    """Every element of the one is the other's, bit for bit."""
    assert a.shape == b.shape
    assert a.dtype == b.dtype
    different = int((bits(a) != bits(b)).sum())
    assert different == 0, f"{different} of {a.numel()} elements differ"
