"""Verifiers tell right from wrong; a reward function that fails costs its sample only, until there are too many."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mainspring.errors import ConfigError, MainspringError
from mainspring.rl.rewards import Completion, RewardWorker
from mainspring.rl.verifiers import exact_match, same_number, stated_number
from rl.reward_functions import moody


def _completions(*answers: str) -> list[Completion]:
    return [Completion("?", answer, "right") for answer in answers]


def test_failures_are_counted_and_the_others_are_scored() -> None:
    with RewardWorker(moody, timeout=0.5, max_failures=4) as worker:
        found = worker.score(_completions("right", "raise", "wrong", "nan"))
        assert found == [1.0, None, 0.0, None]
        assert worker.last_failure == "it gave nan"
        assert worker.score(_completions("hang", "right")) == [None, 1.0]
        assert worker.last_failure == "it did not answer within 0.5 s"
        assert worker.score(_completions("die", "right")) == [None, 1.0]
        assert worker.last_failure == "its process died"
        with pytest.raises(MainspringError, match=r"moody has failed 5 times.*ValueError: no such thing"):
            worker.score(_completions("right", "raise"))


def test_a_function_without_a_name_to_import_it_by_is_refused() -> None:
    with (
        RewardWorker(lambda prompt, answer, reference: 1.0) as worker,
        pytest.raises(ConfigError, match="at the top level of a module"),
    ):
        worker.score(_completions("right"))


def test_limits_out_of_range_are_refused() -> None:
    with pytest.raises(ConfigError, match="timeout must be above 0 seconds, got 0"):
        RewardWorker(moody, timeout=0.0)
    with pytest.raises(ConfigError, match="max_failures must be at least 0, got -1"):
        RewardWorker(moody, max_failures=-1)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("She has 3 + 4 = 7 eggs.\n#### 7", Fraction(7)),
        ("#### 12\nno, wait\n#### 1,234.50 dollars", Fraction(2469, 2)),
        ("so \\boxed{\\text{about } 41} and \\boxed{42}, of 100", Fraction(42)),
        ("\\boxed{\\frac{7}} then 9", Fraction(7)),
        ("from -3 to −5.", Fraction(-5)),
        ("the answer is .5", Fraction(1, 2)),
        ("an unfinished \\boxed{8", Fraction(8)),
        ("nothing", None),
        ("10-3", Fraction(3)),
        ("12345,678", Fraction(12345678)),
        ("1,2345", Fraction(2345)),
        ("9" * 5000, None),
        ("#### none of the 3", Fraction(3)),
    ],
)
def test_the_stated_number_is_found(text: str, number: Fraction | None) -> None:
    assert stated_number(text) == number


@settings(max_examples=60, deadline=None)
@given(st.integers(-(10**12), 10**12), st.integers(-(10**12), 10**12), st.sampled_from(["", ".0", ".00"]))
def test_numbers_are_equal_whatever_their_spelling(a: int, b: int, tail: str) -> None:
    assert same_number("", f"It is {a:,}{tail}.", f"#### {a}") == 1.0
    assert same_number("", f"It is {a:,}{tail}.", f"#### {b}") == float(a == b)


def test_without_a_number_or_a_match_there_is_no_reward() -> None:
    assert same_number("", "no idea", "none") == 0.0
    assert exact_match("", " a  b\n", "a b") == 1.0
    assert exact_match("", "ab", "a b") == 0.0
