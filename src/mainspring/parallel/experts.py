"""Expert parallelism: each rank holds some experts, and tokens travel to theirs and back by all-to-all.

None is dropped (MegaBlocks, arXiv 2211.15841) unless a capacity is set (GShard, arXiv 2006.16668; `capacity.py`).
Under tensor parallelism the experts are cut like a dense MLP, and the ranks of a tensor-parallel group send the same
tokens, each with its slice of the experts. Balance: an auxiliary loss (Switch Transformers, arXiv 2101.03961,
equations 4 to 6) or a bias on the choice of experts that is moved by the load (Wang et al., arXiv 2408.15664).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mainspring import ops
from mainspring.model.layers import MixtureOfExperts
from mainspring.ops import Routing
from mainspring.ops.precision import accumulator
from mainspring.parallel.capacity import within_capacity
from mainspring.parallel.collectives import all_reduce, gather_rows, start_exchange
from mainspring.parallel.mesh import Group
from mainspring.parallel.recompute import forget, forgettable_swiglu
from mainspring.parallel.tensor import TensorParallel, start_sum


@dataclass
class Balance:
    """How experts are kept busy, and what they did. Shared by the blocks of a model.

    auxiliary: coefficient of the loss E · sum_e f_e P_e, where f_e is the share of a micro-batch's slots that went to
    expert e and P_e its mean probability (1 where all are equal). bias_rate: step of the bias on the choice.
    capacity: while training, an expert takes capacity / E of a micro-batch's slots and drops the rest; 0: takes all.
    """

    auxiliary: float = 0.0
    bias_rate: float = 0.0
    capacity: float = 0.0
    weight: float = 1.0
    """Of the micro-batch in flight: its tokens over the step's."""
    recording: bool = True
    """Not while a layer is computed again for its backward pass."""
    pieces: tuple[int, ...] = ()
    """Tokens of the rank's pieces of the stream that is going through the model now; the decoder sets it."""
    losses: list[Tensor] = field(default_factory=list)
    """Auxiliary losses of the forward pass in flight, times coefficient and weight, one a block."""

    def take(self) -> Tensor | None:
        """The sum of the forward pass's auxiliary losses, or None; it is to be added to the loss."""
        losses, self.losses = self.losses, []
        return torch.stack(losses).sum() if losses else None


class ParallelExperts(nn.Module):
    """The twin of `MixtureOfExperts` with the rank's experts (and its slice of each).

    x: [T, H], the rank's tokens (of its rows, if the sequence is sliced) -> the same shape.
    `load` counts the slots that this rank has given each expert, [E] float64, `dropped` [] those that were too many
    (`balance.take_loads` clears both); `choice_bias` [E] is added to the logits for the choice alone.
    """

    load: Tensor
    dropped: Tensor
    choice_bias: Tensor

    def __init__(
        self,
        block: MixtureOfExperts,
        tp: TensorParallel,
        experts: Group,
        context: Group,
        balance: Balance,
        *,
        recompute: bool = False,
    ) -> None:
        """recompute: do not keep the gated products."""
        super().__init__()
        self.recompute = recompute
        self.tp, self.experts, self.context, self.balance = tp, experts, context, balance
        self.num_experts, self.top_k, self.normalise = block.num_experts, block.top_k, block.normalise
        self.router, self.gate_up, self.down = block.router, block.gate_up, block.down
        device = block.gate_up.device
        self.register_buffer("load", torch.zeros(self.num_experts, dtype=torch.float64, device=device), False)
        self.register_buffer("dropped", torch.zeros((), dtype=torch.float64, device=device), False)
        self.register_buffer("choice_bias", torch.zeros(self.num_experts, device=device), False)

    def forward(self, x: Tensor) -> Tensor:
        tp, policy = self.tp, self.tp.policy
        whole: Tensor = _Enter.apply(x, tp) if tp.group.size > 1 else x
        routing = self._route(whole)
        rows = dispatch(whole, routing, self.experts, self._taken(routing))
        if rows.sorted.shape[0]:
            gate_up = ops.grouped_linear(rows.sorted, self.gate_up, rows.counts, policy=policy)
            swiglu = forgettable_swiglu if self.recompute else ops.swiglu
            inner = swiglu(gate_up, policy=policy)
            out = ops.grouped_linear(inner, self.down, rows.counts, policy=policy)
            if self.recompute:
                forget(inner, out)
        else:  # no token came; the way back must still be in the graph, for all ranks walk it together
            out = rows.sorted
        mixed = ops.combine(rows.bring_back(out), routing, policy=policy)
        if tp.group.size == 1:
            return mixed
        total: Tensor = _Leave.apply(mixed, tp)
        return total

    def _route(self, x: Tensor) -> Routing:
        logits = self.router(x)
        wide, policy = accumulator(x.dtype), self.tp.policy
        chosen_by = logits
        if self.balance.bias_rate:
            chosen_by = logits.detach().to(wide) + self.choice_bias.to(wide)
        routing = ops.route(
            chosen_by, self.top_k, normalise=self.normalise, weights_dtype=wide, policy=policy
        )
        if self.balance.bias_rate:  # the bias chooses, it does not weigh
            routing = dataclasses.replace(routing, weights=self._weights(logits, routing.experts))
        if self.training:
            counts = routing.offsets.diff().to(torch.float64)
            # What is computed again must keep the same tensors, and be counted once.
            loss = self._auxiliary_loss(logits, counts) if self.balance.auxiliary else None
            if self.balance.recording:
                self.load += counts
                self.balance.losses += [loss] if loss is not None else []
        return routing

    def _taken(self, routing: Routing) -> Tensor | None:
        """Which of the sorted rows the experts take, [R] bool; None: all."""
        if not self.balance.capacity or not self.training:
            return None
        taken = within_capacity(routing, self.balance.capacity, self.balance.pieces, self.context)
        if self.balance.recording:
            self.dropped += (~taken).sum()
        return taken

    def _weights(self, logits: Tensor, experts: Tensor) -> Tensor:
        wide = logits.to(accumulator(logits.dtype))
        if self.normalise:
            return torch.softmax(wide.gather(1, experts.long()), -1)
        return torch.softmax(wide, -1).gather(1, experts.long())

    def _auxiliary_loss(self, logits: Tensor, counts: Tensor) -> Tensor:
        """This rank's part: the sum over context and tensor ranks is the micro-batch's."""
        counts = all_reduce(counts.clone(), self.context)
        slots = counts.sum()
        share = (counts / slots).to(accumulator(logits.dtype))
        probabilities = torch.softmax(logits.to(share.dtype), -1).sum(0) / (slots / self.top_k).to(
            share.dtype
        )
        loss = self.num_experts * (share * probabilities).sum()
        return loss * (self.balance.auxiliary * self.balance.weight / self.tp.group.size)


