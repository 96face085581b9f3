"""A stop string cuts the text exactly, however the text is cut into pieces, and no part of one is shown."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from mainspring.engine.stop_strings import StopStringScanner


def expected_cut(text: str, stops: list[str], include: bool) -> tuple[str, str | None]:
    """The stop string that is complete first, by looking at every prefix of the text."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            stop = max(found, key=len)
            return (text[:end] if include else text[: end - len(stop)]), stop
    return text, None


@settings(max_examples=300, deadline=None)
@given(
    text=st.text("ab\n", max_size=30),
    stops=st.lists(st.text("ab\n", min_size=1, max_size=4), min_size=1, max_size=3),
    cuts=st.lists(st.integers(0, 30), max_size=8),
    include=st.booleans(),
)
def test_the_cut_does_not_depend_on_the_pieces(
    text: str, stops: list[str], cuts: list[int], include: bool
) -> None:
    wanted, stop = expected_cut(text, stops, include)
    bounds = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    scanner = StopStringScanner(stops, include)
    shown = ""
    for start, end in pairwise(bounds):
        shown += scanner.push(text[start:end])
        # What is shown is never taken back, and never part of a stop string.
        assert wanted.startswith(shown)
    assert scanner.matched == stop
    shown += scanner.finish()
    assert shown == wanted


def test_holds_back_only_what_could_become_a_stop_string() -> None:
    scanner = StopStringScanner(["</s>", "STOP"])
    assert scanner.push("hello <") == "hello "
    assert scanner.push("/") == ""
    assert scanner.push("x ST") == "</x "
    assert scanner.push("ART") == "START"
    assert scanner.matched is None
    assert scanner.finish() == ""


def test_nothing_is_taken_after_a_match() -> None:
    scanner = StopStringScanner(["."])
    assert scanner.push("one. two") == "one"
    assert scanner.push(" three") == ""
    assert scanner.finish() == ""
    assert scanner.matched == "."


def test_a_disarmed_scanner_lets_a_stop_string_pass() -> None:
    scanner = StopStringScanner(["ab", "abc"])
    assert scanner.push("x ab", armed=False) == "x "
    # "ab" was complete while disarmed: only "abc" may still count.
    assert scanner.push("c") == ""
    assert scanner.matched == "abc"
