"""ZeRO: what each rank holds is what the formulas say, traffic too, and gradients are FSDP2's."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

from mainspring.formats.model_config import ModelConfig
from mainspring.formats.safetensors_file import CheckpointReader
from mainspring.parallel.placement import full_shapes
from mainspring.train.verify import VerifySettings
from parallel.conftest import Reference
from parallel.pool import Pool
from parallel.test_layouts import hold

SETTINGS = VerifySettings(steps=2)


@pytest.mark.parametrize(
    ("ranks", "replicate", "zero"),
    [(2, 1, 0), (2, 1, 1), (2, 1, 2), (2, 1, 3), (4, 2, 1), (4, 2, 2), (4, 2, 3)],
)
def test_a_rank_holds_what_zeros_formula_says(
    pool: Pool, reference: Callable[..., Reference], zero: int, ranks: int, replicate: int
) -> None:
    """Elements of parameters, gradients (once summed) and each kind of state; a unit is padded by under 8 a rank."""
    known = reference("dense", SETTINGS)
    total = sum(math.prod(s) for s in full_shapes(ModelConfig.from_file(known.directory)).values())
    shards = ranks // replicate if zero else 1
    slack = 7 * 8 * ranks  # seven units
    for held in pool.run(
        "jobs:sizes", ranks, str(known.directory), f"dp={ranks},zero={zero},replicate={replicate}"
    ):
        assert held["shards"] == pytest.approx(total / shards, abs=slack)
        assert held["parameters"] == pytest.approx(total / (shards if zero == 3 else 1), abs=slack)
        assert held["gradients"] == pytest.approx(total / shards if zero else total, abs=slack)


@pytest.mark.parametrize("layout", ["dp=2", "dp=2,zero=1", "dp=2,zero=3"])
def test_gradients_are_summed_narrow_where_that_was_asked_for_and_a_rank_has_one_micro_batch(
    pool: Pool, reference: Callable[..., Reference], layout: str
) -> None:
    settings = VerifySettings(steps=2, micro_batches=2, dtype="bfloat16")
    known = reference("dense", settings)
    narrow = f"{layout},gradient_sums=narrow"
    hold(pool, reference, f"dense:{narrow}", settings)
    for asked, count, dtype in ((layout, 2, "float32"), (narrow, 2, "bfloat16"), (narrow, 4, "float32")):
        found = pool.run("jobs:gradient_dtypes", 2, str(known.directory), asked, count)
        assert found == [{f"torch.{dtype}"}] * 2


@pytest.mark.parametrize("layout", ["dp=2,zero=3", "pp=2,schedule=zero_bubble_h2"])
def test_a_model_that_is_dropped_gives_its_memory_back(
    pool: Pool, reference: Callable[..., Reference], layout: str
) -> None:
    """Hooks on parameters are out of the collector's sight: what they hold must not hold the parameters."""
    known = reference("dense", SETTINGS)
    assert pool.run("jobs:alive_after_a_step", 2, str(known.directory), layout) == [[], []]


def test_gradients_are_those_of_pytorchs_fsdp2(pool: Pool, reference: Callable[..., Reference]) -> None:
    known = reference("dense", SETTINGS)
    reader = CheckpointReader(known.gradients)
    gradients = pool.run("fsdp:fsdp2_gradients", 2, str(known.directory), SETTINGS)
    for part in gradients[0]:
        whole = np.concatenate([g[part] for g in gradients])
        expected = reader.entry(part).numpy()
        error = np.linalg.norm(whole[: expected.shape[0]] - expected) / np.linalg.norm(expected)
        assert error < 1e-5, part
