"""Training low-rank adapters instead of the weights (Hu et al., arXiv 2106.09685), in lockstep all the same.

    model = LoraDecoder(load_model("path"), LoraSettings(rank=16))
    optimizer = Optimizer(model.lora, OptimizerSection(lr=1e-4))      # masters and moments of the adapters only
    for metrics in grpo(model, optimizer, rollouts, settings): ...
    model.lora.save("adapter")                                        # as PEFT writes it; an engine serves it

The engine of the rollouts computes with the same object, adapters included, so its log-probabilities are the trainer's.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from mainspring import ops
from mainspring.engine.weights import copy_weights
from mainspring.errors import CheckpointError, ConfigError
from mainspring.formats.files import write_json
from mainspring.formats.lora_adapter import CONFIG_NAME, WEIGHTS_NAME, read_lora_adapter
from mainspring.model.checkpoint import stored_tensor
from mainspring.model.decoder import Decoder
from mainspring.model.naming import Part
from mainspring.ops import TokenBatch

LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_PREFIX = "base_model.model."


@dataclass(frozen=True)
class LoraSettings:
    """Which layers get adapters, and how large they are."""

    rank: int = 0
    """0: train the weights themselves."""
    alpha: float = 32.0
    """The adapters' product is scaled by alpha / rank."""
    targets: tuple[str, ...] = LINEAR
    """Linear layers by the ends of their Hugging Face names; of experts none."""
    seed: int = 0


@dataclass(frozen=True)
class _Adapter:
    """What is added to rows of a fused layer: scale · B A x. a: [rank, in]; b: [out, rank]."""

    part: Part
    a: nn.Parameter
    b: nn.Parameter


