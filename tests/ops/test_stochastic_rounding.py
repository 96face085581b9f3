"""Stochastic rounding: Philox's published words, right on average, the same for the same seed; and in AdamW."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mainspring.errors import BackendError
from mainspring.ops.adamw import make_adamw
from mainspring.ops.adamw_parameter import AdamWParameter
from mainspring.ops.policy import Policy
from mainspring.ops.stochastic_rounding import philox, round_stochastically

RATES = {"lr": 0.01, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8}


def test_words_are_those_published_with_the_generator() -> None:
    """Known answers of Philox4x32 in 7 rounds (Random123)."""
    words = philox(torch.zeros(1, dtype=torch.int64), 0, 0, 0)
    assert [int(word) for word in words] == [0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48]


@given(st.floats(width=32, allow_nan=False, allow_infinity=False), st.integers(0, 2**63 - 1))
def test_rounds_to_a_neighbour(value: float, seed: int) -> None:
    x = torch.full((6,), value)
    rounded = round_stochastically(x, parameter=1, step=2, seed=seed)
    words = x.view(torch.int32).to(torch.int64) & 0xFFFFFFFF
    away = rounded.view(torch.int16).to(torch.int64) & 0xFFFF
    assert bool(((away == words >> 16) | ((away == (words >> 16) + 1) & (words & 0xFFFF != 0))).all())


@pytest.mark.parametrize("share", [0.1, 0.5, 0.93])
def test_is_right_on_average(share: float) -> None:
    low, step, count = 1.5, 2.0**-7, 40_000
    x = torch.full((count,), -(low + share * step))
    rounded = round_stochastically(x, parameter=0, step=1, seed=3).float()
    assert set(rounded.unique().tolist()) == {-low, -(low + step)}
    found = float((rounded != -low).float().mean())
    assert abs(found - share) < 5 * math.sqrt(share * (1 - share) / count)


def test_noise_is_of_the_seed_the_step_the_parameter_and_the_element() -> None:
    x = torch.full((1 << 12,), 1.003)
    given = {"parameter": 0, "step": 1, "seed": 0}
    first = round_stochastically(x, **given)
    assert torch.equal(first, round_stochastically(x, **given))
    for change in ({"parameter": 1}, {"step": 2}, {"seed": 1}, {"seed": 1 << 40}):
        other = round_stochastically(x, **(given | change))
        assert 0.2 < float((first != other).float().mean()) < 0.8


def test_noise_does_not_depend_on_how_much_is_rounded_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(11, 13)
    whole = round_stochastically(x, parameter=4, step=9, seed=5)
    monkeypatch.setattr("mainspring.ops.stochastic_rounding._AT_ONCE", 16)
    assert torch.equal(whole, round_stochastically(x, parameter=4, step=9, seed=5))


def test_what_is_not_finite_stays_so() -> None:
    narrow_nan = torch.tensor([0x7F800001], dtype=torch.int32).view(torch.float32)
    x = torch.cat([torch.tensor([math.inf, -math.inf, math.nan]), narrow_nan])
    rounded = round_stochastically(x, parameter=0, step=1, seed=0)
    assert rounded[:2].tolist() == [math.inf, -math.inf]
    assert rounded[2:].isnan().all()


@pytest.mark.parametrize("stochastic", [False, True], ids=["nearest", "stochastic"])
def test_weights_that_move_less_than_their_last_place_follow_their_masters(stochastic: bool) -> None:
    """The nearest bfloat16 of a master that has moved by a tenth of a unit is where it was; stochastically their mean
    has moved."""
    master = torch.full((20_000,), 1.0)
    weight = master.to(torch.bfloat16)
    parameter = AdamWParameter(master, torch.zeros_like(master), torch.zeros_like(master), 0.0, weight)
    optimizer = make_adamw([parameter], Policy("fast", "torch"), stochastic_rounding=stochastic, seed=7)
    optimizer.step([torch.full_like(master, -0.3)], step=1, **(RATES | {"lr": 2.0**-7 / 10}))
    moved = float(weight.float().mean()) - 1.0
    assert float(master[0]) == pytest.approx(1.0 + 2.0**-7 / 10)
    assert moved == (pytest.approx(2.0**-7 / 10, rel=0.2) if stochastic else 0.0)


def test_other_weights_are_refused() -> None:
    x = torch.zeros(4)
    for weight in (None, x.half()):
        with pytest.raises(BackendError, match="bfloat16 weights, not to"):
            make_adamw(
                [AdamWParameter(x, x.clone(), x.clone(), 0.0, weight)],
                Policy("fast", "torch"),
                stochastic_rounding=True,
            )
