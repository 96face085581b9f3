"""What a request's next token may be, so that its text follows a rule: the interface; `token_rules` makes them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor


class Grammar(Protocol):
    """What a request's next token may be. It makes the request wait for each of its tokens."""

    @property
    def terminated(self) -> bool:
        """The text is complete: the request ends (finish reason "stop")."""
        ...

    def accept(self, token_id: int) -> bool:
        """Go on by a sampled token; False if the grammar does not allow it (then the request ends)."""
        ...

    def fill_bitmask(self, bitmask: Tensor, row: int) -> None:
        """Set row `row` of bitmask [R, ceil(V / 32)] int32, on the CPU: bit t % 32 of word t // 32 allows token t."""
        ...
