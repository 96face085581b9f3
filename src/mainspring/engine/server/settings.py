"""What a server is to do."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal, get_args

from mainspring.engine.config import EngineConfig
from mainspring.engine.messages import Pooling
from mainspring.engine.sampling_params import MAX_N
from mainspring.engine.server.tool_calls.formats import check_names
from mainspring.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    """What `run_server` is to do.

    Attributes:
        model: a Hugging Face directory, a GGUF file, or a known name.
        port: 0 takes a free one.
        served_model_name: the name in the API; None: the model's own.
        dtype: "float32" or "bfloat16"; None: the checkpoint's own.
        quantized: keep the weights of a GGUF file quantised (on the CPU).
        layout: of the ranks that share the model, as `tp=2,pp=2`; None: one process.
        num_threads: threads of one operation on a CPU; None: PyTorch's choice.
        max_body_bytes: largest request body.
        drain_seconds: how long running requests may go on after SIGTERM.
        pooling: of embeddings, unless a request says otherwise: "mean" or "last".
        max_choices: largest `n` of a request.
        template_seconds: how long the chat template may take for one conversation.
        chat_template: a file with a Jinja template to use instead of the model's own.
        tool_parser: the format of the model's calls: "auto" (by its chat template), "none", or one of TOOL_FORMATS.
        reasoning_parser: "think", "none", or "auto" (by its chat template).
        api_keys: any of these opens the API; without one it is open.
        admin_keys: any of these opens the routes of administration; without one they are closed.
        open_paths: paths that need no key: files of a page that asks for it.
        max_restarts: how often the engine process is started again after it has died.
        allowed_hosts: names that a Host header may have besides the loopback ones. The header is checked
            when the server listens on a loopback address only, or when names are given.

    Raises:
        ConfigError: a value is out of range.
    """

    model: str
    host: str = "127.0.0.1"
    port: int = 8000
    served_model_name: str | None = None
    device: str = "cpu"
    dtype: str | None = None
    numerics: Literal["lockstep", "fast"] = "lockstep"
    quantized: bool = False
    engine: EngineConfig = field(default_factory=EngineConfig)
    layout: str | None = None
    num_threads: int | None = None
    max_body_bytes: int = 16 * 2**20
    drain_seconds: float = 30.0
    pooling: Pooling = "mean"
    max_choices: int = 128
    template_seconds: float = 5.0
    chat_template: str | None = None
    tool_parser: str = "auto"
    reasoning_parser: str = "auto"
    api_keys: tuple[str, ...] = ()
    admin_keys: tuple[str, ...] = ()
    open_paths: frozenset[str] = frozenset()
    max_restarts: int = 0
    allowed_hosts: tuple[str, ...] = ()

    @property
    def num_ranks(self) -> int:
        """Processes that share the model, each with a device."""
        degrees = dict(part.split("=") for part in (self.layout or "").split(",") if part)
        return math.prod(int(degrees.get(name, 1)) for name in ("tp", "pp", "dp"))

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"port is {self.port}, but must be between 0 and 65535")
        if self.num_threads is not None and self.num_threads < 1:
            raise ConfigError(f"num_threads is {self.num_threads}, but must be at least 1")
        if self.max_body_bytes < 1:
            raise ConfigError(f"max_body_bytes is {self.max_body_bytes}, but must be at least 1")
        if not 0 <= self.drain_seconds < float("inf"):
            raise ConfigError(f"drain_seconds is {self.drain_seconds}, but must be a number of at least 0")
        if not 1 <= self.max_choices <= MAX_N:
            raise ConfigError(f"max_choices is {self.max_choices}, but must be between 1 and {MAX_N}")
        if not 0 < self.template_seconds < float("inf"):
            raise ConfigError(f"template_seconds is {self.template_seconds}, but must be a number above 0")
        if self.pooling not in get_args(Pooling):
            raise ConfigError(f"pooling is {self.pooling!r}, but must be mean or last")
        if self.layout is not None and self.quantized:
            raise ConfigError(
                f"layout {self.layout} was given beside quantised weights, which cannot be cut over ranks; give one of "
                "them"
            )
        check_names(self.tool_parser, self.reasoning_parser)
        if self.max_restarts < 0:
            raise ConfigError(f"max_restarts is {self.max_restarts}, but must be at least 0")
        if not all((*self.api_keys, *self.admin_keys)):
            raise ConfigError("an empty key was given, which everybody knows; give another or none")
