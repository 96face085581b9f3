"""The messages between the HTTP frontend and the engine process: typed msgpack, one message a ZeroMQ frame."""

from __future__ import annotations

from typing import Literal, TypeAlias

import msgspec

from mainspring.engine.config import EngineConfig
from mainspring.engine.messages import EngineLimits, EngineRequest, EngineStats, TokenOutput

# Names of the two sockets inside the private directory. Each is bound by the side that reads from it, so
# that the other side's first messages wait in a queue instead of blocking.
TO_ENGINE = "to-engine.sock"
TO_FRONTEND = "to-frontend.sock"


ControlAction: TypeAlias = Literal["pause", "resume", "sleep", "wake", "update_weights"]


class Load(msgspec.Struct, tag="load", frozen=True):
    """First message to the engine: the model and how to run it. Answered by Progress, then Ready or Failed.

    Attributes:
        model: a Hugging Face directory or a GGUF file.
        dtype: "float32" or "bfloat16"; None: the checkpoint's own.
        num_threads: threads of one operation on a CPU; None: PyTorch's choice.
        quantized: a GGUF file whose quantised blocks are the weights, instead of `model`'s.
        layout: over several ranks, as `Layout.parse` reads it; None: in one process.
    """

    model: str
    device: str
    dtype: str | None
    numerics: Literal["lockstep", "fast"]
    config: EngineConfig
    num_threads: int | None
    quantized: str | None = None
    layout: str | None = None


class Submit(msgspec.Struct, tag="submit", frozen=True):
    """Requests to run. Each is answered by Outputs until one has a finish reason, or by one Refused."""

    requests: list[EngineRequest]


class Abort(msgspec.Struct, tag="abort", frozen=True):
    """Requests to drop; unknown ids are ignored. Nothing more comes for them but what is on its way."""

    request_ids: list[str]


class Control(msgspec.Struct, tag="control", frozen=True):
    """Something to do to the engine as a whole, between two steps. Answered by Controlled.

    Attributes:
        action: "pause" and "resume" stop and start the steps; "sleep" also gives the cache's memory back, until
            "wake"; "update_weights" copies new weights into the model.
        path: for "update_weights", a directory of safetensors files.
    """

    control_id: str
    action: ControlAction
    path: str | None = None


class Shutdown(msgspec.Struct, tag="shutdown", frozen=True):
    """The engine is to end now."""


class Progress(msgspec.Struct, tag="progress", frozen=True):
    """What the engine does while it loads, for people to read."""

    message: str


class Ready(msgspec.Struct, tag="ready", frozen=True):
    """The model is loaded and requests are taken. `parameters`: how many the model has."""

    limits: EngineLimits
    stats: EngineStats
    device: str
    dtype: str
    parameters: int


class Outputs(msgspec.Struct, tag="outputs", frozen=True):
    """What one step gave, and the engine's state after it. Also sent, empty, when the state changed without one."""

    outputs: list[TokenOutput]
    stats: EngineStats


class Refused(msgspec.Struct, tag="refused", frozen=True):
    """The engine did not take a request. `kind` is the name of an error of `mainspring.errors`."""

    request_id: str
    kind: str
    message: str
    param: str | None


class Controlled(msgspec.Struct, tag="controlled", frozen=True):
    """What came of a Control.

    Attributes:
        paused, sleeping: the engine's state after it.
        checksum: of all weights after "update_weights".
        kind, message: set if it could not be done; `kind` is the name of an error of `mainspring.errors`.
    """

    control_id: str
    paused: bool
    sleeping: bool
    checksum: str | None = None
    kind: str | None = None
    message: str = ""


class Failed(msgspec.Struct, tag="failed", frozen=True):
    """The engine ends because of an error. `kind` is the error's class name."""

    kind: str
    message: str


ToEngine: TypeAlias = Load | Submit | Abort | Control | Shutdown
FromEngine: TypeAlias = Progress | Ready | Outputs | Refused | Controlled | Failed

_ENCODER = msgspec.msgpack.Encoder()
_TO_ENGINE: msgspec.msgpack.Decoder[ToEngine] = msgspec.msgpack.Decoder(ToEngine)
_FROM_ENGINE: msgspec.msgpack.Decoder[FromEngine] = msgspec.msgpack.Decoder(FromEngine)


def encode(message: ToEngine | FromEngine) -> bytes:
    """One message as bytes."""
    return _ENCODER.encode(message)


def decode_to_engine(data: bytes) -> ToEngine:
    """A message that the frontend sent. Raises msgspec.DecodeError if it is none."""
    return _TO_ENGINE.decode(data)


def decode_from_engine(data: bytes) -> FromEngine:
    """A message that the engine sent. Raises msgspec.DecodeError if it is none."""
    return _FROM_ENGINE.decode(data)
