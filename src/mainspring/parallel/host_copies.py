"""Copies of a device's tensors in host memory, for a writer that works while the originals move on."""

from __future__ import annotations

import torch
from torch import Tensor


class HostCopies:
    """Buffers that are kept between uses: pinning host memory anew for each checkpoint would cost more than the copy.

    `copy` may return before the copy is there; `finish` waits for all of them. Whoever reads a copy must be done
    before the next `copy` of the same name.
    """

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def copy(self, name: str, tensor: Tensor) -> Tensor:
        """The tensor's values in host memory, contiguous and of its shape and dtype."""
        source = tensor.detach()
        buffer = self._buffers.get(name)
        if buffer is None or buffer.shape != source.shape or buffer.dtype is not source.dtype:
            buffer = torch.empty(source.shape, dtype=source.dtype, pin_memory=source.is_cuda)
            self._buffers[name] = buffer
        buffer.copy_(source, non_blocking=True)
        return buffer

    def finish(self) -> None:
        """Waits until every copy is there."""
        if any(buffer.is_pinned() for buffer in self._buffers.values()) and torch.cuda.is_initialized():
            torch.cuda.current_stream().synchronize()
