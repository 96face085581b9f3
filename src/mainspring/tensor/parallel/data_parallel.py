"""Data parallelism: gradients in buckets, each reduced while the backward pass goes on."""

from __future__ import annotations

from typing import Any

from mainspring.tensor import _tensor as mt
from mainspring.tensor._tensor import AutogradError, Group, Parameter, Tensor, Work
from mainspring.tensor.nn.module import Module


class _Bucket:
    """Parameters whose gradients lie in one buffer. Reduced as soon as the last of them is there."""

    def __init__(self, params: list[Parameter]) -> None:
        self.params = params
        self.buffer = mt.zeros(sum(p.numel() for p in params), dtype=params[0].dtype)
        self.views: list[Tensor] = []
        at = 0
        for p in params:
            self.views.append(self.buffer[at : at + p.numel()].reshape(p.shape))
            at += p.numel()
        self.filled: set[int] = set()
        self.work: Work | None = None


class DataParallel(Module):
    """Averages gradients over a group. Call `finish()` after backward(); it leaves them in `.grad`.

    Parameters are taken from rank 0. Buckets hold about `bucket_elements` and follow the reverse order of the
    parameters, which is about the order in which the backward pass meets them.
    """

    def __init__(self, module: Module, group: Group, bucket_elements: int = 1 << 20) -> None:
        super().__init__()
        self.module, self.group = module, group
        params = [p for p in module.parameters() if p.requires_grad]
        for p in params:
            group.broadcast(p.detach(), 0)
        groups: list[list[Parameter]] = []
        for p in reversed(params):
            full = groups and sum(q.numel() for q in groups[-1]) >= bucket_elements
            if not groups or full or groups[-1][0].dtype is not p.dtype:
                groups.append([])
            groups[-1].append(p)
        self._buckets = [_Bucket(g) for g in groups]
        self._handles = [
            p.register_hook(self._hook(bucket, i))
            for bucket in self._buckets
            for i, p in enumerate(bucket.params)
        ]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)

    def _hook(self, bucket: _Bucket, index: int) -> Any:
        def take(grad: Tensor) -> None:
            if index in bucket.filled:
                raise AutogradError(
                    "DataParallel: a second backward pass before finish(); accumulate with main_grad instead"
                )
            bucket.views[index].copy_(grad.detach())
            bucket.filled.add(index)
            if len(bucket.filled) == len(bucket.params):
                bucket.work = self.group.all_reduce(bucket.buffer, "avg", async_op=True)

        return take

    def finish(self) -> None:
        """Waits for all buckets and sets `.grad`. A parameter without a gradient counts as zero on this rank."""
        for bucket in self._buckets:
            if bucket.work is None:
                for i, view in enumerate(bucket.views):
                    if i not in bucket.filled:
                        view.zero_()
                bucket.work = self.group.all_reduce(bucket.buffer, "avg", async_op=True)
        for bucket in self._buckets:
            if bucket.work is not None:
                bucket.work.wait()
            for p, view in zip(bucket.params, bucket.views, strict=True):
                p.grad = view.clone()
            bucket.work = None
            bucket.filled.clear()

    def remove_hooks(self) -> None:
        for handle in self._handles:
            handle.remove()
