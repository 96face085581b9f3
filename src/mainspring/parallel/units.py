"""A model's parameters as flat units, gathered before and reduced behind the layers as they compute.

One unit for each layer (and one for its experts, which fewer ranks share), for the embedding, the last norm and the
output embedding. While a layer computes, the next one's parameters are on their way (ZeRO-3), and the gradients of
the one before are being summed. The embedding, norm and output units are whole during a step and sharded between.
"""

from __future__ import annotations

import math
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mainspring.ops.euclidean_norms import euclidean_norms
from mainspring.ops.precision import accumulator
from mainspring.parallel.balance import blocks_by_layer
from mainspring.parallel.collectives import all_reduce
from mainspring.parallel.decoder import ParallelDecoder, Stream
from mainspring.parallel.flat import FlatUnit
from mainspring.parallel.mesh import Group
from mainspring.parallel.placement import Block, rule_of


@dataclass(frozen=True)
class Piece:
    """The part of a block that lies in the rank's shard: shard[begin:end] is the block's elements from `offset` on.

    weight: what its square counts in a sum over all ranks, so that each element counts once.
    """

    block: Block
    unit: FlatUnit
    begin: int
    end: int
    offset: int
    weight: float

    def of(self, shard: Tensor) -> Tensor:
        return shard[self.begin : self.end]


@dataclass(frozen=True)
class Span:
    """Pieces of one parameter that lie end to end in the rank's shard and weigh the same: shard[begin:end]."""

    unit: FlatUnit
    parameter: str
    begin: int
    end: int
    weight: float

    def of(self, shard: Tensor) -> Tensor:
        return shard[self.begin : self.end]


