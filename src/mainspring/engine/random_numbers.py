"""Keys of random numbers. The numbers themselves are drawn by `ops.sample`, counted by position from a request's key.

That is what makes a seeded request give the same text in any batch, after a preemption, and on any machine.
"""

from __future__ import annotations

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


def _mix(value: int) -> int:
    """The finaliser of SplitMix64 (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators")."""
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def key_from_seed(seed: int) -> int:
    """A 64-bit key. Neighbouring seeds give unrelated keys, so that their streams are not shifted copies."""
    return _mix((seed + _GOLDEN) & _MASK)
