"""No test leaves a tensor behind: neither in Python nor on a tape."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

import mainspring.tensor as mt


@pytest.fixture(autouse=True)
def _no_tensor_is_left() -> Iterator[None]:
    before = mt.live_tensors()
    mt.set_num_threads(1)
    mt.manual_seed(0)
    yield
    if (
        mt.live_tensors() != before
    ):  # a cycle through Python, such as an exception's traceback, may wait for the collector
        gc.collect()
    assert mt.live_tensors() == before
