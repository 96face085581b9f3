"""AdamW on the shards of a parallel model: the optimizer of a run under a layout.

State is kept where its parameters' shard is and named as `train.optimizer.Optimizer` names it, so that a checkpoint
of one is read by the other, and by any layout.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from mainspring.errors import ConfigError
from mainspring.formats.safetensors_file import TensorSpec
from mainspring.ops.adamw import AdamWParameter, make_adamw
from mainspring.parallel.checkpoint import Stored
from mainspring.parallel.placement import full_shapes, hf_shapes
from mainspring.parallel.units import Piece, Units
from mainspring.train.optimizer import is_inner_matrix
from mainspring.train.recipe import OptimizerSection


class ShardedOptimizer:
    """Moves the shards of `units` by their summed gradients. Parameters that are not float32 have float32 masters.

    With `offload` masters and moments are in the host's memory: gradients go there, weights come back.
    """

    def __init__(self, units: Units, settings: OptimizerSection, *, offload: bool = False) -> None:
        """Raises ConfigError for Muon, whose matrices a shard would cut."""
        if settings.name != "adamw":
            raise ConfigError(
                f"optimizer.name = {settings.name!r}: under a layout of several ranks only 'adamw' moves shards; "
                "use it, or train on one device"
            )
        self._units, self._settings = units, settings
        self._offload = offload
        self.has_masters = units.model.dtype != torch.float32
        full = full_shapes(units.model.config)
        self._masters = {unit.name: self._master(unit.shard) for unit in units.units}
        self._means = {unit.name: torch.zeros_like(self._masters[unit.name]) for unit in units.units}
        self._squares = {unit.name: torch.zeros_like(self._masters[unit.name]) for unit in units.units}
        self._states = [
            AdamWParameter(
                piece.of(self._masters[piece.unit.name]),
                piece.of(self._means[piece.unit.name]),
                piece.of(self._squares[piece.unit.name]),
                settings.weight_decay
                if is_inner_matrix(piece.block.parameter, len(full[piece.block.parameter]))
                else 0.0,
                piece.of(piece.unit.shard) if self.has_masters and not offload else None,
            )
            for piece in units.pieces
        ]
        self._adamw = make_adamw(self._states)
        self.steps = 0

    @torch.no_grad()
    def step(self, lr_factor: float, clip_norm: float) -> float:
        """As `Optimizer.step`: the norm is that of the whole model's gradient, the same on every rank."""
        units, s = self._units, self._settings
        norm = units.gradient_norm()
        if norm == norm and norm != float("inf"):
            if clip_norm and norm > clip_norm:
                units.scale_gradients(clip_norm / norm)
            self.steps += 1
            host = torch.device("cpu")
            gradients = [units.gradient(piece) for piece in units.pieces]
            self._adamw.step(
                [gradient.to(host) for gradient in gradients] if self._offload else gradients,
                step=self.steps,
                lr=s.lr * lr_factor,
                beta1=s.beta1,
                beta2=s.beta2,
                eps=s.eps,
            )
            if self._offload:
                self._copy_masters()
            units.refresh()
        units.clear()
        return norm

    def stored(self) -> Stored:
        """The state for a checkpoint: `master.`, `adamw.exp_avg.`, `adamw.exp_avg_sq.` + Hugging Face's name."""
        shapes = hf_shapes(self._units.model.config)
        specs = {
            f"{kind}{name}": TensorSpec("F32", shape)
            for kind in self._kinds()
            for name, shape in shapes.items()
        }
        return Stored(
            specs,
            [(name, piece, lambda tensor=tensor: tensor) for name, piece, tensor in self.pieces()],  # type: ignore[misc]
        )

    def pieces(self) -> Iterator[tuple[str, Piece, Tensor]]:
        """(name, piece, its part of the rank's state) for every kind of state."""
        for kind, shards in self._kinds().items():
            for piece in self._units.pieces:
                yield f"{kind}{piece.block.name}", piece, piece.of(shards[piece.unit.name])

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

    def _kinds(self) -> dict[str, dict[str, Tensor]]:
        kinds = {"adamw.exp_avg.": self._means, "adamw.exp_avg_sq.": self._squares}
        return {"master.": self._masters, **kinds} if self.has_masters else kinds
