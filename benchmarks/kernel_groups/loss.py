"""Linear + cross-entropy, forward and backward, counted as three products of 2 · M · V · H."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from kernel_groups import liger
from kernel_groups.timing import BF16, Row, eager_times, randn
from mainspring.ops import cross_entropy
from mainspring.ops.policy import FAST

ROWS = 8192
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def torchs(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """All logits at once, in bfloat16."""
    return F.cross_entropy(F.linear(hidden, weight), targets)


def loss_rows() -> Iterator[Row]:
    for h, vocab in ((2048, 131072), (4096, 131072), (4096, 128256)):
        hidden, weight = randn(ROWS, h), randn(vocab, h, scale=0.02)
        targets = torch.randint(0, vocab, (ROWS,), device="cuda")
        leaves = [hidden.requires_grad_(), weight.requires_grad_()]

        def step(
            loss: Loss, leaves: list[Tensor] = leaves, targets: Tensor = targets
        ) -> Callable[[], object]:
            return lambda: torch.autograd.grad(loss(*leaves, targets), leaves)

        ours = eager_times(step(lambda x, w, t: cross_entropy(x, w, t, policy=FAST)))
        name = f"M={ROWS} V={vocab} H={h} {BF16}".replace("torch.", "")
        flop = 6e-9 * ROWS * vocab * h
        yield Row("loss", name, flop, "GFLOP", *ours, *eager_times(step(torchs)), "torch")
        if liger.PRESENT:
            yield Row("loss", name, flop, "GFLOP", *ours, *eager_times(step(liger.loss)), liger.NAME)
