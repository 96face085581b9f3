"""A training step of a 7M-parameter Llama, ours against transformers: `python benchmarks/train_cpu.py`.

Same weights, same optimizer (torch.optim.AdamW, fused; gradients clipped to norm 1), same tokens. "equal" is a batch of
sequences of one length; "packed" is documents of many lengths in one stream: transformers gets them as its
FlattenedForCausalLM collator lays them out, one row with position_ids that restart and a block-diagonal mask made
from them. Steps alternate, so that a busy neighbour hurts both; the median of the ratios of neighbouring steps
counts. Loss and gradient norm of both must agree before anything is timed.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # see mainspring/cli/train.py

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from mainspring.formats.model_config import ModelConfig
from mainspring.model.decoder import Decoder
from mainspring.ops import Policy, TokenBatch

HIDDEN, INNER, LAYERS, HEADS, VOCAB = 288, 768, 6, 6, 4096  # 7.15M weights
EQUAL = [256] * 8
PACKED = [256, 61, 256, 195, 130, 256, 17, 256, 109, 256, 84, 172]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Contestant:
    """One model with its optimizer; `step` does a whole training step and returns loss and gradient norm."""

    model: nn.Module
    optimizer: torch.optim.AdamW
    loss: Callable[[], Tensor]

    def step(self) -> tuple[float, float]:
        loss = self.loss()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(loss), float(norm)


def contestants(lengths: list[int], dtype: torch.dtype) -> tuple[Contestant, Contestant]:
    """(ours, theirs) with the same weights and the same tokens."""
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=512,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    theirs = LlamaForCausalLM(config).to(dtype).train()
    table = config.to_dict() | {"architectures": ["LlamaForCausalLM"]}
    ours = Decoder(ModelConfig.from_dict(table), policy=Policy("fast"), dtype=dtype)
    ours.load_state_dict(theirs.state_dict())
    tokens = torch.randint(0, VOCAB, (sum(lengths),))
    targets = tokens.roll(-1)
    batch = TokenBatch.packed(lengths)
    equal = len(set(lengths)) == 1
    rows = tokens.view(len(lengths), -1) if equal else tokens[None]
    positions = None if equal else batch.positions[None]

    def our_loss() -> Tensor:
        return ours.loss(tokens, batch, targets)

    def their_loss() -> Tensor:
        # use_cache off: a cache would be waste in training, and its presence disables packing by position_ids.
        logits = theirs(rows, position_ids=positions, use_cache=False).logits
        return nn.functional.cross_entropy(logits.float().view(-1, VOCAB), targets)

    return tuple(
        Contestant(model, torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True), loss)
        for model, loss in ((ours, our_loss), (theirs, their_loss))
    )


def check(ours: Contestant, theirs: Contestant, dtype: torch.dtype) -> None:
    """Both must compute the same step."""
    mine, other = ours.step(), theirs.step()
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    for what, a, b in zip(("loss", "gradient norm"), mine, other, strict=True):
        if abs(a - b) > tolerance * abs(b):
            raise SystemExit(f"{what}: ours {a}, transformers {b}; they do not train the same model")


def measure(ours: Contestant, theirs: Contestant, rounds: int) -> tuple[list[float], list[float]]:
    """Seconds of every step, taken in turns."""
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        for contestant, record in zip((ours, theirs), times, strict=True):
            start = time.perf_counter()
            contestant.step()
            record.append(time.perf_counter() - start)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(f"{arguments.threads} threads, {arguments.rounds} rounds; milliseconds a step: median (least)")
    print(f"{'case':<14}{'ours':>16}{'transformers':>18}{'ratio ours/theirs: median, quartiles':>40}")
    for dtype_name, dtype in DTYPES.items():
        for batch_name, lengths in (("equal", EQUAL), ("packed", PACKED)):
            ours, theirs = contestants(lengths, dtype)
            check(ours, theirs, dtype)
            mine, other = measure(ours, theirs, arguments.rounds)
            ratios = [a / b for a, b in zip(mine, other, strict=True)]
            low, middle, high = statistics.quantiles(ratios, n=4)
            cells = [f"{1e3 * statistics.median(t):.0f} ({1e3 * min(t):.0f})" for t in (mine, other)]
            case = f"{dtype_name} {batch_name}"
            print(
                f"{case:<14}{cells[0]:>16}{cells[1]:>18}{middle:>22.2f}  [{low:.2f}, {high:.2f}]", flush=True
            )


if __name__ == "__main__":
    main()
