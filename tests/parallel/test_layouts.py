"""Every layout gives one device's gradients, gradient norm and losses: compositions of two and three dimensions."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from mainspring.ops import Numerics
from mainspring.parallel.layout import Layout
from mainspring.train.verify import VerifySettings, judge
from parallel.conftest import Reference
from parallel.pool import Pool

DOUBLE = VerifySettings(steps=2, dtype="float64")

# kind of model : layout. By ranks, more or less, for a change of their number makes a new process group.
QUICK = [
    "dense:one",
    "tied:tp=2",
    "biased:tp=2,sequence_parallel=false",
    "moe:tp=2",
    "tied:pp=2",
    "dense:dp=2",
    "dense:dp=2,zero=1",
    "moe:dp=2,zero=2",
    "tied:dp=2,zero=3",
    "windowed:cp=2",
    "biased:cp=2,context=ulysses",
    "moe:dp=2,ep=2",
    "moe-tied:cp=2,ep=2,zero=3",
    "tied:pp=2,split=1+3",
    "tied:pp=2,virtual=2,schedule=interleaved",
    "moe:pp=2,schedule=zero_bubble",
    "tied:pp=2,split=3+1,schedule=zero_bubble_h2",
    "biased:tp=4",
    "tied:tp=2,pp=2",
    "biased:tp=2,cp=2",
    "dense:tp=2,cp=2,context=ulysses",
    "dense:tp=2,dp=2,zero=3",
    "moe-tied:tp=2,pp=2,schedule=zero_bubble",
    "tied:pp=2,dp=2,zero=3",
    "tied:pp=2,cp=2,schedule=afab",
    "moe:dp=2,cp=2,ep=4,zero=2",
    "moe:dp=2,tp=2,ep=2,zero=1",
    "moe:pp=2,dp=2,ep=2,zero=1",
    "dense:dp=4,replicate=2,zero=3",
    "windowed:cp=4",
    "tied:tp=2,pp=2,recompute=full",
    "moe:dp=2,ep=2,zero=3,recompute=full,tp=2",
    "tied:tp=2,pp=2,recompute=selective,schedule=zero_bubble",
    "moe:dp=2,ep=2,zero=3,recompute=selective,tp=2",
    "windowed:cp=2,dp=2,zero=3,recompute=selective",
    "tied:pp=4,schedule=zero_bubble",
    "dense:dp=2,cp=2,zero=1,context=ulysses",
    "moe:dp=4,ep=2,replicate=2,zero=1",
    "tied:tp=2,pp=2,dp=2,zero=1",
    "moe-tied:tp=2,cp=2,dp=2,ep=4,zero=3",
    "dense:pp=2,cp=2,dp=2,zero=2",
    "moe:pp=2,tp=2,dp=2,ep=2",
]

SLOW = [
    "biased:tp=4,sequence_parallel=false",
    "tied:tp=4,dp=2,zero=2",
    "biased:tp=4,cp=2",
    "biased:tp=4,pp=2",
    "dense:tp=2,pp=4",
    "dense:tp=2,cp=4",
    "tied:pp=2,tp=2,cp=2,context=ulysses",
    "moe-sparse:dp=4,cp=2,ep=8,zero=3",
    "moe:dp=4,cp=2,ep=2,replicate=2,zero=3",
    "moe:dp=2,cp=4,ep=2,zero=1",
    "tied:pp=4,dp=2,zero=1,schedule=zero_bubble",
    "windowed:pp=2,tp=2,dp=2,zero=3",
    "dense:pp=2,virtual=2,schedule=interleaved,dp=2,tp=2,zero=1",
    "moe-tied:pp=2,virtual=2,schedule=interleaved,tp=2,dp=2,ep=2,zero=3",
    "moe:tp=4,dp=2,ep=2",
    "biased:cp=4,dp=2,zero=2",
    "moe:pp=2,virtual=2,schedule=interleaved,dp=2,zero=3,recompute=full",
    "moe-tied:pp=2,virtual=2,schedule=interleaved,dp=2,zero=3,recompute=selective",
    "dense:cp=4,context=ulysses,dp=2,recompute=selective",
    # Four dimensions, 16 ranks.
    "tied:tp=2,pp=2,dp=2,cp=2,zero=1",
    "moe:tp=2,pp=2,dp=2,cp=2,ep=4,zero=3",
    "moe-tied:tp=2,pp=2,dp=4,ep=2,replicate=2,zero=1,schedule=zero_bubble",
]


def hold(pool: Pool, reference: Callable[..., Reference], case: str, settings: VerifySettings) -> None:
    kind, _, layout = case.partition(":")
    known = reference(kind, settings)
    results = pool.run(
        "jobs:verify",
        Layout.parse(layout).world,
        str(known.directory),
        layout,
        settings,
        str(known.gradients),
    )
    for run, errors in results:  # every rank has come to the same
        verdict = judge(known.run, run, errors, settings)
        assert not verdict.problems, "\n".join(verdict.problems)
        assert (run, errors) == results[0]


@pytest.mark.parametrize("case", QUICK)
def test_a_layout_equals_one_device_in_float64(
    pool: Pool, reference: Callable[..., Reference], case: str
) -> None:
    hold(pool, reference, case, DOUBLE)


@pytest.mark.slow
@pytest.mark.parametrize("case", SLOW)
def test_more_layouts_equal_one_device_in_float64(
    pool: Pool, reference: Callable[..., Reference], case: str
) -> None:
    hold(pool, reference, case, DOUBLE)


@pytest.mark.parametrize(
    ("case", "numerics"),
    [
        ("biased:tp=4", "lockstep"),
        ("moe:dp=2,tp=2,ep=2,zero=1", "fast"),
        ("moe:dp=2,tp=2,ep=2,zero=1", "lockstep"),
        ("tied:tp=2,pp=2,dp=2,zero=3", "fast"),
    ],
)
def test_a_layout_equals_one_device_in_float32(
    pool: Pool, reference: Callable[..., Reference], case: str, numerics: Numerics
) -> None:
    hold(pool, reference, case, VerifySettings(steps=2, numerics=numerics))


def test_bfloat16_keeps_float32_masters_under_a_layout(
    pool: Pool, reference: Callable[..., Reference]
) -> None:
    hold(pool, reference, "dense:dp=2,zero=3", VerifySettings(steps=3, dtype="bfloat16"))


@pytest.mark.parametrize(
    "case", ["biased:tp=2", "tied:tp=2,pp=2,recompute=full", "moe:tp=2,cp=2", "biased:tp=4"]
)
def test_products_that_run_beside_their_gather_or_sum_equal_one_device(
    pool: Pool, reference: Callable[..., Reference], case: str
) -> None:
    kind, _, layout = case.partition(":")
    known = reference(kind, DOUBLE)
    results = pool.run(
        "jobs:verify_and_count_overlaps", Layout.parse(layout).world,
        str(known.directory), layout, DOUBLE, str(known.gradients),
    )  # fmt: skip
    for run, errors, counts in results:
        assert not judge(known.run, run, errors, DOUBLE).problems
        assert min(counts.values()) > 0
