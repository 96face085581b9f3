"""Every operation of the room, found in its files: for whoever asks which backends serve what."""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

import mainspring.ops
from mainspring.ops.registry import Operation


def operations() -> list[Operation[Any, Any]]:
    """All operations, by name."""
    found: dict[str, Operation[Any, Any]] = {}
    for module in pkgutil.iter_modules(mainspring.ops.__path__):
        if not module.ispkg:
            for value in vars(importlib.import_module(f"mainspring.ops.{module.name}")).values():
                if isinstance(value, Operation):
                    found[value.name] = value
    return [found[name] for name in sorted(found)]
