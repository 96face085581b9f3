"""Python's garbage collector beside the engine's steps."""

from __future__ import annotations

import gc
import weakref

import pytest

from mainspring.engine.collector import spared


@pytest.fixture(autouse=True)
def _nothing_is_frozen() -> None:
    """Whatever ran before in this process."""
    gc.unfreeze()


class Node:
    """Something that a cycle keeps alive."""

    def __init__(self) -> None:
        self.itself = self


def test_what_was_alive_is_spared_and_what_comes_is_collected() -> None:
    old = weakref.ref(Node())
    assert old() is not None
    with spared():
        new = weakref.ref(Node())
        gc.collect()
        assert old() is not None
        assert new() is None
    gc.collect()
    assert old() is None
    assert gc.get_freeze_count() == 0


def test_it_ends_with_an_error_and_leaves_what_others_froze() -> None:
    with pytest.raises(KeyError), spared():
        raise KeyError
    assert gc.get_freeze_count() == 0
    with spared():
        frozen = gc.get_freeze_count()
        with spared():
            pass
        assert gc.get_freeze_count() == frozen > 0
