"""Keeping PyTorch's thread pool out of work that is too small for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def single_threaded(enabled: bool = True) -> Iterator[None]:
    """PyTorch's own operations run in the calling thread, inside this block (if `enabled`).

    After a parallel region OpenMP's workers spin for a while, on the core that the kernels' pool needs next;
    and where the machine is shared, a fork and join waits for a whole time slice. Work of tens of
    microseconds loses by both. Changing the number takes under a microsecond.
    """
    if not enabled:
        yield
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
