"""What a program may ask about the namespace."""

from __future__ import annotations

from typing import Any

from mainspring.tensor import _tensor as mt
from mainspring.tensor._tensor import float32, int64
from mainspring.tensor.array_api.dtypes import isdtype


class _Info:
    def capabilities(self) -> dict[str, Any]:
        return {"boolean indexing": True, "data-dependent shapes": True, "max dimensions": 8}

    def default_device(self) -> str:
        return "cpu"

    def default_dtypes(self, *, device: Any = None) -> dict[str, Any]:
        return {"real floating": float32, "complex floating": None, "integral": int64, "indexing": int64}

    def devices(self) -> list[str]:
        return ["cpu"]

    def dtypes(self, *, device: Any = None, kind: Any = None) -> dict[str, Any]:
        names = ("bool", "int8", "int16", "int32", "int64", "uint8", "float32", "float64")
        known = {name: getattr(mt, name) for name in names}
        return {k: v for k, v in known.items() if kind is None or isdtype(v, kind)}


def __array_namespace_info__() -> _Info:
    return _Info()
