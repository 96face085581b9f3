"""Where decoding hooks into a step: the sampler, drafted tokens, adapters of linear layers (and `grammar.Grammar`).

The core runs one step ahead of what it knows: while a step's tokens are still on their way from the device, the next
step is scheduled and launched, fed from the device's own copy of the tokens (`seats.SeatTables`). So a hook on the
device never waits for it, and a request whose hook needs the tokens themselves (`Request.waits_for_tokens`) sits out
until they have come.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from mainspring.engine.request import Request

if TYPE_CHECKING:
    from torch import Tensor

    from mainspring.ops.batch import LinearAdapters


@dataclass(frozen=True, slots=True)
class SampleRows:
    """The rows of logits that a step samples from, R of them. A request with k drafted tokens has 1 + k, in order.

    Attributes:
        requests: whose row it is.
        offsets: 0 .. k: how many of the request's drafted tokens stand before the row's token.
        seats: [R] int64, on the device: the row's seat, where its request's state lies.
        positions: [R] int64, on the device: the position in its sequence that the sampled token takes.
        bitmask: [R, ceil(V / 32)] int32, on the device: the tokens that grammars allow; None without grammars.
    """

    requests: Sequence[Request]
    offsets: Sequence[int]
    seats: Tensor
    positions: Tensor
    bitmask: Tensor | None


class Sampler(Protocol):
    """Turns logits into tokens, on the device, each row by that row's data alone.

    It keeps whatever it needs of a request in tensors with a row for each seat. Drafted tokens are verified by
    sampling every row as if its drafts were accepted: the core keeps the tokens up to and with the first that differs
    from its draft. Since a row's random numbers are counted by position, the text is that without drafts.
    """

    def take_seat(self, seat: int, request: Request) -> None:
        """The request sits down (at admission, and again after a preemption): set the seat's state. Never waits."""
        ...

    def is_plain(self, request: Request) -> bool:
        """`sample_plain` serves the request's next token."""
        ...

    def sample_plain(self, logits: Tensor, seats: Tensor, positions: Tensor) -> Tensor:
        """The same launches for all plain requests, so that a CUDA graph can hold them.

        logits: [R, V] float32, left unchanged; seats, positions: [R] int64 -> [R] int64, on the device.
        """
        ...

    def sample(self, logits: Tensor, rows: SampleRows) -> Tensor:
        """Any requests. logits: [R, V] float32, left unchanged -> [R] int64, on the device, without waiting for it."""
        ...


class Drafter(Protocol):
    """Guesses tokens that are then verified in one step."""

    def propose(self, requests: Sequence[Request]) -> None:
        """Set `draft_token_ids` of these requests (all their tokens are known); called before each scheduling.

        A request never gets more than `request.max_drafts()` accepted; further ones are cut off.
        """
        ...

    def free_cache(self) -> None:
        """Give memory back that can be filled anew; the next `propose` takes it again."""
        ...


class Adapters(Protocol):
    """The LoRA adapters of a model, several in one batch."""

    def of_batch(self, lora_ids: Tensor) -> LinearAdapters:
        """What `TokenBatch.adapters` shall be.

        lora_ids: [T] int64 on the device: each token's adapter, 0 for none.
        """
        ...
