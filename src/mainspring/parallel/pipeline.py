"""Runs a step's micro-batches through a rank's stages by its list of actions: F, B, F, B where there is no pipeline.

Messages between two ranks go over a group of their own for each direction, in the order in which they are sent: so
no send can wait for a receive that waits for it.

On a GPU a message's kernel runs until its other end has come, and CUDA may wait for all that runs before it loads a
kernel that it has not yet. Two ranks that load one, each beside a message from the other, would wait for ever. So what
a step computes is rehearsed without messages, on each rank alone, once for each shape of micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mainspring.ops import IGNORE_INDEX, TokenBatch
from mainspring.ops.precision import accumulator
from mainspring.parallel.balance import blocks_by_layer
from mainspring.parallel.collectives import Pending, all_reduce, start_receive, start_send
from mainspring.parallel.decoder import ParallelDecoder
from mainspring.parallel.mesh import Group
from mainspring.parallel.schedule import Action, Kind, Schedule, make_schedule
from mainspring.parallel.tensor import Product, whole_stream
from mainspring.parallel.units import Units

_IN_ORDER: tuple[Kind, ...] = ("F", "B", "I", "W")


class PackedTokens(Protocol):
    """Documents end to end: tokens and targets [T] int64 (IGNORE_INDEX is left out), and the documents' lengths."""

    @property
    def tokens(self) -> NDArray[np.int64]: ...
    @property
    def targets(self) -> NDArray[np.int64]: ...
    @property
    def lengths(self) -> tuple[int, ...]: ...


@dataclass(frozen=True)
class _Message:
    """The output of a stage's forward pass, or the gradient of its input, for the neighbouring stage."""

    stage: int  # of the sender
    micro: int
    forward: bool


@dataclass
class _InFlight:
    """A micro-batch between its forward and its backward pass through a stage."""

    entered: Tensor
    outputs: list[Tensor]
    weights_later: list[Product] | None = None


