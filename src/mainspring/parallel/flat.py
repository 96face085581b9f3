"""ZeRO's unit: parameters end to end in one flat buffer, of which each rank of a group owns an equal shard.

Rajbhandari et al., arXiv 1910.02054. Parameters are views of the buffer `full`. With ZeRO-3 its storage is empty
except while the unit computes; the views stay what they are, as autograd's saved tensors need. Gradients are summed
in fp32 (fp64 for fp64), over micro-batches and over ranks, unless `gradient_dtype` says otherwise.

    zero   full (parameters)     gradient (sum over micro-batches)      optimizer's state
    0      all                   all, summed over ranks at the end      all
    1      all                   all, reduce-scattered behind the last  the shard's
    2      all                   the shard, after each backward pass    the shard's
    3      the shard             the shard, after each backward pass    the shard's
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mainspring.ops.accumulated_product import accumulate_product
from mainspring.ops.precision import accumulator
from mainspring.parallel.collectives import (
    Pending,
    all_reduce,
    start_all_reduce,
    start_gather_flat,
    start_reduce_scatter_flat,
)
from mainspring.parallel.mesh import Group

_ALIGNMENT = 8
"""Elements: parameters and shards begin at multiples, of 16 bytes or more, as the optimizer's vector loads ask."""


class FlatUnit:
    """shard_group: the ranks that shard it; copy_group: those that hold the same shard and whose gradients are summed.

    spans: begin and end of each parameter in `full`. shard: the rank's part of `full`. gradient_shard: of the sum.
    `parameters` are new ones, views of `full`; those given may be on the meta device, and `full` then holds zeros.
    """

    def __init__(
        self,
        name: str,
        parameters: Mapping[str, nn.Parameter],
        shard_group: Group,
        copy_group: Group,
        zero: int,
        device: torch.device,
    ) -> None:
        self.name, self.zero = name, zero
        self.shard_group, self.copy_group = shard_group, copy_group
        self.dtype, self.device = next(iter(parameters.values())).dtype, device
        self.spans: dict[str, tuple[int, int]] = {}
        end = 0
        for key, parameter in parameters.items():
            begin = _aligned(end)
            end = begin + parameter.numel()
            self.spans[key] = (begin, end)
        size = shard_group.size
        self.shard_size = _aligned(-(-end // size))
        self.begin = self.shard_size * shard_group.rank  # of the shard in full
        self.full = torch.zeros(self.shard_size * size, dtype=self.dtype, device=self.device)
        self.parameters: dict[str, nn.Parameter] = {}
        for key, parameter in parameters.items():
            a, b = self.spans[key]
            view = self.full[a:b].view(parameter.shape)
            if not parameter.is_meta:
                view.copy_(parameter.detach())
            # `data` has a version counter of its own: gathering into `full` is no change of the parameter to autograd.
            self.parameters[key] = nn.Parameter(torch.empty(0, dtype=self.dtype, device=device))
            self.parameters[key].data = view
        self.shard = self.full[self.begin : self.begin + self.shard_size]
        self._bytes = self.full.untyped_storage().nbytes()
        self._is_whole = True
        self._gathering: Pending | None = None
        self.gradient_dtype = accumulator(self.dtype)
        """Of the gradients that are collected next."""
        self._gradient: Tensor | None = None  # of the whole unit
        self._unwritten: set[str] = set()  # parameters whose part of it still has no values
        self._reducing: Pending | None = None
        self.gradient_shard: Tensor | None = None
        if zero == 3:
            self.shard = self.shard.clone()
            self.release()

    # Parameters

    def start_gather(self) -> None:
        """Begins to fetch the other ranks' shards, if they are not here."""
        if self._is_whole or self._gathering is not None:
            return
        self.full.untyped_storage().resize_(self._bytes)
        self._gathering = start_gather_flat(self.full, self.shard, self.shard_group)

    def gather(self) -> None:
        """Makes the parameters usable."""
        self.start_gather()
        if self._gathering is not None:
            self._gathering.wait()
            self._gathering, self._is_whole = None, True

    def release(self) -> None:
        """Frees what other ranks own (ZeRO-3), also what is still on its way: it will be old when it is needed."""
        if self._gathering is not None:
            self.gather()
        if self.zero == 3 and self._is_whole:
            self.full.untyped_storage().resize_(0)
            self._is_whole = False

    def start_refresh(self) -> None:
        """After the optimizer has moved the shards: begins to bring the other ranks' into `full`; `gather` waits."""
        if self.zero == 3 or self.shard_group.size == 1:
            return
        # NCCL gathers in place; gloo must not read what it writes.
        piece = self.shard if self.shard.is_cuda else self.shard.clone()
        self._gathering, self._is_whole = start_gather_flat(self.full, piece, self.shard_group), False

    # Gradients

    @torch.no_grad()
    def collect(self, name: str) -> None:
        """Takes a parameter's gradient over and adds it to the unit's."""
        parameter = self.parameters[name]
        gradient, parameter.grad = parameter.grad, None
        if gradient is None:
            return
        held, has_values = self._held(name)
        if has_values:
            held.add_(gradient)
        else:
            held.copy_(gradient)

    def add_product(self, name: str, grad: Tensor, x: Tensor) -> None:
        """Adds gradᵀ x to a matrix's gradient. grad: [T, out], x: [T, in]."""
        held, has_values = self._held(name)
        accumulate_product(held, grad.t(), x, add=has_values)

    def start_reduce(self, *, last: bool) -> None:
        """Begins to sum the gradient over ranks: after each backward pass with ZeRO-2 and 3, else after the last."""
        if self.zero < 2 and not last:
            return
        self.settle()
        whole = self._whole_gradient()
        self._fill_unwritten(whole)
        if self.shard_group.size > 1:
            self._reducing = start_reduce_scatter_flat(whole, self.shard_group)
            self._gradient = None  # the collective keeps it as long as it needs it
        elif self.zero >= 2:
            self._reducing, self._gradient = Pending(whole), None
        else:
            self._reducing = start_all_reduce(whole, self.copy_group)

    def finish_reduce(self) -> Tensor:
        """The rank's shard of the sum over ranks and micro-batches; call it once, after the last `start_reduce`."""
        self.settle()
        if self.gradient_shard is None:
            self.gradient_shard = self._empty(self.shard_size).zero_()
        if self.shard_group.size > 1 or self.zero >= 2:
            all_reduce(self.gradient_shard, self.copy_group)
        return self.gradient_shard

    def clear(self) -> None:
        """Forgets the gradients."""
        self._gradient = self._reducing = self.gradient_shard = None

    def settle(self) -> None:
        """Waits for the sum that is on its way, and lets go of what it was made of."""
        if self._reducing is None:
            return
        piece, self._reducing = self._reducing.wait(), None
        self.gradient_shard = piece if self.gradient_shard is None else self.gradient_shard.add_(piece)

    def _held(self, name: str) -> tuple[Tensor, bool]:
        """A parameter's part of the whole gradient, for its next term, and whether there has been one."""
        a, b = self.spans[name]
        held = self._whole_gradient()[a:b].view(self.parameters[name].shape)
        has_values = name not in self._unwritten
        self._unwritten.discard(name)
        return held, has_values

    def _whole_gradient(self) -> Tensor:
        """Without values where `_unwritten` says so: filling it first would be a pass over memory more."""
        if self._gradient is None:
            self._gradient = self._empty(self.full.shape[0])
            self._unwritten = set(self.spans)
            end = 0
            for a, b in (*self.spans.values(), (self.full.shape[0],) * 2):
                self._gradient[end:a].zero_()  # what lies between parameters and behind the last
                end = b
        return self._gradient

    def _fill_unwritten(self, whole: Tensor) -> None:
        for name in self._unwritten:
            a, b = self.spans[name]
            whole[a:b].zero_()
        self._unwritten = set()

    def _empty(self, size: int) -> Tensor:
        return torch.empty(size, dtype=self.gradient_dtype, device=self.device)


def _aligned(elements: int) -> int:
    return -(-elements // _ALIGNMENT) * _ALIGNMENT
