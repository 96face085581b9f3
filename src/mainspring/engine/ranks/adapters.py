"""LoRA adapters over the ranks of a layout: each rank has its part of them, cut as the weights beside them are.

Of a layer whose rows are cut, B is; of one whose columns are cut, A is, and the ranks' low-rank terms are summed before
B. Under tensor parallelism that sum is rounded as the adapter's dtype, so `tp_invariant` promises no bits of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mainspring.engine.lora import AdapterLayer, BatchAdapters, LoraAdapters
from mainspring.model.decoder import Decoder
from mainspring.parallel.decoder import ParallelDecoder
from mainspring.parallel.placement import Block, rule_of
from mainspring.parallel.tensor import TensorParallel, start_sum


class ShardAdapters:
    """Implements `hooks.Adapters` with the rank's part of the adapters, whose ids count from 1 in order of loading."""

    def __init__(self, model: ParallelDecoder, adapters: Mapping[str, str | Path]) -> None:
        """Raises what `LoraAdapters` raises."""
        whole = Decoder(model.config, policy=model.policy, device="meta", dtype=model.dtype)
        self._whole = LoraAdapters(whole, adapters, device=torch.device("cpu"))
        starts = {part.name: part.start for part in whole.parts()}
        layers: dict[str, AdapterLayer] = {}
        summed: set[str] = set()
        for name, layer in self._whole.layers.items():
            blocks = model.placement.blocks.get(f"{name}.weight")
            if blocks is None:
                continue  # another stage's
            if rule_of(f"{name}.weight").cut == "columns":
                first, width = blocks[0].start[1], blocks[0].shape[1]
                a, b = layer.a[:, :, first : first + width], layer.b
                summed.add(name)
            else:
                a, b = layer.a, _rows(layer.b, blocks, starts)
            layers[name] = AdapterLayer(a.contiguous().to(model.device), b.to(model.device))
        self._layers, self._summed, self._tp = layers, frozenset(summed), model.tp

    def of_batch(self, lora_ids: Tensor) -> ShardBatchAdapters:
        """See `hooks.Adapters.of_batch`."""
        batch = self._whole.of_batch(lora_ids)
        return ShardBatchAdapters(
            self._layers, batch.routing, batch.places, batch.has_adapter, batch.policy,
            lora_ids, self._summed, self._tp,
        )  # fmt: skip


@dataclass(frozen=True)
class ShardBatchAdapters(BatchAdapters):
    """lora_ids: [T] int64. summed: the layers whose low-rank products are terms of a sum over the ranks."""

    lora_ids: Tensor
    summed: frozenset[str]
    tp: TensorParallel

    def low(self, name: str, layer: AdapterLayer, x: Tensor) -> Tensor:
        """See `BatchAdapters.low`."""
        term = super().low(name, layer, x)
        return start_sum(term, self.tp)() if name in self.summed and self.tp.group.size > 1 else term


def _rows(b: Tensor, blocks: list[Block], starts: Mapping[str, int]) -> Tensor:
    """The rank's rows of b [E, out, R], in the order of its fused weight."""
    rows = sum(block.shape[0] for block in blocks)
    local = b.new_empty(b.shape[0], rows, b.shape[2])
    for block in blocks:
        first = starts[block.name] + block.start[0]
        local[:, block.row : block.row + block.shape[0]] = b[:, first : first + block.shape[0]]
    return local