class Pipeline:
    """A rank's executor."""

    def __init__(self, model: ParallelDecoder, units: Units, *, rehearses: bool | None = None) -> None:
        """rehearses: runs each shape of micro-batch once without messages before it travels; None: on a GPU."""
        self.model, self.units = model, units
        self.layout, self.mesh = model.layout, model.mesh
        self._stages = self.layout.stages
        needed = model.device.type == "cuda" if rehearses is None else rehearses
        self._rehearses = needed and self.layout.pp > 1
        self._rehearsed: set[tuple[int | Kind, ...]] = set()

    def run(self, micro_batches: Sequence[PackedTokens]) -> float:
        """Forward and backward over the step's micro-batches, of which the rank takes its replica's.

        Gradients are left in the units, summed over all ranks (`Units.gradient`). Returns the mean loss over all
        targets of the step, auxiliary losses left out. Every rank is given the same micro-batches.
        """
        return float(self.start(micro_batches))

    def start(self, micro_batches: Sequence[PackedTokens]) -> Tensor:
        """As `run`, with the loss left on the device, a scalar of float64: reading it waits for the whole step."""
        self.layout.check(self.model.config, len(micro_batches))
        count = max(1, sum(int((m.targets != IGNORE_INDEX).sum()) for m in micro_batches))
        group = self.mesh.group("dp")
        mine = list(micro_batches[group.rank :: group.size])
        schedule = make_schedule(self.layout.schedule, self.layout.pp, self.layout.virtual, len(mine))
        narrow = self.layout.gradient_sums == "narrow" and len(mine) == 1
        self._rehearse(micro_batches, schedule, narrow)
        run = _Run(self, mine, count, sum(len(m.tokens) for m in micro_batches), schedule)
        self.units.begin_step(narrow=narrow)
        run.do_all()
        self.units.finish_step()
        # Tensor-parallel ranks have the same loss; only the last stage has one.
        mine_total = torch.zeros((), dtype=torch.float64, device=self.model.device)
        for loss in run.losses.values():
            mine_total += loss / self.layout.tp
        return all_reduce(mine_total, self.mesh.group("world")) / count

    @torch.no_grad()
    def evaluate(self, micro_batches: Sequence[PackedTokens]) -> list[float]:
        """The sum of -log p over each micro-batch's targets, in nats; forward passes only, the same on every rank."""
        self.layout.check(self.model.config, len(micro_batches))
        group = self.mesh.group("dp")
        mine = list(micro_batches[group.rank :: group.size])
        run = self._forward_only(mine, micro_batches)
        sums = torch.zeros(len(micro_batches), dtype=torch.float64, device=self.model.device)
        for micro, loss in run.losses.items():
            sums[micro * group.size + group.rank] = loss / self.layout.tp
        return [float(value) for value in all_reduce(sums, self.mesh.group("world"))]

    @torch.no_grad()
    def next_logits(self, batch: PackedTokens) -> Tensor:
        """The logits after each document's last token, [documents, vocab], the same on every rank.

        All replicas compute the same batch. Every rank of the stream has at least one of its tokens.
        """
        model = self.model
        last = torch.tensor(batch.lengths, device=model.device).cumsum(0) - 1
        shape = (len(batch.lengths), model.config.vocab_size)
        found = torch.zeros(shape, dtype=accumulator(model.dtype), device=model.device)

        def take(output: Tensor, stream: TokenBatch) -> None:
            tokens = torch.arange(len(batch.tokens), device=model.device)
            own = model.own(tokens, stream)
            row = torch.full_like(tokens, -1)
            row[own] = torch.arange(len(own), device=model.device)
            here = row[last] >= 0
            logits = model.logits(whole_stream(output, model.tp)[row[last][here]])
            if self.mesh.index["tp"] == 0 and self.mesh.group("dp").rank == 0:
                found[here] = logits

        self._forward_only([batch], [batch], take)
        return all_reduce(found, self.mesh.group("world"))  # one rank has each row, the others zeros

    def _forward_only(
        self,
        mine: list[PackedTokens],
        of_all: Sequence[PackedTokens],
        take: Callable[[Tensor, TokenBatch], None] | None = None,
    ) -> _Run:
        """The forward passes of this replica's micro-batches, in evaluation mode. of_all: all replicas'."""
        forward = make_schedule("afab", self.layout.stages, 1, len(mine))
        # A chunk's micro-batches, then the next chunk's: the order in which they become ready.
        schedule = [
            [a for stage in self.layout.stages_of(rank) for a in forward[stage] if a.kind == "F"]
            for rank in range(self.layout.pp)
        ]
        was_training = self.model.training
        self.model.eval()
        self._rehearse(of_all, schedule)
        run = _Run(self, mine, 1, max(1, sum(len(m.tokens) for m in of_all)), schedule, take)
        self.units.begin_step()
        run.do_all()
        self.units.release_all()
        self.model.train(was_training)
        return run

    def _rehearse(
        self, micro_batches: Sequence[PackedTokens], schedule: Schedule, narrow: bool = False
    ) -> None:
        """Loads the kernels of a schedule's actions. micro_batches: all replicas', for they rehearse the same ones, as
        they share parameters and experts."""
        kinds = {action.kind for actions in schedule for action in actions}
        passes = tuple(kind for kind in _IN_ORDER if kind in kinds)
        for micro in micro_batches if self._rehearses else ():
            shape = (*_shape(micro.lengths), narrow, *passes)
            if shape not in self._rehearsed:
                self._rehearsed.add(shape)
                self._run_alone(micro, passes, narrow)

    def _run_alone(self, micro: PackedTokens, passes: tuple[Kind, ...], narrow: bool) -> None:
        """Twice: a step's first gradients are written, the others added. Nothing is left of it."""
        blocks = blocks_by_layer(self.model).values()
        counts = [(block.load.clone(), block.dropped.clone()) for block in blocks]
        stages = self.layout.stages_of(self.mesh.index["pp"])
        actions = [
            Action(kind, stage, number)
            for number in range(2)
            for kind in passes
            for stage in (stages if kind == "F" else reversed(stages))
        ]
        schedule = [actions if rank == self.mesh.index["pp"] else [] for rank in range(self.layout.pp)]
        self.units.begin_step(narrow=narrow)
        _Rehearsal(self, [micro, micro], 1, 2 * len(micro.tokens), schedule).do_all()
        if torch.is_grad_enabled():
            self.units.finish_step()
            self.units.clear()
        else:
            self.units.release_all()
        for block, (load, dropped) in zip(blocks, counts, strict=True):
            block.load.copy_(load)
            block.dropped.copy_(dropped)


