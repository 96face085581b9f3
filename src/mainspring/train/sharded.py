"""Training under a layout: the `Runner` of many ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mainspring.formats.files import write_json
from mainspring.formats.model_config import ModelConfig
from mainspring.formats.safetensors_file import CheckpointReader, TensorSpec
from mainspring.model.checkpoint import saved_config
from mainspring.model.decoder import Decoder
from mainspring.ops import IGNORE_INDEX, Policy
from mainspring.parallel.balance import (
    ExpertStatistics,
    blocks_by_layer,
    move_biases,
    statistics,
    take_loads,
)
from mainspring.parallel.checkpoint import (
    Stored,
    agreed,
    check_names,
    fill_weights,
    held,
    load_weights,
    shared_directory,
    stored_weights,
    write_together,
)
from mainspring.parallel.collectives import all_reduce, all_reduce_max
from mainspring.parallel.experts import Balance, ParallelExperts
from mainspring.parallel.host_copies import HostCopies
from mainspring.parallel.layout import Layout
from mainspring.parallel.mesh import Group, Mesh
from mainspring.parallel.parallelize import parallelize
from mainspring.parallel.pipeline import Pipeline
from mainspring.parallel.placement import full_shapes, hf_shapes
from mainspring.parallel.units import Units
from mainspring.train.checkpoint import TrainerState, publish, state_record
from mainspring.train.finite import first_non_finite
from mainspring.train.initialise import initial_tensors
from mainspring.train.packing import MicroBatch
from mainspring.train.recipe import ModelSection, OptimizerSection
from mainspring.train.sharded_optimizer import ShardedOptimizer
from mainspring.train.text_tokenizer import TextTokenizer


class Sharded:
    """A rank's part of the run. Every rank makes one, from the same checkpoint, and calls its methods together."""

    def __init__(
        self,
        config: ModelConfig,
        layout: Layout,
        mesh: Mesh,
        device: torch.device,
        dtype: torch.dtype,
        policy: Policy,
        settings: OptimizerSection,
        balance: Balance | None = None,
        *,
        offload: bool = False,
    ) -> None:
        """Weights are zeros until `load_weights`. Raises ConfigError where the layout does not fit."""
        self.config, self.dtype, self.device, self.layout, self.mesh = config, dtype, device, layout, mesh
        self.world, self.speaks = layout.world, mesh.rank == 0
        model = Decoder(config, policy=policy, device="meta", dtype=dtype).train()
        self._model = parallelize(model, layout, mesh, balance=balance)
        self._units = Units(self._model, device)
        self._pipeline = Pipeline(self._model, self._units)
        self._settings, self._offload = settings, offload
        self._optimizer: ShardedOptimizer | None = None
        self._step = 0
        self._copies = HostCopies()
        self._writers: Group | None = None
        """All ranks again, for the threads that write."""
        self.experts: ExpertStatistics | None = None

    def load_weights(self, directory: Path) -> None:
        """Takes the rank's part of a Hugging Face directory."""
        load_weights(self._units, directory)
        self._optimizer = ShardedOptimizer(self._units, self._settings, offload=self._offload)

    def initialise_weights(self, settings: ModelSection, seed: int) -> None:
        """A new model's: the bits that one device would begin with."""
        shapes = hf_shapes(self.config)
        fill_weights(self._units, initial_tensors(shapes, self.config.num_layers, settings, seed))
        self._optimizer = ShardedOptimizer(self._units, self._settings, offload=self._offload)

    def load_optimizer(self, checkpoint: Path) -> None:
        """Continues from a checkpoint's optimizer state, whatever layout wrote it. Raises CheckpointError."""
        reader = CheckpointReader(checkpoint / "optimizer")
        stored = self._stored_state()
        check_names(reader, {name: spec.shape for name, spec in stored.specs.items()})
        self.optimizer.load(reader)
        with torch.no_grad():
            for number, block in self._biased_blocks().items():
                bias = np.frombuffer(reader.entry(f"choice_bias.{number}").data, np.float32)
                block.choice_bias.copy_(torch.from_numpy(bias.copy()))

    @property
    def optimizer(self) -> ShardedOptimizer:
        assert self._optimizer is not None  # after load_weights
        return self._optimizer

    def num_weights(self) -> int:
        return sum(int(np.prod(shape)) for shape in full_shapes(self.config).values())

    def train_step(
        self, micro_batches: Sequence[MicroBatch], lr_factor: float, clip_norm: float
    ) -> tuple[float, float]:
        self._step += 1
        self.mesh.monitor.begin_step(self._step)
        loss = self._pipeline.start(micro_batches)
        norm = self.optimizer.step(lr_factor, clip_norm)
        loads = take_loads(self._model)
        move_biases(self._model, loads)
        self.experts = statistics(loads)
        return float(loss), norm

    def first_non_finite(self, micro_batches: Sequence[MicroBatch]) -> str | None:
        self._units.gather_all()
        found = first_non_finite(self._model, lambda: self._pipeline.evaluate(micro_batches))
        return None if found is None else f"{found} on rank {self.mesh.rank}"

    def negative_log_likelihoods(self, batches: Sequence[MicroBatch]) -> list[float]:
        padded = list(batches)
        # Ranks walk the collectives of every micro-batch together: each replica must have as many.
        tokens = 4 * self.layout.cp * self.layout.tp
        nothing = MicroBatch(np.zeros(tokens, np.int64), np.full(tokens, IGNORE_INDEX), (tokens,))
        padded += [nothing] * (-len(padded) % (self.layout.dp * self.layout.pp))
        return self._pipeline.evaluate(padded)[: len(batches)]

    def next_logits(self, sequences: Sequence[Sequence[int]]) -> Tensor:
        filled = [list(sequence) for sequence in sequences]
        # Every rank that shares the stream needs a piece of it, however short the sequences are.
        filled.append([0] * (4 * self.layout.cp * self.layout.tp))
        tokens = np.array([token for sequence in filled for token in sequence], np.int64)
        lengths = tuple(len(sequence) for sequence in filled)
        batch = MicroBatch(tokens, np.full(len(tokens), IGNORE_INDEX), lengths)
        return self._pipeline.next_logits(batch)[: len(sequences)]

    def agree(self, stop: bool, failed: bool, elapsed: float) -> tuple[bool, bool, float]:
        values = torch.tensor([float(stop), float(failed), elapsed], dtype=torch.float64, device=self.device)
        stopped, any_failed, seconds = all_reduce_max(values, self.mesh.group("world")).tolist()
        return bool(stopped), bool(any_failed), seconds

    def checkpoint_writer(
        self, output: Path, tokenizer: TextTokenizer, state: TrainerState, keep: int, *, background: bool
    ) -> Callable[[], Path]:
        """Each rank writes its pieces; the directory appears when all have. It raises CheckpointError on every rank."""
        path = output / f"step-{state.step:08d}"
        if background and self._writers is None:
            self._writers = self.mesh.beside("writers")
        world = self._writers if background and self._writers is not None else self.mesh.group("world")
        copies = self._copies if background else None
        weights = held(stored_weights(self._units), self._units, "weight", copies)
        moments = held(self._stored_state(), self._units, "state", copies)
        if copies is not None:
            copies.finish()

        def write() -> Path:
            with shared_directory(path, world) as partial:
                write_together(partial, weights, self._units, world)
                write_together(partial / "optimizer", moments, self._units, world)
                with agreed(world, f"write {path}"):
                    if self.speaks:
                        write_json(partial / "config.json", saved_config(self.config, self.dtype))
                        tokenizer.save(partial)
                        write_json(partial / "optimizer" / "state.json", state_record(state))
            with agreed(world, f"publish {path}"):
                if self.speaks:
                    publish(output, path, keep)
            return path

        return write

    def waits(self) -> None:
        # A peer that hangs while this rank waits is ended by its own watchdog, which breaks the writers' connections.
        self.mesh.monitor.progress()

    def close(self) -> None:
        self.mesh.monitor.stop()

    def _stored_state(self) -> Stored:
        """The optimizer's state, and the biases of the choice of experts."""
        stored = self.optimizer.checkpoint()
        biases = {f"choice_bias.{number}": bias for number, bias in self._choice_biases().items()}
        specs = {name: TensorSpec("F32", tuple(bias.shape)) for name, bias in biases.items()}
        return Stored({**stored.specs, **specs}, stored.pieces, {**stored.whole, **biases})

    def _biased_blocks(self) -> dict[int, ParallelExperts]:
        """The rank's blocks whose choice of experts is biased, by layer."""
        if not self._model.balance.bias_rate:
            return {}
        return blocks_by_layer(self._model)

    def _choice_biases(self) -> dict[int, Tensor]:
        """Of all layers, on every rank."""
        if not self._model.balance.bias_rate:
            return {}
        mine = self._biased_blocks()
        numbers = [number for number, moe in enumerate(self.config.moe_layers) if moe]
        table = torch.zeros(len(numbers), self.config.num_experts, device=self.device)
        for row, number in enumerate(numbers):
            if number in mine:
                table[row] = mine[number].choice_bias
        # A layer is on one pipeline rank, whose bias is the same on all its other ranks.
        return dict(zip(numbers, all_reduce(table, self.mesh.group("pp")).cpu(), strict=True))
