"""The device's own knowledge of the running requests: their tokens and their blocks, a row for each seat.

Sampled tokens are written here by the step that sampled them and read by the next, so that no step waits for the host.
All writes and reads are made in one stream, in the order of the steps: a row that a new request takes over is written
after the last step of its old owner.
"""

from __future__ import annotations

import torch
from torch import Tensor


class SeatTables:
    """Row s belongs to the request in seat s; the last row, `dummy`, to the padding of CUDA graphs.

    tokens: [num_seats + 1, max_tokens] int32, by position. blocks: [num_seats + 1, max_blocks] int32, of the KV cache,
    in order; the dummy's are the null block.
    """

    def __init__(self, num_seats: int, max_model_len: int, block_size: int, device: torch.device) -> None:
        self.block_size = block_size
        # One more than a sequence has: the token that follows the last one is written too.
        self.max_tokens = max_model_len + 1
        self.max_blocks = -(-self.max_tokens // block_size)
        self.dummy = num_seats
        rows = num_seats + 1
        self.tokens = torch.zeros((rows, self.max_tokens), dtype=torch.int32, device=device)
        self.blocks = torch.zeros((rows, self.max_blocks), dtype=torch.int32, device=device)
        self._flat_tokens = self.tokens.view(-1)
        self._flat_blocks = self.blocks.view(-1)

    def write_tokens(self, seats: Tensor, positions: Tensor, tokens: Tensor) -> None:
        """All [N] int64."""
        self._flat_tokens.index_copy_(0, seats * self.max_tokens + positions, tokens.to(torch.int32))

    def read_tokens(self, seats: Tensor, positions: Tensor) -> Tensor:
        """[N] int64 of [N] int64."""
        return self._flat_tokens.index_select(0, seats * self.max_tokens + positions).to(torch.int64)

    def write_blocks(self, seats: Tensor, places: Tensor, blocks: Tensor) -> None:
        """All [N] int64; places: numbers of blocks in their sequences."""
        self._flat_blocks.index_copy_(0, seats * self.max_blocks + places, blocks.to(torch.int32))

    def slots(self, seats: Tensor, positions: Tensor) -> Tensor:
        """[N] int64: where in the cache the keys of these tokens go."""
        size = self.block_size
        places = seats * self.max_blocks + torch.div(positions, size, rounding_mode="floor")
        return self._flat_blocks.index_select(0, places).to(torch.int64) * size + positions % size

    def block_tables(self, seats: Tensor, width: int) -> Tensor:
        """[S, width] int32 of the sequences in these seats [S] int64."""
        return self.blocks[:, :width].index_select(0, seats)
