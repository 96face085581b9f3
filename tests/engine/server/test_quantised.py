"""`mainspring serve --quantized`: the engine process computes with the GGUF file's blocks."""

from __future__ import annotations

from typing import Any, cast

import pytest

from mainspring.engine.config import EngineConfig
from mainspring.engine.server.assembly import load_message
from mainspring.engine.server.engine_process import load_core
from mainspring.engine.server.protocol import Progress, Ready
from mainspring.engine.server.settings import ServerSettings
from mainspring.errors import ModelNotFoundError
from mainspring.formats.named_models import resolve
from support.cpu_kernels import requires_kernels


class Sent:
    """Takes the messages that would go to the frontend."""

    def __init__(self) -> None:
        self.messages: list[Any] = []

    def send(self, message: Any) -> None:
        self.messages.append(message)


@requires_kernels
def test_the_engine_loads_the_blocks_of_the_file() -> None:
    settings = ServerSettings(model="smollm2", quantized=True, engine=EngineConfig(num_blocks=8))
    message = load_message(settings, resolve("smollm2").path)
    assert message.quantized is not None
    assert message.quantized.endswith(".gguf")
    sent = Sent()
    core = load_core(message, cast(Any, sent))
    assert core.stats().running == 0
    ready = sent.messages[-1]
    assert isinstance(ready, Ready)
    assert all(isinstance(m, Progress) for m in sent.messages[:-1])
    # The whole model counts, not only what is a parameter still.
    assert ready.parameters == 134_515_008


def test_a_model_without_a_file_of_blocks_is_refused() -> None:
    directory = resolve("smollm2").path
    with pytest.raises(ModelNotFoundError, match="read from a GGUF file"):
        load_message(ServerSettings(model=str(directory), quantized=True), directory)