@dataclass(frozen=True)
class Dispatched:
    """Rows at the ranks of their experts, sorted by expert, and the way back."""

    sorted: Tensor
    """[R, H]"""
    counts: list[int]
    """Rows of each expert of this rank."""
    order: Tensor | None
    sent: list[int]
    received: list[int]
    group: Group
    slots: Tensor | None
    """Of the rows that were sent their places among all, where some were dropped."""
    all_slots: int

    def bring_back(self, rows: Tensor) -> Tensor:
        """The experts' outputs at the ranks of their tokens, a row for each slot, zeros for what was dropped."""
        if self.order is not None:
            back = torch.empty_like(self.order)
            back[self.order] = torch.arange(self.order.shape[0], device=rows.device)
            rows = _AllToAll.apply(rows[back], self.received, self.sent, self.group)
        if self.slots is None:
            return rows
        return rows.new_zeros(self.all_slots, rows.shape[1]).index_copy(0, self.slots, rows)


def dispatch(x: Tensor, routing: Routing, group: Group, taken: Tensor | None = None) -> Dispatched:
    """Sends each of the T · k rows, or those that are taken, to the rank of its expert."""
    tokens, counts = routing.tokens.long(), routing.offsets.diff().long()
    slots, all_slots = None, tokens.shape[0]
    if taken is not None:
        slots = taken.nonzero()[:, 0]
        expert = torch.arange(counts.shape[0], device=x.device).repeat_interleave(
            counts, output_size=all_slots
        )
        counts = torch.zeros_like(counts).index_add_(0, expert[slots], torch.ones_like(slots))
        tokens = tokens[slots]
    rows = x[tokens]  # sorted by expert, hence by rank
    if group.size == 1:
        return Dispatched(rows, counts.tolist(), None, [], [], group, slots, all_slots)
    local = counts.shape[0] // group.size
    theirs = (
        start_exchange(counts, [local] * group.size, [local] * group.size, group)
        .wait()
        .view(group.size, local)
    )
    sent = counts.view(group.size, local).sum(1).tolist()
    received = theirs.sum(1).tolist()
    arrived: Tensor = _AllToAll.apply(rows, sent, received, group)
    # They come sorted by sender, then by expert; a stable sort by expert keeps the senders in the order of ranks.
    expert = torch.arange(local, device=x.device).repeat(group.size).repeat_interleave(theirs.flatten())
    order = expert.argsort(stable=True)
    return Dispatched(arrived[order], theirs.sum(0).tolist(), order, sent, received, group, slots, all_slots)


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, sent: list[int], received: list[int], group: Group) -> Tensor:
        ctx.sent, ctx.received, ctx.group = sent, received, group
        return start_exchange(x, sent, received, group).wait()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return start_exchange(grad, ctx.received, ctx.sent, ctx.group).wait(), None, None, None


class _Enter(torch.autograd.Function):
    """All tokens forward; backward the sum over the ranks, each of which has gradients of its slice of the experts."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, tp: TensorParallel) -> Tensor:
        ctx.tp = tp
        return gather_rows(x, tp.tokens, tp.group) if tp.sliced else x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return start_sum(grad, ctx.tp)(), None


class _Leave(torch.autograd.Function):
    """The sum over the ranks' slices of the experts; its gradient reaches all of them whole."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, tp: TensorParallel) -> Tensor:
        ctx.tp, ctx.tokens = tp, tp.tokens
        return start_sum(x, tp)()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        tp: TensorParallel = ctx.tp
        return gather_rows(grad, ctx.tokens, tp.group) if tp.sliced else grad, None
