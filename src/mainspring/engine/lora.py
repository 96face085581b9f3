"""LoRA adapters of a model, several in one batch: each token's low-rank products by its own adapter.

The adapters of a layer are stacked, and a batch's tokens sorted by adapter, so that two grouped products serve them
all; a token's bits depend on its own adapter alone. Adapter 0 is none: its tokens keep what the layer gave them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mainspring import ops
from mainspring.errors import CheckpointError, ConfigError
from mainspring.formats.lora_adapter import LoraModule, read_lora_adapter
from mainspring.formats.tensor_spec import TensorEntry
from mainspring.model.checkpoint import stored_tensor
from mainspring.model.decoder import Decoder
from mainspring.model.naming import Part
from mainspring.ops import Policy, Routing

_RANK_STEP = (
    16  # ranks are padded with zeros to a multiple: rows of 32 bytes, as matrix instructions like them
)


@dataclass(frozen=True)
class AdapterLayer:
    """The adapters of one linear layer, adapter 0 all zeros. a: [E, R, in]; b: [E, out, R], scaled."""

    a: Tensor
    b: Tensor


class LoraAdapters:
    """Implements `hooks.Adapters` for the adapters of one model, whose ids count from 1 in order of loading."""

    def __init__(
        self, model: Decoder, adapters: Mapping[str, str | Path], *, device: torch.device | None = None
    ) -> None:
        """Loads the adapters: name -> directory. device: None for the model's.

        Raises:
            ConfigError: a name is empty.
            CheckpointError: an adapter cannot be read, or does not fit the model.
        """
        self.ids: dict[str, int] = {name: number for number, name in enumerate(adapters, start=1)}
        if "" in self.ids:
            raise ConfigError("an adapter has an empty name; give it another")
        self._policy = model.policy
        parts = {part.name.removesuffix(".weight"): part for part in model.parts()}
        parameters = dict(model.named_parameters())
        loaded: list[dict[str, list[tuple[Part, LoraModule]]]] = []
        for name, directory in adapters.items():
            by_layer: dict[str, list[tuple[Part, LoraModule]]] = {}
            for module, lora in read_lora_adapter(directory).items():
                part = _checked_part(name, module, lora, parts, parameters)
                by_layer.setdefault(part.parameter.removesuffix(".weight"), []).append((part, lora))
            loaded.append(by_layer)
        layers = dict.fromkeys(layer for by_layer in loaded for layer in by_layer)
        self.layers = {
            layer: _stack(
                [by_layer.get(layer, []) for by_layer in loaded],
                parameters[f"{layer}.weight"],
                model.device if device is None else device,
            )
            for layer in layers
        }

    def of_batch(self, lora_ids: Tensor) -> BatchAdapters:
        """See `hooks.Adapters.of_batch`."""
        count = len(self.ids) + 1
        order = lora_ids.argsort(stable=True)
        bounds = torch.arange(count + 1, device=lora_ids.device)
        offsets = torch.searchsorted(lora_ids[order], bounds)
        places = torch.empty_like(order)
        places[order] = torch.arange(len(order), device=order.device)
        routing = Routing(
            weights=torch.ones((len(order), 1), device=order.device),
            experts=lora_ids[:, None].to(torch.int32),
            order=order.to(torch.int32),
            places=places[:, None].to(torch.int32),
            offsets=offsets.to(torch.int32),
        )
        return BatchAdapters(self.layers, routing, places, lora_ids[:, None] > 0, self._policy)


@dataclass(frozen=True)
class BatchAdapters:
    """Implements `ops.batch.LinearAdapters` for the tokens of one batch."""

    layers: Mapping[str, AdapterLayer]
    routing: Routing
    places: Tensor
    has_adapter: Tensor
    policy: Policy

    def add(self, name: str, x: Tensor, y: Tensor) -> Tensor:
        """See `ops.batch.LinearAdapters.add`."""
        layer = self.layers.get(name)
        if layer is None:
            return y
        offsets = self.routing.offsets
        low = self.low(name, layer, x)
        delta = ops.grouped_linear(low, layer.b, offsets, policy=self.policy).index_select(0, self.places)
        return torch.where(self.has_adapter, y + delta, y)

    def low(self, name: str, layer: AdapterLayer, x: Tensor) -> Tensor:
        """x Aᵀ of each token's adapter, sorted by adapter: [T, R]."""
        return ops.grouped_linear(x, layer.a, self.routing.offsets, gather=self.routing, policy=self.policy)


def _checked_part(
    adapter: str, module: str, lora: LoraModule, parts: Mapping[str, Part], parameters: Mapping[str, Tensor]
) -> Part:
    part = parts.get(module)
    is_linear = part is not None and part.expert is None and part.parameter.endswith(".weight")
    if part is None or not is_linear or ".router." in part.parameter:
        linear = sorted({name.rpartition(".")[2] for name in parts if name.endswith("_proj")})
        raise CheckpointError(
            f"the adapter {adapter!r} targets {module!r}, which is no layer of this model that takes adapters; "
            f"those are: {', '.join(linear)} of the dense layers"
        )
    view = part.view(parameters[part.parameter])
    shape = (lora.b.shape[0], lora.a.shape[1])
    if view.dim() != 2 or tuple(view.shape) != shape:
        raise CheckpointError(
            f"the adapter {adapter!r} was made for another model: its {module!r} is {list(shape)}, the model's "
            f"{list(view.shape)}"
        )
    return part


def _stack(
    adapters: list[list[tuple[Part, LoraModule]]], weight: Tensor, device: torch.device
) -> AdapterLayer:
    """The parts of a fused layer share one A (theirs below each other) and one B (theirs beside each other)."""
    ranks = [sum(lora.rank for _, lora in modules) for modules in adapters]
    rank = -(-max(ranks) // _RANK_STEP) * _RANK_STEP
    count = len(adapters) + 1
    rows, columns = weight.shape
    a = torch.zeros((count, rank, columns), dtype=weight.dtype, device=device)
    b = torch.zeros((count, rows, rank), dtype=weight.dtype, device=device)
    for number, modules in enumerate(adapters, start=1):
        first = 0
        for part, lora in modules:
            ranked = slice(first, first + lora.rank)
            first += lora.rank
            a[number, ranked] = _values(lora.a).to(a)
            target = part.view(b[number])
            target[:, ranked] = (_values(lora.b).float() * lora.scale).to(b)
    return AdapterLayer(a, b)


def _values(entry: TensorEntry) -> Tensor:
    return stored_tensor(entry, entry.shape)
