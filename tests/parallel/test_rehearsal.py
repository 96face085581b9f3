"""What a pipeline's step computes is rehearsed without messages: nothing is loaded beside one, and nothing is left."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from mainspring.parallel.layout import Layout
from mainspring.train.verify import VerifySettings
from parallel.conftest import Reference
from parallel.pool import Pool

SETTINGS = VerifySettings(steps=2, dtype="float64")


def steps(pool: Pool, known: Reference, layout: str, rehearses: bool) -> list[dict[str, Any]]:
    world = Layout.parse(layout).world
    given = str(known.directory), layout, SETTINGS, str(known.gradients), rehearses
    return pool.run("rehearsal_jobs:steps", world, *given)


@pytest.mark.parametrize(
    ("kind", "layout"),
    [
        ("dense", "pp=2"),
        ("moe", "pp=2,schedule=zero_bubble_h2"),
        ("dense", "pp=2,virtual=2,schedule=interleaved"),
        ("moe", "pp=2,dp=2,ep=2,zero=3"),
        ("tied", "pp=2,tp=2,schedule=zero_bubble"),
    ],
)
def test_a_rehearsed_step_is_the_same_to_the_bit_and_loads_nothing_beside_a_message(
    pool: Pool, reference: Callable[..., Reference], kind: str, layout: str
) -> None:
    known = reference(kind, SETTINGS)
    plain, rehearsed = (steps(pool, known, layout, rehearses) for rehearses in (False, True))
    for before, after in zip(plain, rehearsed, strict=True):
        assert after["waited"] == []
        assert after["same_random"]
        assert after["error"] < 1e-10
        for name in ("losses", "loads", "evaluated"):
            assert after[name] == before[name]
        assert np.array_equal(after["logits"], before["logits"])
        for step, gradients in enumerate(before["gradients"]):
            pairs = zip(gradients, after["gradients"][step], strict=True)
            assert all(np.array_equal(a, b) for a, b in pairs)


def test_without_a_rehearsal_both_ranks_wait_for_each_other(
    pool: Pool, reference: Callable[..., Reference]
) -> None:
    """The second micro-batch is of another length: its forward pass and the first backward pass are both new."""
    found = steps(pool, reference("dense", SETTINGS), "pp=2", False)
    assert all(rank["waited"] for rank in found)