class Units:
    """All units of a rank's decoder, and their sums. The decoder's parameters become views of the units'.

    device: where parameters on the meta device come to life, as zeros.
    """

    def __init__(self, model: ParallelDecoder, device: torch.device | None = None) -> None:
        self._device = device if device is not None else model.device
        self.model, self.layout, self.mesh = model, model.layout, model.mesh
        self.units: list[FlatUnit] = []
        self._of_parameter: dict[str, FlatUnit] = {}
        self._of_layer: dict[int, list[FlatUnit]] = {}
        self._last: set[int] = set()
        self._reduced: set[str] = set()
        self._in_flight: list[FlatUnit] = []  # whose gradients are being summed
        self._build()
        for block in blocks_by_layer(model).values():
            if block.load.is_meta:
                block.load, block.dropped, block.choice_bias = (
                    torch.zeros_like(b, device=self._device)
                    for b in (block.load, block.dropped, block.choice_bias)
                )
        self.pieces = [piece for unit in self.units for piece in self._pieces(unit)]
        self.spans, self.span_of_piece = _joined(self.pieces)
        self._weights = torch.tensor(
            [span.weight for span in self.spans], dtype=torch.float64, device=self._device
        )
        self._names = {parameter: name for name, parameter in model.named_parameters()}
        # A tensor's hook is no part of what Python's collector can follow: it must not hold what holds the tensor.
        collect = weakref.WeakMethod(self._collect)
        for name, parameter in model.named_parameters():
            parameter.register_post_accumulate_grad_hook(partial(_call, collect, name))
        model.tp.weight_gradients.sink = self._add_product
        self._order = [int(number) for number in model.layers]
        model.observer = self

    # Around a step

    def begin_step(self, *, narrow: bool = False) -> None:
        """Makes whole what stays whole during a step. narrow: its gradients are summed in the model's dtype."""
        for unit in self.units:
            unit.gradient_dtype = unit.dtype if narrow else accumulator(unit.dtype)
        self._reduced.clear()
        self._last.clear()
        for unit in self._roots():
            unit.start_gather()
        for unit in self._roots():
            unit.gather()

    def expect_last(self, stage: int) -> None:
        """The next backward pass through this stage is the step's last: gradients may be summed behind it."""
        self._last.add(stage)

    @torch.no_grad()
    def finish_step(self) -> None:
        """Sums all gradients: `gradient(piece)` is then whole."""
        self._in_flight = []
        for unit in self.units:
            if unit.name not in self._reduced:
                unit.start_reduce(last=True)
        for unit in self.units:
            unit.finish_reduce()
            unit.release()
        self._sum_terms()

    def gradient(self, piece: Piece | Span) -> Tensor:
        """Its gradient, a view."""
        shard = piece.unit.gradient_shard
        assert shard is not None  # after finish_step
        return piece.of(shard)

    @torch.no_grad()
    def gradient_norm(self) -> float:
        """Of the whole model's gradient, each parameter once."""
        return math.sqrt(float(self.gradient_square()))

    @torch.no_grad()
    def gradient_square(self) -> Tensor:
        """The norm's square, a scalar of float64 on the device: whoever does not read it need not wait."""
        squares = euclidean_norms([self.gradient(span) for span in self.spans]).square_()
        return all_reduce(squares @ self._weights, self.mesh.group("world"))

    def scale_gradients(self, factor: float) -> None:
        for unit in self.units:
            if unit.gradient_shard is not None:
                unit.gradient_shard.mul_(factor)

    def clear(self) -> None:
        for unit in self.units:
            unit.clear()

    @torch.no_grad()
    def refresh(self) -> None:
        """After the shards have moved: brings the parameters up to date."""
        self.start_refresh()
        for unit in self.units:
            if unit.zero < 3:
                unit.gather()

    @torch.no_grad()
    def start_refresh(self) -> None:
        """As `refresh`, but each unit waits where it is used next: behind the layers of the next step's forward pass.

        Whoever reads parameters otherwise calls `gather_all` first.
        """
        for unit in self.units:
            unit.start_refresh()

    def gather_all(self) -> None:
        """Makes every parameter usable, for evaluation between steps; `release_all` undoes it."""
        for unit in self.units:
            unit.gather()

    def release_all(self) -> None:
        for unit in self.units:
            unit.release()

    # Construction

    def _build(self) -> None:
        groups: dict[str, dict[str, nn.Parameter]] = defaultdict(dict)
        for name, parameter in self.model.named_parameters():
            groups[_unit_name(name)][name] = parameter
        mesh, zero = self.mesh, self.layout.zero
        for name, parameters in groups.items():
            experts = name.endswith("experts")
            if zero == 0:
                shard, copies = Group.alone("shard"), mesh.group("expert_data" if experts else "data")
            else:
                shard = mesh.group("expert_shard" if experts else "shard")
                copies = mesh.group("replicate")
            unit = FlatUnit(name, parameters, shard, copies, zero, self._device)
            for key, parameter in unit.parameters.items():
                owner, _, attribute = key.rpartition(".")
                setattr(self.model.get_submodule(owner), attribute, parameter)
            self.units.append(unit)
            self._of_parameter.update(dict.fromkeys(parameters, unit))
            if name.startswith("layers."):
                self._of_layer.setdefault(int(name.split(".")[1]), []).append(unit)

    def _pieces(self, unit: FlatUnit) -> Iterator[Piece]:
        shapes, blocks = self.model.placement.shapes, self.model.placement.blocks
        tied = self.model.config.tie_word_embeddings and self.layout.pp > 1
        for name, (start, _) in unit.spans.items():
            for block in blocks[name]:
                first = start + block.offset(shapes[name]) - unit.begin
                begin, end = max(first, 0), min(first + math.prod(block.shape), unit.shard_size)
                if begin < end:
                    holders = block.copies * unit.copy_group.size * (2 if tied and name == "embedding" else 1)
                    yield Piece(block, unit, begin, end, begin - first, 1.0 / holders)

    def _roots(self) -> list[FlatUnit]:
        return [unit for unit in self.units if not unit.name.startswith("layers.")]

    # Around a layer (`decoder.Observer`)

    def before(self, number: int, stream: Stream) -> Stream:
        """Its parameters come, and the next layer's set out; behind its backward pass gradients are summed."""
        self._gather(number, +1)
        return _mark(lambda: self._reduce(number), stream)

    def after(self, number: int, stream: Stream) -> Stream:
        """Its parameters go, to come again, and those of the layer before it, for the backward pass."""
        for unit in self._of_layer[number]:
            unit.release()
        return _mark(lambda: self._gather(number, -1), stream)

    def _collect(self, name: str, parameter: Tensor) -> None:
        unit = self._of_parameter[name]
        unit.collect(name)
        # What only the loss uses is whole before the layers' backward pass begins: its sum has all of that to hide in.
        if unit.name in ("norm", "output_embedding") and self.layout.stages - 1 in self._last:
            unit.start_reduce(last=True)
            self._reduced.add(unit.name)

    def _add_product(self, parameter: nn.Parameter, grad: Tensor, x: Tensor) -> None:
        name = self._names[parameter]
        self._of_parameter[name].add_product(name, grad, x)

    def _gather(self, number: int, direction: int) -> None:
        for unit in self._of_layer[number]:
            unit.gather()
        coming = self._order.index(number) + direction
        if 0 <= coming < len(self._order):
            for unit in self._of_layer[self._order[coming]]:
                unit.start_gather()

    def _reduce(self, number: int) -> None:
        """Behind a layer's backward pass."""
        stage = next(s for s in self.model.stages if number in self.model.stage_layers[s])
        last = stage in self._last
        before, self._in_flight = self._in_flight, []
        for unit in self._of_layer[number]:
            unit.release()
            if self.model.tp.weight_gradients.deferring:
                continue
            unit.start_reduce(last=last)
            self._in_flight.append(unit)
            if last:
                self._reduced.add(unit.name)
        for unit in before:  # had a layer's time: its whole gradient is not to be held until the step ends
            unit.settle()

    # Sums of terms

    def _sum_terms(self) -> None:
        """Adds what ranks of other groups than the data's have: slices of tokens, shared key heads, tied embeddings."""
        terms: dict[str, list[Tensor]] = defaultdict(list)
        for piece in self.pieces:
            if piece.block.is_sum:
                assert piece.block.holders is not None  # a sum has them
                terms[piece.block.holders].append(self.gradient(piece))
        for holders in ("tp", "keys"):
            if terms[holders]:
                self._sum(terms[holders], self.mesh.group(holders))
        if self.model.config.tie_word_embeddings and "embedding" in self._of_parameter:
            shard = self._of_parameter["embedding"].gradient_shard
            assert shard is not None
            self._sum([shard], self.mesh.group("tied"))

    @staticmethod
    def _sum(tensors: list[Tensor], group: Group) -> None:
        if group.size == 1:
            return
        whole = all_reduce(torch.cat(tensors), group)
        for tensor, total in zip(tensors, whole.split([t.shape[0] for t in tensors]), strict=True):
            tensor.copy_(total)


