"""Whether the tape records: `with no_grad():`, or a decorator."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import TracebackType
from typing import ParamSpec, TypeVar

from mainspring.tensor._tensor import _set_grad_enabled, is_grad_enabled

P = ParamSpec("P")
R = TypeVar("R")


class set_grad_enabled:
    """Sets recording of this thread inside a `with` block or a decorated function."""

    def __init__(self, mode: bool) -> None:
        self._mode = mode
        self._before: list[bool] = []

    def __enter__(self) -> None:
        self._before.append(is_grad_enabled())
        _set_grad_enabled(self._mode)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _set_grad_enabled(self._before.pop())

    def __call__(self, function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
            with set_grad_enabled(self._mode):
                return function(*args, **kwargs)

        return wrapped


class no_grad(set_grad_enabled):
    """Nothing inside is recorded."""

    def __init__(self) -> None:
        super().__init__(False)


class enable_grad(set_grad_enabled):
    """Everything inside is recorded, also within `no_grad`."""

    def __init__(self) -> None:
        super().__init__(True)
