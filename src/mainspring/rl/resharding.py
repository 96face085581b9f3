"""The weights of a trainer that is spread over ranks, brought into a whole engine's tensors, and their checksum.

    resharding = Resharding(units, engine_model)
    report = resharding.run()               # after each step, all ranks together

Tensors come one after the other, so that a rank holds its shards, the engine's model and one tensor more. What has
arrived is summed up on either side in 64-bit integers, whose sums have no order: equal checksums are equal bits.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from mainspring.engine.weights import weights_checksum
from mainspring.errors import LockstepError
from mainspring.model.decoder import Decoder
from mainspring.parallel import streaming
from mainspring.parallel.units import Units


@dataclass(frozen=True)
class ReshardingReport:
    """Of one `run`, on this rank."""

    seconds: float
    """Checksums included."""
    checksum: str
    """Of the trainer's weights and of the engine's."""
    model_bytes: int
    """The engine's weights."""
    peak_bytes: int | None
    """The engine's weights and the most that was allocated beside them meanwhile; None on the CPU, which does not say.
    It is what the ranks need above the trainer's own memory."""


class Resharding:
    """From `units` to `engine_model`, which has the same configuration and dtype."""

    def __init__(self, units: Units, engine_model: Decoder) -> None:
        self._units, self._model = units, engine_model
        self._bytes = sum(p.numel() * p.element_size() for p in engine_model.parameters())

    @torch.no_grad()
    def run(self) -> ReshardingReport:
        """A collective call. Raises LockstepError where a checksum differs: the engine's weights are not to be used."""
        device, began = self._model.device, time.monotonic()
        on_cuda = device.type == "cuda"
        if on_cuda:
            torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device) if on_cuda else 0
        views = self._model.hf_tensors()
        for name, tensor in streaming.stream_weights(self._units):
            views[name].copy_(tensor)
        mine, theirs = weights_checksum(self._model), streaming.weights_checksum(self._units)
        if mine != theirs:
            raise LockstepError(f"the engine's weights have the checksum {mine}, the trainer's {theirs}")
        peak = self._bytes + torch.cuda.max_memory_allocated(device) - before if on_cuda else None
        return ReshardingReport(time.monotonic() - began, mine, self._bytes, peak)
