"""A decode step's look-ups: what the tables hold, whatever the seats."""

from __future__ import annotations

import pytest
import torch

from mainspring.errors import BackendError
from mainspring.ops.decode_inputs import decode_inputs, put_tokens
from mainspring.ops.policy import Policy
from mainspring.ops.triton.support import interpreted

PLACES = [
    pytest.param(("cpu", "reference"), id="reference"),
    pytest.param(("cuda", "triton"), id="triton", marks=pytest.mark.gpu),
]
if interpreted():
    PLACES = [pytest.param(("cpu", "triton"), id="interpreter")]
Place = tuple[str, str]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(("count", "size", "width"), [(1, 16, 3), (5, 4, 30), (40, 16, 700)])
def test_rows_find_their_tokens_slots_and_blocks(place: Place, count: int, size: int, width: int) -> None:
    device, backend = place
    generator = torch.Generator().manual_seed(count)
    seats = torch.randperm(50, generator=generator)[:count]
    positions = torch.randint(0, width * size - 1, (count,), generator=generator)
    own = torch.randint(1, 10_000, (count,), generator=generator)
    tokens = torch.randint(0, 99, (51, width * size), generator=generator, dtype=torch.int32)
    blocks = torch.randint(1, 10_000, (51, width + 2), generator=generator, dtype=torch.int32)
    rows = torch.stack((seats, positions, own))
    rows = torch.cat((rows, torch.tensor([[50, 50], [0, 0], [0, 0]])), 1)  # padding, twice
    on_device = [x.to(device) for x in (rows, tokens, blocks)]
    policy = Policy("lockstep", backend)
    got = decode_inputs(*on_device, size, width, policy=policy)
    for row, (seat, position, block) in enumerate(zip(*rows.tolist(), strict=True)):
        blocks[seat, position // size] = block
        assert got.tokens[row] == tokens[seat, position]
        assert got.slots[row] == block * size + position % size
        assert got.next_positions[row] == got.context_lens[row] == position + 1
        assert torch.equal(got.block_tables[row].cpu(), blocks[seat, :width])
    assert torch.equal(on_device[2].cpu(), blocks)
    sampled = torch.arange(count + 2) + 100
    put_tokens(on_device[1], on_device[0][0], got.next_positions, sampled.to(device), policy=policy)
    for token, seat, position in zip(sampled[:count].tolist(), *rows[:2, :count].tolist(), strict=True):
        assert on_device[1][seat, position + 1] == token
        tokens[seat, position + 1] = token
    assert torch.equal(on_device[1][:50].cpu(), tokens[:50])


def test_tables_of_another_kind_are_refused() -> None:
    table = torch.zeros(3, 4, dtype=torch.int32)
    rows = torch.zeros(3, 2, dtype=torch.int64)
    with pytest.raises(BackendError, match="rows"):
        decode_inputs(rows[:2], table, table, 16, 2)
    with pytest.raises(BackendError, match="blocks"):
        decode_inputs(rows, table, table.long(), 16, 2)
    with pytest.raises(BackendError, match="width 5"):
        decode_inputs(rows, table, table, 16, 5)
