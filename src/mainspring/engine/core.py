"""The engine: token ids in, token ids out, one `step()` at a time. It knows no text."""

from __future__ import annotations

from mainspring.engine.messages import EngineLimits, EngineRequest, EngineStats, TokenLogprobs, TokenOutput

__all__ = ["EngineLimits", "EngineRequest", "EngineStats", "TokenLogprobs", "TokenOutput"]