def _call(method: weakref.WeakMethod[Any], name: str, parameter: Tensor) -> None:
    collect = method()
    if collect is not None:
        collect(name, parameter)


def _joined(pieces: list[Piece]) -> tuple[list[Span], list[int]]:
    """(the spans, each piece's number among them)."""
    spans: list[Span] = []
    numbers = []
    for piece in pieces:
        last = spans[-1] if spans else None
        own = Span(piece.unit, piece.block.parameter, piece.begin, piece.end, piece.weight)
        if last is not None and (last.unit, last.parameter, last.end, last.weight) == (
            own.unit, own.parameter, own.begin, own.weight,
        ):  # fmt: skip
            spans[-1] = replace(last, end=own.end)
        else:
            spans.append(own)
        numbers.append(len(spans) - 1)
    return spans, numbers


def _unit_name(parameter: str) -> str:
    if not parameter.startswith("layers."):
        return parameter.split(".")[0]
    layer = ".".join(parameter.split(".")[:2])
    return f"{layer}.experts" if rule_of(parameter).experts else layer


def _mark(action: Callable[[], None], stream: Stream) -> Stream:
    """The same stream; in the backward pass `action` runs once the gradients of its tensors are known."""
    update, residual = stream
    tensors = [t for t in stream if t is not None and t.requires_grad]
    if not torch.is_grad_enabled() or not tensors:
        return stream
    marked = iter(_Mark.apply(action, *tensors))
    if update is not None and update.requires_grad:
        update = next(marked)
    return update, next(marked) if residual.requires_grad else residual


class _Mark(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, action: Callable[[], None], *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.action = action
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        ctx.action()
        return None, *grads
