"""The sampler of `sampler.sample` behind the interface that a step asks for; it waits for the device."""

from __future__ import annotations

import torch
from torch import Tensor

from mainspring.engine.hooks import SampleRows
from mainspring.engine.request import Request
from mainspring.engine.sampler import sample


class HostSampler:
    """Implements `hooks.Sampler`; serves no drafts and no grammars."""

    def take_seat(self, seat: int, request: Request) -> None:
        pass

    def is_plain(self, request: Request) -> bool:
        return False

    def sample_plain(self, logits: Tensor, seats: Tensor, positions: Tensor) -> Tensor:
        return logits.argmax(dim=-1)

    def sample(self, logits: Tensor, rows: SampleRows) -> Tensor:
        return torch.tensor(sample(logits, rows.requests), dtype=torch.int64, device=logits.device)
