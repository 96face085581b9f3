"""Mainspring: one stack for language models, from kernel to agent, on one model definition.

The public names below are loaded on first use, so that `import mainspring` stays cheap and the
rooms that need no PyTorch work without it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mainspring.engine.llm import LLM
    from mainspring.engine.outputs import CompletionOutput, RequestOutput
    from mainspring.engine.sampling_params import SamplingParams, StructuredOutputsParams
    from mainspring.engine.speculative import SpeculativeConfig
    from mainspring.model.checkpoint import load_model, save_model

__version__ = "0.1.0"

_HOMES = {
    "LLM": "mainspring.engine.llm",
    "SamplingParams": "mainspring.engine.sampling_params",
    "StructuredOutputsParams": "mainspring.engine.sampling_params",
    "SpeculativeConfig": "mainspring.engine.speculative",
    "RequestOutput": "mainspring.engine.outputs",
    "CompletionOutput": "mainspring.engine.outputs",
    "load_model": "mainspring.model.checkpoint",
    "save_model": "mainspring.model.checkpoint",
}

__all__ = [
    "LLM",
    "CompletionOutput",
    "RequestOutput",
    "SamplingParams",
    "SpeculativeConfig",
    "StructuredOutputsParams",
    "load_model",
    "save_model",
]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'mainspring' has no attribute {name!r}")
    return getattr(importlib.import_module(home), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
