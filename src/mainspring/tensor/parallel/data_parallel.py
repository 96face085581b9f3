"""Data parallelism: gradients in buckets, each reduced while the backward pass goes on (csrc/parallel/buckets.h)."""

from __future__ import annotations

from typing import Any

from mainspring.tensor import _tensor as mt
from mainspring.tensor._tensor import Group
from mainspring.tensor.nn.module import Module


class DataParallel(Module):
    """Averages gradients over a group. Call `finish()` after backward(); it leaves them in `.grad`.

    Parameters are taken from rank 0. Buckets hold about `bucket_elements` and follow the reverse order of the
    parameters, which is about the order in which the backward pass meets them. A second backward pass before
    `finish()` is an AutogradError: accumulate with `main_grad` instead.
    """

    def __init__(self, module: Module, group: Group, bucket_elements: int = 1 << 20) -> None:
        super().__init__()
        self.module, self.group = module, group
        params = [p for p in module.parameters() if p.requires_grad]
        for p in params:
            group.broadcast(p.detach(), 0)
        self._buckets = mt._GradientBuckets(params, group, bucket_elements)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)

    def finish(self) -> None:
        """Waits for all buckets and sets `.grad`. A parameter without a gradient counts as zero on this rank."""
        self._buckets.finish()

    def remove_hooks(self) -> None:
        self._buckets.remove_hooks()