class LoraWeights:
    """The adapters of a model: what its optimizer moves. Implements `ops.batch.LinearAdapters`.

    A begins uniform within ±1/√inputs, B at zero, so that the model begins as it was.
    """

    def __init__(self, model: Decoder, settings: LoraSettings) -> None:
        """Raises ConfigError for a rank below 1 and targets that the model does not have."""
        if settings.rank < 1:
            raise ConfigError(f"lora rank = {settings.rank} must be at least 1")
        self.settings = settings
        self.dtype, self._policy = model.dtype, model.policy
        self._scale = settings.alpha / settings.rank
        weights = dict(model.named_parameters())
        generator = torch.Generator().manual_seed(settings.seed)
        self._layers: dict[str, list[_Adapter]] = {}
        self._rows: dict[str, int] = {}
        for part in model.parts():
            target = part.name.removesuffix(".weight").rpartition(".")[2]
            if part.expert is not None or target not in settings.targets or not part.name.endswith(".weight"):
                continue
            outputs, inputs = part.view(weights[part.parameter]).shape
            a = torch.empty(settings.rank, inputs).uniform_(-1, 1, generator=generator) / math.sqrt(inputs)
            layer = part.parameter.removesuffix(".weight")
            adapter = _Adapter(
                part,
                nn.Parameter(a.to(model.device, model.dtype)),
                nn.Parameter(torch.zeros(outputs, settings.rank, device=model.device, dtype=model.dtype)),
            )
            self._layers.setdefault(layer, []).append(adapter)
            self._rows[layer] = weights[part.parameter].shape[0]
        found = {a.part.name.split(".")[-2] for a in self._adapters()}
        missing = [target for target in settings.targets if target not in found]
        if missing and settings.targets != LINEAR:
            raise ConfigError(f"the model has no layer {missing[0]!r} for an adapter; it has {sorted(found)}")

    def add(self, name: str, x: Tensor, y: Tensor) -> Tensor:
        """See `ops.batch.LinearAdapters.add`; every token has the adapter."""
        adapters = self._layers.get(name)
        if adapters is None:
            return y
        pieces, done = [], 0
        for adapter in adapters:  # in the order of their rows
            low = ops.linear(x, adapter.a, policy=self._policy)
            delta = ops.linear(low, adapter.b, policy=self._policy) * self._scale
            if adapter.part.start > done:
                pieces.append(delta.new_zeros(*delta.shape[:-1], adapter.part.start - done))
            pieces.append(delta)
            done = adapter.part.start + adapter.b.shape[0]
        if done < self._rows[name]:
            pieces.append(y.new_zeros(*y.shape[:-1], self._rows[name] - done))
        return y + (pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=-1))

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """By PEFT's names."""
        for adapter in self._adapters():
            module = _PREFIX + adapter.part.name.removesuffix(".weight")
            yield f"{module}.lora_A.weight", adapter.a
            yield f"{module}.lora_B.weight", adapter.b

    def parts(self) -> list[Part]:
        """Each parameter is one part: an optimizer's state bears PEFT's names."""
        return [Part(name, name) for name, _ in self.named_parameters()]

    def save(self, directory: str | Path) -> None:
        """Writes the adapter as PEFT does, into a directory that is new or empty."""
        path = Path(directory)
        path.mkdir(parents=True, exist_ok=True)
        tensors = {name: p.detach().cpu().contiguous() for name, p in self.named_parameters()}
        save_file(tensors, path / WEIGHTS_NAME, metadata={"format": "pt"})
        table = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "r": self.settings.rank,
            "lora_alpha": self.settings.alpha,
            "lora_dropout": 0.0,
            "bias": "none",
            "target_modules": sorted({name.split(".")[-3] for name in tensors}),
        }
        write_json(path / CONFIG_NAME, table)

    @torch.no_grad()
    def load(self, directory: str | Path) -> None:
        """Takes an adapter of the same rank and targets. Raises CheckpointError."""
        stored = read_lora_adapter(directory)
        mine = {a.part.name.removesuffix(".weight"): a for a in self._adapters()}
        if stored.keys() != mine.keys():
            raise CheckpointError(f"{directory} has adapters of other layers than lora.targets names")
        for name, adapter in mine.items():
            module = stored[name]
            if module.rank != self.settings.rank or module.scale != self._scale:
                raise CheckpointError(
                    f"{directory} has rank {module.rank} and scale {module.scale}, the run rank "
                    f"{self.settings.rank} and scale {self._scale}"
                )
            adapter.a.copy_(stored_tensor(module.a, module.a.shape))
            adapter.b.copy_(stored_tensor(module.b, module.b.shape))

    def deltas(self) -> Iterator[tuple[str, Tensor]]:
        """(Hugging Face's name, scale · B A in float32) of each layer that has an adapter."""
        for adapter in self._adapters():
            yield adapter.part.name, self._scale * (adapter.b.detach().float() @ adapter.a.detach().float())

    def _adapters(self) -> Iterator[_Adapter]:
        for adapters in self._layers.values():
            yield from adapters


class LoraDecoder(Decoder):
    """A decoder whose weights stay and whose adapters are trained. The base's tensors are shared, not copied."""

    def __init__(self, base: Decoder, settings: LoraSettings) -> None:
        """Raises ConfigError as `LoraWeights` does."""
        super().__init__(base.config, policy=base.policy, device="meta", dtype=base.dtype)
        for name, parameter in base.named_parameters():
            owner, _, leaf = name.rpartition(".")
            setattr(self.get_submodule(owner), leaf, parameter.requires_grad_(False))
        self.lora = LoraWeights(self, settings)

    def forward(self, tokens: Tensor, batch: TokenBatch) -> Tensor:
        """As `Decoder.forward`, each token with the adapter."""
        hidden: Tensor = super().forward(tokens, replace(batch, adapters=self.lora))
        return hidden

    @torch.no_grad()
    def merged(self) -> Decoder:
        """A plain decoder of the weights with the adapters added in, each rounded once."""
        whole = Decoder(self.config, policy=self.policy, device=self.device, dtype=self.dtype)
        copy_weights(whole, self.hf_tensors())
        weights = whole.hf_tensors()
        for name, delta in self.lora.deltas():
            weights[name].copy_((weights[name].float() + delta).to(self.dtype))
        return whole
