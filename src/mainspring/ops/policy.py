"""How an operation is to be computed: which numerics, and whether one backend is forced."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Numerics = Literal["lockstep", "fast"]


@dataclass(frozen=True)
class Policy:
    """Carried by a model and handed to every operation it calls.

    `numerics="lockstep"`: each row's bits depend on that row's own data alone, never on what stands
    beside it in the batch ("Canonical reduction order" in docs/design.md). `"fast"` is free to choose.
    `backend` forces one backend by name ("reference", "cpu"); None lets the registry choose.
    """

    numerics: Numerics = "lockstep"
    backend: str | None = None


LOCKSTEP = Policy("lockstep")
FAST = Policy("fast")
