"""Streams of random numbers by name: dropout inside a tensor-parallel region differs by rank, outside it does not."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from mainspring.tensor._tensor import ValueOutOfRangeError, default_generator

_OFFSET = 2718  # Megatron's distance between the seeds of the two kinds of region


class GeneratorTracker:
    """States of the default generator under names; `fork(name)` draws from one of them."""

    def __init__(self) -> None:
        self._states: dict[str, tuple[int, int]] = {}

    def add(self, name: str, seed: int) -> None:
        """A new stream.

        Raises:
            ValueOutOfRangeError: the name or the seed is taken: two streams would be the same.
        """
        if name in self._states or any(state[0] == seed for state in self._states.values()):
            raise ValueOutOfRangeError(f"a stream {name!r} or one with the seed {seed} exists already")
        self._states[name] = (seed, 0)

    @contextmanager
    def fork(self, name: str = "model-parallel") -> Iterator[None]:
        """Inside, the default generator continues that stream; afterwards it stands where it stood before."""
        if name not in self._states:
            raise ValueOutOfRangeError(f"there is no stream {name!r}; add() it first")
        before = default_generator.get_state()
        default_generator.set_state(self._states[name])
        try:
            yield
        finally:
            self._states[name] = default_generator.get_state()
            default_generator.set_state(before)

    def seed(self, seed: int, tensor_rank: int) -> None:
        """Megatron's seeds: `seed` everywhere outside, seed + 2718 + rank in the stream "model-parallel"."""
        self._states.clear()
        default_generator.manual_seed(seed)
        self.add("model-parallel", seed + _OFFSET + tensor_rank)

    def get_states(self) -> dict[str, tuple[int, int]]:
        return dict(self._states)

    def set_states(self, states: dict[str, tuple[int, int]]) -> None:
        self._states = dict(states)
