"""The gradient of a policy's loss over a mini-batch, micro-batch by micro-batch, on packed trajectories.

    sums = policy_gradient(model, optimizer, pack(trajectories), loss, tokens_per_microbatch=8192)
    grad_norm = optimizer.step(lr_factor, clip_norm)

A loss divides by what the whole step counts, so gradients add up to the same however the batch is cut.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from mainspring.errors import MainspringError
from mainspring.parallel.collectives import all_reduce, all_reduce_max
from mainspring.parallel.mesh import Group
from mainspring.rl.samples import PolicyModel, Sample, cut, written_log_probs_and_entropy
from mainspring.rl.trajectories import Packed

ALONE = Group.alone("dp")
"""No other rank takes part."""


@dataclass(frozen=True)
class MicroBatch:
    """A run of a mini-batch's trajectories, as a loss sees it; w written tokens of n trajectories."""

    samples: tuple[Sample, ...]
    trajectories: slice
    """Which of the mini-batch's N they are: for what there is one of per trajectory."""
    tokens: slice
    """Which of the mini-batch's W written tokens: for advantages and the like."""
    lengths: Tensor  # [n] int64, written tokens of each
    log_probs: Tensor  # [w] float32 of the model, with gradients
    entropy: Tensor  # [w] float32 in nats, with gradients
    old_log_probs: Tensor  # [w] float32, the engine's
    versions: Tensor  # [w] int64, of the weights that wrote each token

    @property
    def written(self) -> Tensor:
        """[w] bool, all true: what the functions of `math` take."""
        return torch.ones_like(self.log_probs, dtype=torch.bool)


TokenLoss = Callable[[MicroBatch], tuple[Tensor, dict[str, Tensor]]]
"""-> (this micro-batch's share of the step's loss, a scalar; scalars to be summed over the mini-batch)."""

Observer = Callable[[MicroBatch], None]
"""Sees each micro-batch before its loss is made; `lockstep.LockstepCheck` is one."""


class PolicyOptimizer(Protocol):
    """What a loop asks of an optimizer: `train.optimizer.Optimizer`, or over ranks `train.rank_optimizer`'s."""

    def accumulate(self) -> None:
        """Takes the gradients of a backward pass over and clears them."""
        ...

    def step(self, lr_factor: float, clip_norm: float) -> float:
        """Moves the weights; returns the gradient's norm before clipping."""
        ...


def policy_gradient(
    model: PolicyModel,
    optimizer: PolicyOptimizer,
    packed: Packed,
    loss: TokenLoss,
    *,
    tokens_per_microbatch: int,
    temperature: float = 1.0,
    observe: Observer | None = None,
    group: Group = ALONE,
) -> dict[str, float]:
    """Adds the mini-batch's gradient to the optimizer's; the weights stay. Returns the sums, that of the "loss" too.

    tokens_per_microbatch: of prompts and answers; it decides memory and speed, not the result. Raises ConfigError if a
    trajectory alone is longer, and whatever `observe` raises.

    group: the ranks among which the mini-batch is divided; all call this together, each with its own part. They make
    equally many passes, and the sums are those of all.
    """
    sums: dict[str, Tensor] = {}
    first_token = 0
    ends = packed.lengths.cumsum(0).tolist()
    runs = cut([len(sample.tokens) for sample in packed.samples], tokens_per_microbatch)
    for run in runs:
        samples = packed.samples[run.start : run.stop]
        tokens = slice(first_token, ends[run.stop - 1])
        first_token = tokens.stop
        log_probs, entropy, lengths = written_log_probs_and_entropy(model, samples, temperature)
        micro = MicroBatch(
            samples,
            slice(run.start, run.stop),
            tokens,
            lengths,
            log_probs,
            entropy,
            packed.old_log_probs[tokens],
            packed.versions[tokens],
        )
        if observe is not None:
            observe(micro)
        share, counted = loss(micro)
        share.backward()
        optimizer.accumulate()
        for name, value in {"loss": share, **counted}.items():
            sums[name] = (
                sums.get(name, torch.zeros((), dtype=torch.float64, device=value.device)) + value.detach()
            )
    passes = int(most([len(runs)], group, model.device)[0])
    for _ in range(passes - len(runs)):  # another rank has more: take part with nothing
        log_probs, _, _ = written_log_probs_and_entropy(model, packed.samples[:1], temperature)
        (log_probs.sum() * 0).backward()
        optimizer.accumulate()
    totals = total([float(value) for value in sums.values()], group, model.device)
    return dict(zip(sums, totals, strict=True))


def total(values: Sequence[float], group: Group, device: torch.device) -> list[float]:
    """Each value's sum over the ranks of a group, whose backend speaks on that device."""
    if group.size == 1:
        return list(values)
    summed: list[float] = all_reduce(torch.tensor(values, dtype=torch.float64, device=device), group).tolist()
    return summed


def most(values: Sequence[float], group: Group, device: torch.device) -> list[float]:
    """Each value's largest over the ranks of a group."""
    if group.size == 1:
        return list(values)
    largest = all_reduce_max(torch.tensor(values, dtype=torch.float64, device=device), group)
    found: list[float] = largest.tolist()
    return found


def common_parts(count: int, parts: int, group: Group, device: torch.device) -> int:
    """In how many mini-batches each rank can cut its `count` answers: `parts`, or as many as the fewest of a rank."""
    return min(parts, -int(most([-count], group, device)[0]))


def add_sums(totals: dict[str, float], sums: Mapping[str, float], num_tokens: int, step: int) -> None:
    """Adds a mini-batch's sums, its "tokens" and itself ("mini_batches") to a step's.

    Raises MainspringError where a value is not finite.
    """
    for name, value in {**sums, "mini_batches": 1, "tokens": num_tokens}.items():
        if not math.isfinite(value):
            raise MainspringError(f"step {step + 1}: {name} is {value}; lower the learning rate")
        totals[name] = totals.get(name, 0.0) + value


def mini_batches(count: int, parts: int, epochs: int, seed: tuple[int, ...]) -> Iterator[list[int]]:
    """Which of `count` answers each mini-batch takes: all of them once an epoch, in `parts` of nearly equal size."""
    random = np.random.Generator(np.random.Philox(np.random.SeedSequence(seed)))
    for _ in range(epochs):
        for part in np.array_split(random.permutation(count), min(parts, count)):
            yield part.tolist()
