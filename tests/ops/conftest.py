"""Fixtures of the tests of operations."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from support.memory import poisoned_memory


@pytest.fixture(scope="module")
def poisoned() -> Iterator[None]:
    """While a file's tests run, new memory is full of NaN."""
    with poisoned_memory():
        yield
