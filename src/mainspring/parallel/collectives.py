"""The collectives of this room over a `Group`: rows of matrices, sums in the order of ranks, and point to point.

Each passes the group's monitor, which counts its bytes and can name it when it hangs. A group of one costs nothing.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mainspring.ops.precision import accumulator
from mainspring.parallel.mesh import Group, even_bounds

# PyTorch 2.13 renames both and warns of the old names.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


@dataclass
class Pending:
    """A tensor that a collective in flight will fill; `wait` gives it."""

    result: Tensor
    work: Any = None
    group: Group | None = None
    keep: object = None
    """What must live until the collective is done."""

    def wait(self) -> Tensor:
        if self.work is not None:
            self.work.wait()
            self.work = self.keep = None
            assert self.group is not None  # set with the work
            self.group.monitor.leave()
        return self.result


def all_reduce(x: Tensor, group: Group) -> Tensor:
    """The sum over the group, in x itself."""
    return start_all_reduce(x, group).wait()


def start_all_reduce(x: Tensor, group: Group) -> Pending:
    if group.size == 1:
        return Pending(x)
    _enter("all_reduce", x, group)
    return Pending(x, dist.all_reduce(x, group=group.handle, async_op=True), group)


def all_reduce_max(x: Tensor, group: Group) -> Tensor:
    """The largest over the group, in x itself."""
    if group.size > 1:
        _enter("all_reduce", x, group)
        dist.all_reduce(x, op=dist.ReduceOp.MAX, group=group.handle)
        group.monitor.leave()
    return x


def start_gather_flat(out: Tensor, piece: Tensor, group: Group) -> Pending:
    """The ranks' equal 1-D pieces end to end, in out."""
    if group.size == 1:
        out.copy_(piece)
        return Pending(out)
    _enter("all_gather", piece, group)
    return Pending(out, _all_gather(out, piece, group=group.handle, async_op=True), group, piece)


