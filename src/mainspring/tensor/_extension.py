"""Looks for the compiled module before anything else of this room is imported."""

from __future__ import annotations

from mainspring.errors import BackendError

try:
    import mainspring.tensor._tensor  # noqa: F401 - that it loads is the question
except ImportError as error:
    raise BackendError(
        f"the C++ tensor framework cannot be imported ({error}): install a C++20 compiler (GCC 11, Clang 14 or later) "
        "and run `pip install --force-reinstall --no-deps mainspring` "
        "(in a checkout: `pip install --no-build-isolation -e .`)"
    ) from error