def _shape(lengths: Sequence[int]) -> tuple[int, ...]:
    """What kernels are chosen and compiled by: tokens, whether there is one document and whether 16 or more go evenly
    (Triton compiles such numbers anew), and the longest one's length, roughly."""
    count = len(lengths)
    return sum(lengths), int(count == 1), int(count % 16 == 0), max(lengths, default=0).bit_length()


class _Run:
    """One step."""

    def __init__(
        self,
        pipeline: Pipeline,
        micro_batches: list[PackedTokens],
        count: int,
        tokens: int,
        schedule: list[list[Action]],
        take: Callable[[Tensor, TokenBatch], None] | None = None,
    ) -> None:
        """take: is given the last stage's output, of which there is then no loss."""
        self.model, self.units, self.mesh = pipeline.model, pipeline.units, pipeline.mesh
        self.stages, self.ranks = pipeline.layout.stages, pipeline.layout.pp
        self.device = self.model.device
        self.micro_batches, self.count, self.tokens = micro_batches, count, tokens
        self.rank = self.mesh.index["pp"]
        self.losses: dict[int, Tensor] = {}
        self._take = take
        self._flight: dict[tuple[int, int], _InFlight] = {}
        self._sending: list[Pending] = []
        self._arriving: dict[_Message, Pending] = {}
        self._local: dict[_Message, Tensor] = {}
        # What each neighbour will send here, in its order.
        self._expected = {
            source: [
                message for action in actions for message, to in self._messages(action) if to == self.rank
            ]
            for source, actions in enumerate(schedule)
            if source != self.rank
        }
        self._actions = schedule[self.rank]
        self._last = {a.stage: a for a in self._actions if a.kind in ("B", "I")}
        # All at once, before the first kernel: a copy in between would make the host wait for those in flight.
        shapes = dict.fromkeys(m.lengths for m in micro_batches)
        self._batches = {lengths: self.model.batch(lengths) for lengths in shapes}
        holds = {a.stage for a in self._actions}
        self._tokens = self._uploaded([m.tokens for m in micro_batches]) if 0 in holds else []
        self._targets = self._uploaded([m.targets for m in micro_batches]) if self.stages - 1 in holds else []

    def do_all(self) -> None:
        """The rank's actions, in order.

        What an action needs from another rank is received beside the action before it, so that it need not be waited
        for. Not earlier: on a GPU whichever end of a message comes first waits there, on multiprocessors of its own.
        """
        for action, following in zip(self._actions, [*self._actions[1:], None], strict=True):
            self._expect(action)
            if following is not None:
                self._expect(following)
            self._do(action)
        for pending in self._sending:
            pending.wait()

    def _do(self, action: Action) -> None:
        self.mesh.monitor.progress()
        if self._last.get(action.stage) == action:
            self.units.expect_last(action.stage)
        if action.kind == "F":
            self._forward(action)
        elif action.kind == "W":
            flight = self._flight.pop((action.stage, action.micro))
            assert flight.weights_later is not None  # I comes before W
            self.model.tp.weight_gradients.run(flight.weights_later)
        else:
            self._backward(action)

    def _forward(self, action: Action) -> None:
        stage, micro = action.stage, action.micro
        batch = self._batch(micro)
        packed = self.micro_batches[micro]
        x = self._receive(action).requires_grad_() if stage else self.model.own(self._tokens[micro], batch)
        balance = self.model.balance
        balance.weight = len(packed.tokens) / self.tokens
        out = self.model.run_stage(stage, x, batch)
        outputs = [out]
        if stage == self.stages - 1 and self._take is not None:
            self._take(out, batch)
        elif stage == self.stages - 1:
            targets = self.model.own(self._targets[micro], batch)
            loss = self.model.loss_sum(out, batch, targets)
            self.losses[micro] = loss.detach().to(torch.float64)
            outputs = [loss / self.count]
        else:
            self._send(_Message(stage, micro, True), out.detach())
        auxiliary = balance.take()
        if auxiliary is not None:
            outputs.append(auxiliary)
        if torch.is_grad_enabled():
            self._flight[stage, micro] = _InFlight(x, outputs)

    def _backward(self, action: Action) -> None:
        stage, micro = action.stage, action.micro
        flight = self._flight[stage, micro]
        grads: list[Tensor | None] = [None] * len(flight.outputs)
        if stage < self.stages - 1:
            grads[0] = self._receive(action)
        gradients = self.model.tp.weight_gradients
        gradients.deferring = action.kind == "I"
        torch.autograd.backward(flight.outputs, grads)
        gradients.deferring = False
        if stage > 0:
            gradient = flight.entered.grad
            assert gradient is not None  # every stage's output depends on its input
            self._send(_Message(stage, micro, False), gradient)
        if action.kind == "I":
            self._flight[stage, micro] = _InFlight(flight.entered, [], gradients.take())
        else:
            del self._flight[stage, micro]

    def _batch(self, micro: int) -> TokenBatch:
        return self._batches[self.micro_batches[micro].lengths]

    def _uploaded(self, arrays: list[NDArray[np.int64]]) -> Sequence[Tensor]:
        if not arrays:
            return []
        whole = torch.from_numpy(np.concatenate(arrays)).to(self.device)
        return torch.split(whole, [len(array) for array in arrays])

    def _messages(self, action: Action) -> list[tuple[_Message, int]]:
        """What an action sends, and to which pipeline rank."""
        if action.kind == "F" and action.stage < self.stages - 1:
            return [(_Message(action.stage, action.micro, True), (action.stage + 1) % self.ranks)]
        if action.kind in ("B", "I") and action.stage > 0:
            return [(_Message(action.stage, action.micro, False), (action.stage - 1) % self.ranks)]
        return []

    def _edge(self, message: _Message) -> Group:
        to = (message.stage + (1 if message.forward else -1)) % self.ranks
        return self.mesh.edge(message.stage % self.ranks, to)

    def _send(self, message: _Message, x: Tensor) -> None:
        group = self._edge(message)
        if group.size == 1:
            self._local[message] = x
            return
        self._sending.append(start_send(x, 1, group))

    def _expect(self, action: Action) -> None:
        """Begins to receive what the action needs from another rank, and all that comes before it."""
        message = self._needed(action)
        if message is None or self._edge(message).size == 1:
            return
        group, waiting = self._edge(message), self._expected[message.stage % self.ranks]
        while message in waiting:
            coming = waiting.pop(0)
            rows = self.model.stage_rows(self._batch(coming.micro))
            like = torch.empty(
                rows, self.model.config.hidden_size, dtype=self.model.dtype, device=self.device
            )
            self._arriving[coming] = start_receive(like, 0, group)

    def _needed(self, action: Action) -> _Message | None:
        stage, micro = action.stage, action.micro
        if action.kind == "F":
            return _Message(stage - 1, micro, True) if stage else None
        if action.kind == "W" or stage == self.stages - 1:
            return None
        return _Message(stage + 1, micro, False)

    def _receive(self, action: Action) -> Tensor:
        message = self._needed(action)
        assert message is not None  # asked of actions that need one
        if self._edge(message).size == 1:
            return self._local.pop(message)
        return self._arriving.pop(message).wait()


class _Rehearsal(_Run):
    """Micro-batches through this rank's stages alone: what others would send is noise, what they are sent is lost."""

    def _send(self, message: _Message, x: Tensor) -> None:
        pass

    def _expect(self, action: Action) -> None:
        pass

    def _receive(self, action: Action) -> Tensor:
        rows = self.model.stage_rows(self._batch(action.micro))
        # Of a generator of its own: the trainer's random numbers stay as they are.
        generator = torch.Generator(self.device).manual_seed(0)
        shape = rows, self.model.config.hidden_size
        return torch.randn(shape, generator=generator, dtype=self.model.dtype, device=self.device)