def start_reduce_scatter_flat(whole: Tensor, group: Group) -> Pending:
    """This rank's equal 1-D piece of the sum over the group."""
    if group.size == 1:
        return Pending(whole)
    piece = torch.empty(whole.shape[0] // group.size, dtype=whole.dtype, device=whole.device)
    _enter("reduce_scatter", whole, group)
    return Pending(piece, _reduce_scatter(piece, whole, group=group.handle, async_op=True), group, whole)


def gather_rows(x: Tensor, total: int, group: Group) -> Tensor:
    """The ranks' rows end to end. x: [n, ...], the rank's piece of `total` rows by `even_bounds` -> [total, ...]."""
    return start_gather_rows(x, total, group)()


class start_gather_rows:
    """`gather_rows` in flight; calling it waits."""

    def __init__(self, x: Tensor, total: int, group: Group) -> None:
        self._total, self._group, self._x = total, group, x
        self._pending: Pending | None = None
        if group.size == 1:
            return
        self._rows = -(-total // group.size)
        if x.shape[0] < self._rows:
            x = torch.cat([x, x.new_zeros(self._rows - x.shape[0], *x.shape[1:])])
        x = x.contiguous()
        out = x.new_empty(self._rows * group.size, *x.shape[1:])
        _enter("all_gather", x, group)
        work = _all_gather(out, x, group=group.handle, async_op=True)
        self._pending = Pending(out, work, group, x)

    def __call__(self) -> Tensor:
        if self._pending is None:
            return self._x
        out, size = self._pending.wait(), self._group.size
        if self._total % size == 0:
            return out
        bounds = even_bounds(self._total, size)
        pieces = out.split(self._rows)
        return torch.cat([p[: b - a] for p, a, b in zip(pieces, bounds, bounds[1:], strict=False)])


class start_sum_rows:
    """This rank's rows of the sum over the group, in flight; calling it waits.

    x: [total, ...] -> [rank's piece, ...]. In order, the ranks' terms are exchanged and added from the first rank to
    the last: the same bits every time, whatever algorithm the backend would choose; x may be wider than the result.
    """

    def __init__(self, x: Tensor, group: Group, *, ordered: bool) -> None:
        self._group, self._ordered = group, ordered
        self._pending: Pending | None = None
        self._x = x
        if group.size == 1:
            return
        total, size = x.shape[0], group.size
        bounds = even_bounds(total, size)
        self._own = bounds[group.rank + 1] - bounds[group.rank]
        if ordered:
            sizes = [b - a for a, b in itertools.pairwise(bounds)]
            x = x.contiguous()
            out = x.new_empty(self._own * size, *x.shape[1:])
            _enter("all_to_all", x, group)
            work = dist.all_to_all_single(
                out, x, [self._own] * size, sizes, group=group.handle, async_op=True
            )
            self._pending = Pending(out, work, group, x)
            return
        rows = -(-total // size)
        if total % size:
            padded = x.new_zeros(rows * size, *x.shape[1:])
            for r, (a, b) in enumerate(itertools.pairwise(bounds)):
                padded[r * rows : r * rows + b - a] = x[a:b]
            x = padded
        x = x.contiguous()
        out = x.new_empty(rows, *x.shape[1:])
        _enter("reduce_scatter", x, group)
        work = _reduce_scatter(out, x, group=group.handle, async_op=True)
        self._pending = Pending(out, work, group, x)

    def terms(self) -> Sequence[Tensor]:
        """The ranks' terms of this rank's rows, in the order of ranks (only in order)."""
        return [self._x] if self._pending is None else self._pending.wait().chunk(self._group.size)

    def __call__(self) -> Tensor:
        if self._pending is None:
            return self._x
        if not self._ordered:
            return self._pending.wait()[: self._own]
        return in_order(self.terms())


def in_order(terms: Sequence[Tensor]) -> Tensor:
    """The sum from the first to the last, in the accumulator's dtype, rounded once."""
    dtype = terms[0].dtype
    total = terms[0].to(accumulator(dtype))
    for term in terms[1:]:
        total = total + term
    return total.to(dtype)


def gather_terms(x: Tensor, group: Group) -> Sequence[Tensor]:
    """Every rank's x (of one shape), in the order of ranks."""
    if group.size == 1:
        return [x]
    x = x.contiguous()
    out = x.new_empty(group.size * x.shape[0], *x.shape[1:])
    _enter("all_gather", x, group)
    Pending(out, _all_gather(out, x, group=group.handle, async_op=True), group).wait()
    return out.chunk(group.size)


def start_exchange(x: Tensor, sent: Sequence[int], received: Sequence[int], group: Group) -> Pending:
    """Rows to and from every rank: the first sent[0] of x go to the first rank, and so on. [sum(received), ...]."""
    if group.size == 1:
        return Pending(x)
    x = x.contiguous()
    out = x.new_empty(sum(received), *x.shape[1:])
    _enter("all_to_all", x, group)
    work = dist.all_to_all_single(out, x, list(received), list(sent), group=group.handle, async_op=True)
    return Pending(out, work, group, x)


def start_send(x: Tensor, to: int, group: Group, tag: int = 0) -> Pending:
    """To the group's rank `to`. Tags tell messages apart on gloo; NCCL keeps their order."""
    x = x.contiguous()
    _enter("send", x, group)
    work = dist.isend(x, dst=group.ranks[to], group=group.handle, tag=tag)
    return Pending(x, work, group, x)


def start_receive(like: Tensor, source: int, group: Group, tag: int = 0) -> Pending:
    """From the group's rank `source`, into `like`."""
    _enter("receive", like, group)
    return Pending(like, dist.irecv(like, src=group.ranks[source], group=group.handle, tag=tag), group)


def pass_on(x: Tensor, like: Tensor, group: Group) -> tuple[Pending, Pending]:
    """Sends x to the next rank of the ring and receives `like` from the one before: (received, sent)."""
    following, before = (group.rank + 1) % group.size, (group.rank - 1) % group.size
    x = x.contiguous()
    _enter("pass_on", x, group)
    works = dist.batch_isend_irecv(
        [
            dist.P2POp(dist.isend, x, group.ranks[following], group.handle),
            dist.P2POp(dist.irecv, like, group.ranks[before], group.handle),
        ]
    )
    # NCCL gives one work for both.
    return Pending(like, works[-1], group), Pending(x, works[0] if len(works) > 1 else None, group, x)


def _enter(name: str, x: Tensor, group: Group) -> None:
    group.monitor.enter(name, group.name, group.ranks, x.numel() * x.element_size())
