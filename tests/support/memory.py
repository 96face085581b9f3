"""Memory in which what a kernel forgets to write shows; tests/ops/conftest.py has the fixture."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

in_poisoned_memory = pytest.mark.usefixtures("poisoned")


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Every uninitialised tensor is full of NaN."""
    # torch.use_deterministic_algorithms, but for the compiler that it imports, which takes seconds
    torch._C._set_deterministic_algorithms(True, warn_only=True)
    filled = torch._C._get_deterministic_fill_uninitialized_memory()  # a trainer of this process turns it off
    torch._C._set_deterministic_fill_uninitialized_memory(True)
    try:
        assert torch.empty(3).isnan().all()
        yield
    finally:
        torch._C._set_deterministic_algorithms(False)
        torch._C._set_deterministic_fill_uninitialized_memory(filled)
