"""What computes a run's steps, as the trainer sees it, and the one that does so on one device.

`train.sharded.Sharded` is the other one: many ranks under a layout.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Protocol

import torch

from mainspring.errors import ConfigError
from mainspring.formats.model_config import ModelConfig
from mainspring.model.decoder import Decoder
from mainspring.model.layers import MixtureOfExperts
from mainspring.ops import IGNORE_INDEX, Routing, TokenBatch
from mainspring.parallel.balance import ExpertStatistics, Load, statistics
from mainspring.parallel.host_copies import HostCopies
from mainspring.train.captured import CapturedPass
from mainspring.train.checkpoint import TrainerState, checkpoint_writer, load_optimizer
from mainspring.train.finite import first_non_finite
from mainspring.train.optimizer import Optimizer
from mainspring.train.packing import MicroBatch
from mainspring.train.recipe import OptimizerSection
from mainspring.train.text_tokenizer import TextTokenizer


class Runner(Protocol):
    """Holds a model and its optimizer. Every rank of a layout calls every method, with the same arguments."""

    config: ModelConfig
    dtype: torch.dtype
    device: torch.device
    world: int
    """Ranks that compute."""
    speaks: bool
    """Whether this process reports; one of all ranks does."""

    @property
    def experts(self) -> ExpertStatistics | None:
        """What the last step's experts were given; None without experts."""
        ...

    def num_weights(self) -> int:
        """Of the whole model."""
        ...

    def train_step(
        self, micro_batches: Sequence[MicroBatch], lr_factor: float, clip_norm: float
    ) -> tuple[float, float]:
        """(loss, gradient norm before clipping) of one optimizer step; a norm that is not finite moves nothing."""
        ...

    def first_non_finite(self, micro_batches: Sequence[MicroBatch]) -> str | None:
        """After such a step: what was the first to be not finite."""
        ...

    def negative_log_likelihoods(self, batches: Sequence[MicroBatch]) -> list[float]:
        """Of each batch's targets that count, the sum in nats."""
        ...

    def next_logits(self, sequences: Sequence[Sequence[int]]) -> torch.Tensor:
        """The logits that follow each of the token sequences, [N, vocab], the same on every rank."""
        ...

    def agree(self, stop: bool, failed: bool, elapsed: float) -> tuple[bool, bool, float]:
        """Whether any rank was asked to stop, whether a save has failed on any, the largest of the ranks' seconds."""
        ...

    def checkpoint_writer(
        self, output: Path, tokenizer: TextTokenizer, state: TrainerState, keep: int, *, background: bool
    ) -> Callable[[], Path]:
        """What writes a checkpoint; see `train.checkpoint`. In the background: of copies, while training goes on."""
        ...

    def waits(self) -> None:
        """This process waits for its own disk: a watchdog need not count that as a hang."""
        ...

    def close(self) -> None:
        """The run is over: nothing is watched any more."""
        ...


class SingleDevice:
    """The whole model on one device."""

    world = 1
    speaks = True

    def __init__(
        self, model: Decoder, settings: OptimizerSection, captured: CapturedPass | None = None
    ) -> None:
        """captured: of this model, where passes are to be replayed from CUDA graphs."""
        self.model = model.train()
        self._captured = captured
        self.config, self.dtype, self.device = model.config, model.dtype, model.device
        self._optimizer = Optimizer(model, settings)
        self._copies = HostCopies()
        self._loads: dict[int, torch.Tensor] = {}
        """By layer, the slots that each expert was given in the last step, [E] int64."""
        for number, layer in enumerate(model.layers):
            block = layer.mlp
            if isinstance(block, MixtureOfExperts):
                self._loads[number] = torch.zeros(block.num_experts, dtype=torch.int64, device=self.device)
                block.observe = partial(self._count, number)

    def _count(self, number: int, routing: Routing) -> None:
        if torch.is_grad_enabled():
            self._loads[number] += routing.offsets.diff()

    @property
    def experts(self) -> ExpertStatistics | None:
        return statistics(
            {number: Load(slots.to(torch.float64), 0.0) for number, slots in self._loads.items()}
        )

    def load_optimizer(self, checkpoint: Path) -> None:
        """Continues from a checkpoint's optimizer state. Raises CheckpointError where it does not fit."""
        load_optimizer(checkpoint, self._optimizer, self.device)

    def num_weights(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())

    def train_step(
        self, micro_batches: Sequence[MicroBatch], lr_factor: float, clip_norm: float
    ) -> tuple[float, float]:
        for slots in self._loads.values():
            slots.zero_()
        total = sum(len(micro.tokens) for micro in micro_batches)
        step_loss = torch.zeros((), device=self.device)
        for micro in micro_batches:
            # Each micro-batch's mean weighs by its tokens: the sum is the mean over the whole step.
            share = len(micro.tokens) / total
            if self._captured is None:
                loss = self._loss(micro) * share
                loss.backward()
                self._optimizer.accumulate()
            else:
                loss = self._captured.run(micro, share)
                self._optimizer.accumulate(borrowed=len(micro_batches) > 1)
            step_loss += loss.detach()
        norm = self._optimizer.step(lr_factor, clip_norm)
        return float(step_loss), norm

    def first_non_finite(self, micro_batches: Sequence[MicroBatch]) -> str | None:
        if self._captured is not None:
            self._captured.forget()  # the passes that follow need the memory
        return first_non_finite(self.model, lambda: [self._loss(micro) for micro in micro_batches])

    @torch.no_grad()
    def negative_log_likelihoods(self, batches: Sequence[MicroBatch]) -> list[float]:
        return [float(self._loss(b)) * int((b.targets != IGNORE_INDEX).sum()) for b in batches]

    @torch.no_grad()
    def next_logits(self, sequences: Sequence[Sequence[int]]) -> torch.Tensor:
        lengths = [len(sequence) for sequence in sequences]
        tokens = torch.tensor([token for sequence in sequences for token in sequence], device=self.device)
        hidden = self.model(tokens, TokenBatch.packed(lengths, self.device))
        last = torch.tensor(lengths, device=self.device).cumsum(0) - 1
        return self.model.logits(hidden[last])

    def agree(self, stop: bool, failed: bool, elapsed: float) -> tuple[bool, bool, float]:
        return stop, failed, elapsed

    def checkpoint_writer(
        self, output: Path, tokenizer: TextTokenizer, state: TrainerState, keep: int, *, background: bool
    ) -> Callable[[], Path]:
        copies = self._copies if background else None
        return checkpoint_writer(output, self.model, self._optimizer, tokenizer, state, keep, copies)

    def waits(self) -> None:
        """Nothing watches."""

    def close(self) -> None:
        """Nothing was opened."""

    def _loss(self, micro: MicroBatch) -> torch.Tensor:
        return self.model.loss(
            torch.from_numpy(micro.tokens).to(self.device),
            TokenBatch.packed(micro.lengths, self.device),
            torch.from_numpy(micro.targets).to(self.device),
        )


def usable_device(name: str, index: int | None = None, *, setting: str = "device") -> torch.device:
    """The device; setting: what its user calls it. Raises ConfigError where there is no CUDA device.

    On CUDA, PyTorch is told to take deterministic kernels, without which resuming is not exact, and not to fill new
    tensors with NaN, which it does by itself then: a pass over memory for each.
    """
    if name == "cuda":
        if not torch.cuda.is_available():
            raise ConfigError(f"{setting} = 'cuda', but PyTorch sees no CUDA device; set it to 'cpu'")
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it is first used
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # not in its stub
    return torch.device(name) if index is None else torch.device(name, index)
