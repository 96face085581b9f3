"""What post-training learns from: tokens, and which of them the policy is to write; and how they are packed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mainspring.errors import ConfigError
from mainspring.model.decoder import Decoder
from mainspring.ops import TokenBatch
from mainspring.parallel.decoder import ParallelDecoder

PolicyModel = Decoder | ParallelDecoder
"""The whole model, or a rank's part of it (`parallel.parallelize`)."""


@dataclass(frozen=True)
class Sample:
    """One conversation. written[i]: token i is the policy's own; others (prompts, tools' answers) are only read.

    Raises ConfigError where the two differ in length, nothing is written, or the first token is: nothing stands
    before it that could predict it.
    """

    tokens: tuple[int, ...]
    written: tuple[bool, ...]

    def __post_init__(self) -> None:
        if len(self.tokens) != len(self.written):
            raise ConfigError(
                f"a sample has {len(self.tokens)} tokens, but {len(self.written)} marks of who wrote them"
            )
        if not any(self.written):
            raise ConfigError("a sample has no token that the policy is to write; give it an answer")
        if self.written[0]:
            raise ConfigError(
                "a sample begins with a token to be written; put the prompt or a beginning-of-text token first"
            )

    @staticmethod
    def answer(prompt: Sequence[int], answer: Sequence[int]) -> Sample:
        """A prompt and its answer, which ends as the policy shall end its own. Raises ConfigError."""
        return Sample((*prompt, *answer), (False,) * len(prompt) + (True,) * len(answer))

    @property
    def num_written(self) -> int:
        return sum(self.written)


@dataclass(frozen=True)
class Pair:
    """Two answers to one prompt, the first preferred."""

    chosen: Sample
    rejected: Sample

    def __len__(self) -> int:
        return len(self.chosen.tokens) + len(self.rejected.tokens)


def cut(lengths: Sequence[int], tokens_per_microbatch: int) -> list[range]:
    """Runs of consecutive items, each of at most tokens_per_microbatch tokens in all.

    Raises ConfigError if one item alone is longer.
    """
    runs: list[range] = []
    first, room = 0, tokens_per_microbatch
    for i, length in enumerate(lengths):
        if length > tokens_per_microbatch:
            raise ConfigError(
                f"item {i} has {length} tokens, more than tokens_per_microbatch = "
                f"{tokens_per_microbatch}; raise it, or leave such items out"
            )
        if length > room:
            runs.append(range(first, i))
            first, room = i, tokens_per_microbatch
        room -= length
    if lengths:
        runs.append(range(first, len(lengths)))
    return runs


def drawn(count: int, prompts_per_step: int, seed: int, first_step: int = 0) -> Iterator[list[int]]:
    """Without end, from step first_step on: which prompts each step takes, all of them once an epoch.

    A function of the seed and the step, so a run may begin anywhere. An epoch's last, incomplete step is left
    out; the next epoch's order is another. Raises ConfigError if there are fewer than prompts_per_step.
    """
    if not 1 <= prompts_per_step <= count:
        raise ConfigError(
            f"prompts_per_step = {prompts_per_step} must be between 1 and the {count} prompts given"
        )
    steps_per_epoch = count // prompts_per_step
    epoch, step = divmod(first_step, steps_per_epoch)
    while True:
        random = np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, epoch))))
        order = random.permutation(count).tolist()
        for at in range(step, steps_per_epoch):
            yield order[at * prompts_per_step : (at + 1) * prompts_per_step]
        epoch, step = epoch + 1, 0


def written_log_probs(
    model: PolicyModel, samples: Sequence[Sample], temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """(log p of the written tokens, end to end [W] float32; how many each sample has [N] int64), differentiable.

    In lockstep these are to the bit what an engine of that `logprobs_temperature` reports for such tokens.
    """
    hidden, targets, counts = _before_written(model, samples)
    return model.token_log_probs(hidden, targets, temperature), counts


@torch.no_grad()
def scored_log_probs(
    model: PolicyModel, samples: Sequence[Sample], temperature: float, tokens_per_microbatch: int
) -> Tensor:
    """`written_log_probs` of any number of samples, [W] float32, without gradients.

    Raises ConfigError if a sample alone is too long for a micro-batch.
    """
    runs = cut([len(sample.tokens) for sample in samples], tokens_per_microbatch)
    pieces = [written_log_probs(model, samples[run.start : run.stop], temperature)[0] for run in runs]
    return torch.cat(pieces) if pieces else torch.zeros(0, device=model.device)


def written_log_probs_and_entropy(
    model: PolicyModel, samples: Sequence[Sample], temperature: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """(`written_log_probs`' log p to the same bits, entropies [W] float32 in nats, counts [N]), differentiable."""
    hidden, targets, counts = _before_written(model, samples)
    return *model.token_log_probs_and_entropy(hidden, targets, temperature), counts


def _before_written(model: PolicyModel, samples: Sequence[Sample]) -> tuple[Tensor, Tensor, Tensor]:
    """(hidden states [W, H] from which the written tokens were predicted, those tokens [W], how many a sample [N])."""
    tokens = torch.tensor([t for s in samples for t in s.tokens], dtype=torch.int64, device=model.device)
    written = torch.tensor([w for s in samples for w in s.written], device=model.device)
    hidden = model(tokens, TokenBatch.packed([len(s.tokens) for s in samples], model.device))
    counts = torch.tensor([s.num_written for s in samples], device=model.device)
    # No sample begins with a written token: the place before one is the same sample's.
    places = written.nonzero()[:, 0]
    return hidden.index_select(0, places - 1), tokens[places], counts
