"""AdamW, and Muon if asked for, on the shards of a parallel model: the optimizer of a run under a layout.

State is kept where its parameters' shard is and named as `train.optimizer.Optimizer` names it, so that a checkpoint
of one is read by the other, and by any layout.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from mainspring.formats.safetensors_file import CheckpointReader, TensorSpec
from mainspring.model.naming import parts
from mainspring.ops.adamw import make_adamw
from mainspring.ops.adamw_parameter import AdamWParameter
from mainspring.ops.muon import MuonSettings, classic
from mainspring.parallel.checkpoint import Stored, read_piece
from mainspring.parallel.placement import full_shapes, hf_shapes
from mainspring.parallel.units import Piece, Units
from mainspring.train.optimizer import is_inner_matrix
from mainspring.train.recipe import OptimizerSection
from mainspring.train.sharded_muon import ShardedMuon


class ShardedOptimizer:
    """Moves the shards of `units` by their summed gradients. Parameters that are not float32 have float32 masters.

    With `offload` masters and moments are in the host's memory: gradients go there, weights come back.
    """

    def __init__(self, units: Units, settings: OptimizerSection, *, offload: bool = False) -> None:
        self._units, self._settings = units, settings
        self._offload = offload
        self.has_masters = units.model.dtype != torch.float32
        full = full_shapes(units.model.config)
        inner = {name for name, shape in full.items() if is_inner_matrix(name, len(shape))}
        muon_names = inner if settings.name == "muon" else set()
        self.adamw_names = [name for name in full if name not in muon_names]
        self._masters = {unit.name: self._master(unit.shard) for unit in units.units}
        self._spans = [span for span in units.spans if span.parameter not in muon_names]
        self._means = [torch.zeros_like(span.of(self._masters[span.unit.name])) for span in self._spans]
        self._squares = [torch.zeros_like(mean) for mean in self._means]
        states = [
            AdamWParameter(
                span.of(self._masters[span.unit.name]),
                mean,
                square,
                settings.weight_decay if span.parameter in inner else 0.0,
                span.of(span.unit.shard) if self.has_masters and not offload else None,
            )
            for span, mean, square in zip(self._spans, self._means, self._squares, strict=True)
        ]
        self._adamw = make_adamw(states) if states else None
        muon = MuonSettings(
            momentum=settings.muon_momentum,
            weight_decay=settings.muon_weight_decay,
            newton_schulz=classic(settings.muon_iterations),
        )
        self._muon = ShardedMuon(units, self._masters, muon_names, muon) if muon_names else None
        self.steps = 0

    @torch.no_grad()
    def step(self, lr_factor: float, clip_norm: float) -> float:
        """As `Optimizer.step`: the norm is that of the whole model's gradient, the same on every rank."""
        units, s = self._units, self._settings
        square = units.gradient_square()
        gradients = [units.gradient(span) for span in self._spans]
        if self._adamw is not None and not self._offload:
            self._adamw.prepare(gradients)
        norm = math.sqrt(float(square))
        if norm == norm and norm != float("inf"):
            scale = clip_norm / norm if clip_norm and norm > clip_norm else 1.0
            self.steps += 1
            if self._muon is not None:
                if scale != 1.0:
                    units.scale_gradients(scale)
                    scale = 1.0
                self._muon.step(s.muon_lr * lr_factor)
            if self._adamw is not None:
                self._adamw.step(
                    [gradient.to("cpu") for gradient in gradients] if self._offload else gradients,
                    step=self.steps,
                    lr=s.lr * lr_factor,
                    beta1=s.beta1,
                    beta2=s.beta2,
                    eps=s.eps,
                    grad_scale=scale,
                )
            if self._offload or (self.has_masters and self._muon is not None):
                self._copy_masters()
            units.start_refresh()
        units.clear()
        return norm

    def stored(self) -> Stored:
        """The state for a checkpoint: `master.`, `adamw.exp_avg.`, ... + Hugging Face's name."""
        config = self._units.model.config
        shapes, adamw = hf_shapes(config), set(self.adamw_names)
        specs = {}
        for part in parts(config):
            kinds = ["adamw.exp_avg.", "adamw.exp_avg_sq."] if part.parameter in adamw else ["muon.momentum."]
            for kind in ["master.", *kinds] if self.has_masters else kinds:
                specs[f"{kind}{part.name}"] = TensorSpec("F32", shapes[part.name])
        return Stored(
            specs,
            [(name, piece, lambda tensor=tensor: tensor) for name, piece, tensor in self.pieces()],  # type: ignore[misc]  # a lambda's default has no type
        )

    def checkpoint(self) -> Stored:
        """`stored`, with the steps and PyTorch's random state: under the names that `Optimizer` gives them, so that
        either reads the other's."""
        stored = self.stored()
        whole = {f"adamw.step.{name}": torch.tensor(float(self.steps)) for name in self.adamw_names}
        whole["random.cpu"] = torch.get_rng_state()
        specs = {
            name: TensorSpec("U8" if t.dtype == torch.uint8 else "F32", tuple(t.shape))
            for name, t in whole.items()
        }
        return Stored({**stored.specs, **specs}, stored.pieces, whole)

    @torch.no_grad()
    def load(self, reader: CheckpointReader) -> None:
        """What `checkpoint` has written, under whatever layout; the random state too. Raises CheckpointError."""
        for name, piece, tensor in self.pieces():
            tensor.copy_(read_piece(reader.entry(name), piece))
        steps = [name for name in reader.names() if name.startswith("adamw.step.")]
        self.steps = int(np.frombuffer(reader.entry(steps[0]).data, np.float32)[0])
        self.weights_from_masters()
        torch.set_rng_state(torch.frombuffer(reader.entry("random.cpu").data, dtype=torch.uint8).clone())

    def pieces(self) -> Iterator[tuple[str, Piece, Tensor]]:
        """(name, piece, its part of the rank's state) for every kind of state."""
        if self.has_masters:
            for piece in self._units.pieces:
                yield f"master.{piece.block.name}", piece, piece.of(self._masters[piece.unit.name])
        place = {id(span): number for number, span in enumerate(self._spans)}
        for piece, number in zip(self._units.pieces, self._units.span_of_piece, strict=True):
            span = self._units.spans[number]
            if id(span) in place:
                part = slice(piece.begin - span.begin, piece.end - span.begin)
                yield f"adamw.exp_avg.{piece.block.name}", piece, self._means[place[id(span)]][part]
                yield f"adamw.exp_avg_sq.{piece.block.name}", piece, self._squares[place[id(span)]][part]
        if self._muon is not None:
            for piece, momentum in zip(self._muon.pieces, self._muon.momenta, strict=True):
                yield f"muon.momentum.{piece.block.name}", piece, momentum

    @torch.no_grad()
    def weights_from_masters(self) -> None:
        """After the masters were loaded: rounds them into the parameters."""
        if self.has_masters or self._offload:
            self._copy_masters()
            self._units.refresh()

    def _copy_masters(self) -> None:
        for unit in self._units.units:
            unit.shard.copy_(self._masters[unit.name])

    def _master(self, shard: Tensor) -> Tensor:
        if self._offload:
            copy = shard.to("cpu", torch.float32, copy=True)
            return copy.pin_memory() if shard.is_cuda else copy
        return shard.to(torch.float32, copy=True) if self.has_masters else shard
