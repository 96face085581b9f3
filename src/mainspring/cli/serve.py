"""`mainspring serve`: the OpenAI-compatible server with its console, and what the terminal shows of it."""

from __future__ import annotations

import json
import os
import shlex
import time
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TaskProgressColumn, TextColumn
from rich.table import Table

from mainspring.cli.layout_options import Ep, Pp, Tp, TpInvariant, layout_of, work_if_worker
from mainspring.cli.model_options import Device, Dtype, Model, Numerics
from mainspring.errors import ConfigError

if TYPE_CHECKING:
    from mainspring.engine.server.protocol import Ready
    from mainspring.engine.speculative import SpeculativeConfig

Choice = TypeVar("Choice", bound=str)


def serve(
    model: Model,
    host: Annotated[
        str, typer.Option(help="Address to listen on; 0.0.0.0 lets other machines in.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0 takes a free one.")] = 8000,
    served_model_name: Annotated[str | None, typer.Option(help="The model's name in the API.")] = None,
    device: Device = "cpu",
    dtype: Dtype = None,
    numerics: Numerics = "lockstep",
    quantized: Annotated[
        bool, typer.Option(help="Keep the weights of a GGUF file quantised: less memory, faster on a CPU.")
    ] = False,
    tp: Tp = 1,
    pp: Pp = 1,
    ep: Ep = 1,
    tp_invariant: TpInvariant = False,
    max_model_len: Annotated[
        int | None, typer.Option(help="Longest sequence in tokens, prompt and answer together.")
    ] = None,
    max_num_seqs: Annotated[
        int | None,
        typer.Option(
            help="Most requests that run at once; 64 on a CPU, 256 to 1,024 on a GPU, by its cache."
        ),
    ] = None,
    max_num_batched_tokens: Annotated[
        int | None, typer.Option(help="Most tokens in one forward pass.")
    ] = None,
    kv_cache_mb: Annotated[
        int | None, typer.Option(help="Memory for the KV cache in MiB; a share of the free one by default.")
    ] = None,
    prefix_caching: Annotated[
        bool, typer.Option(help="Keep the keys and values of equal beginnings and share them.")
    ] = True,
    kv_cache_dtype: Annotated[
        str, typer.Option(help="auto (the model's) or fp8, which holds twice the tokens (GPU).")
    ] = "auto",
    scheduling_policy: Annotated[
        str, typer.Option(help="fcfs, in order of arrival, or priority, by the requests' priority first.")
    ] = "fcfs",
    lora: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME=DIRECTORY of a LoRA adapter, chosen by requests as their model; may be repeated."
        ),
    ] = None,
    speculative: Annotated[
        str | None,
        typer.Option(
            help="Guess tokens and verify several in a step: ngram, or a draft model's name or directory."
        ),
    ] = None,
    speculative_tokens: Annotated[int, typer.Option(help="Most tokens guessed at once.")] = 4,
    threads: Annotated[int | None, typer.Option(help="CPU threads of one operation.")] = None,
    max_body_mb: Annotated[float, typer.Option(help="Largest request body in MiB.")] = 16.0,
    drain_seconds: Annotated[
        float, typer.Option(help="How long running requests may go on after SIGTERM or Ctrl-C.")
    ] = 30.0,
    pooling: Annotated[str, typer.Option(help="Pooling of embeddings: mean or last.")] = "mean",
    max_choices: Annotated[int, typer.Option(help="Largest n of a request.")] = 128,
    chat_template: Annotated[
        str | None, typer.Option(help="A file with a Jinja chat template, instead of the model's own.")
    ] = None,
    template_seconds: Annotated[
        float, typer.Option(help="How long the chat template may take for one conversation.")
    ] = 5.0,
    tool_parser: Annotated[
        str,
        typer.Option(
            help="Format of tool calls: auto (by the template), none, hermes, llama3_json, pythonic, qwen3_coder, glm45"
        ),
    ] = "auto",
    reasoning_parser: Annotated[
        str, typer.Option(help="think separates <think>...</think>; auto (by the template) or none.")
    ] = "auto",
    api_key: Annotated[
        list[str] | None,
        typer.Option(envvar="MAINSPRING_API_KEY", help="A key that opens the API; may be repeated."),
    ] = None,
    admin_key: Annotated[
        list[str] | None,
        typer.Option(
            envvar="MAINSPRING_ADMIN_KEY", help="A key that opens /pause, /sleep, /update_weights ..."
        ),
    ] = None,
    restart: Annotated[
        int, typer.Option(help="How often the engine process is started again after it has died.")
    ] = 0,
    ray: Annotated[
        bool, typer.Option("--ray", help="Run replicas under Ray Serve, on several GPUs or machines.")
    ] = False,
    replicas: Annotated[int, typer.Option(help="Replicas under --ray.")] = 1,
    ray_address: Annotated[
        str | None,
        typer.Option(help="A running Ray cluster, or auto; by default Ray starts on this machine only."),
    ] = None,
    allowed_host: Annotated[
        list[str] | None, typer.Option(help="Another name that a Host header may have; may be repeated.")
    ] = None,
) -> None:
    """Serve a model: OpenAI's API under /v1 and a console at /, on this machine only unless told otherwise."""
    from mainspring.console.mount import console_files, mount_console
    from mainspring.engine.config import EngineConfig
    from mainspring.engine.server.serve import run_server
    from mainspring.engine.server.settings import ServerSettings

    layout = layout_of(tp=tp, pp=pp, ep=ep, tp_invariant=tp_invariant)
    if restart and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(
            "--restart does not go with torchrun, which starts its ranks again (--max-restarts)"
        )
    work_if_worker(layout, device)
    settings = ServerSettings(
        model=model,
        host=host,
        port=port,
        served_model_name=served_model_name,
        device=device,
        dtype=dtype,
        numerics=one_of("numerics", numerics, ("lockstep", "fast")),
        quantized=quantized,
        engine=EngineConfig(
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            max_model_len=max_model_len,
            enable_prefix_caching=prefix_caching,
            kv_cache_dtype=one_of("kv_cache_dtype", kv_cache_dtype, ("auto", "fp8")),
            scheduling_policy=one_of("scheduling_policy", scheduling_policy, ("fcfs", "priority")),
            lora_adapters=_adapters(lora or []),
            speculative=_speculative(speculative, speculative_tokens),
            kv_cache_bytes=None if kv_cache_mb is None else kv_cache_mb * 2**20,
        ),
        layout=layout,
        num_threads=threads,
        max_body_bytes=round(max_body_mb * 2**20),
        drain_seconds=drain_seconds,
        pooling=one_of("pooling", pooling, ("mean", "last")),
        max_choices=max_choices,
        template_seconds=template_seconds,
        chat_template=chat_template,
        tool_parser=tool_parser,
        reasoning_parser=reasoning_parser,
        api_keys=tuple(api_key or ()),
        admin_keys=tuple(admin_key or ()),
        open_paths=console_files(),
        max_restarts=restart,
        allowed_hosts=tuple(allowed_host or ()),
    )
    if not ray and (replicas != 1 or ray_address is not None):
        raise ConfigError("--replicas and --ray-address belong to --ray")
    with TerminalReporter(Console()) as reporter:
        if ray:
            from mainspring.engine.server.ray_replicas import run_replicas

            status = run_replicas(settings, reporter, replicas, ray_address, extend=mount_console)
        else:
            status = run_server(settings, reporter, extend=mount_console)
    raise typer.Exit(status)


def one_of(name: str, value: str, allowed: tuple[Choice, ...]) -> Choice:
    """The value, if it is one of these. Raises ConfigError."""
    for known in allowed:
        if value == known:
            return known
    raise ConfigError(f"{name} {value!r} is not one of {', '.join(allowed)}")


def _adapters(given: list[str]) -> dict[str, str] | None:
    """Adapters by name. Raises ConfigError."""
    adapters: dict[str, str] = {}
    for item in given:
        name, equals, directory = item.partition("=")
        if not (name and equals and directory) or name in adapters:
            raise ConfigError(f"--lora {item!r} must be NAME=DIRECTORY, each name once")
        adapters[name] = directory
    return adapters or None


def _speculative(method: str | None, num_tokens: int) -> SpeculativeConfig | None:
    from mainspring.engine.speculative import SpeculativeConfig

    if method is None:
        return None
    if method == "ngram":
        return SpeculativeConfig(num_speculative_tokens=num_tokens)
    return SpeculativeConfig(num_speculative_tokens=num_tokens, method="draft_model", model=method)


class TerminalReporter:
    """Shows the steps of the start with a spinner, or a bar where the length is known, then the addresses."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._began = time.monotonic()
        self._step_began = self._began
        self._message: str | None = None
        self._task: TaskID | None = None
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TaskProgressColumn(),
            console=console,
            transient=True,
        )

    def __enter__(self) -> TerminalReporter:
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    def step(self, message: str) -> None:
        """A new step has begun, so the one before is done."""
        self._finish_step()
        self._message = message
        self._step_began = time.monotonic()
        self._task = self._progress.add_task(message, total=None)

    def progress(self, done: int, total: int) -> None:
        """The present step is that far."""
        if self._task is not None:
            self._progress.update(self._task, completed=done, total=total)

    def ready(self, url: str, model_name: str, ready: Ready, chats: bool) -> None:
        """The server takes requests."""
        self._finish_step()
        self._progress.stop()
        limits, stats = ready.limits, ready.stats
        room = stats.kv_blocks_total * stats.block_size
        self._console.print(
            f"\n[bold]{escape(model_name)}[/] is ready after {time.monotonic() - self._began:.1f} s: "
            f"{ready.parameters / 1e6:,.1f}M parameters in {ready.dtype} on {ready.device}, "
            f"context {limits.max_model_len:,} tokens, room for {room:,} in the cache.\n",
            highlight=False,
        )
        addresses = Table.grid(padding=(0, 2))
        addresses.add_row("Console", f"[bold cyan]{url}/[/]")
        addresses.add_row("API", f"{url}/v1")
        self._console.print(addresses)
        # Printed as it is: a wrapped or coloured command line would not survive being copied.
        self._console.print(
            f"\n{curl_line(url, model_name, chats)}\n", highlight=False, markup=False, soft_wrap=True
        )
        self._console.print("[dim]Ctrl-C finishes running requests and stops; twice stops at once.[/]")

    def note(self, message: str) -> None:
        """Something happened after the start."""
        self._console.print(message, highlight=False, markup=False)

    def _finish_step(self) -> None:
        if self._task is None or self._message is None:
            return
        self._progress.remove_task(self._task)
        seconds = time.monotonic() - self._step_began
        self._console.print(f"[green]✓[/] {escape(self._message)} [dim]{seconds:.1f} s[/]", highlight=False)
        self._task = self._message = None


def curl_line(url: str, model_name: str, chats: bool) -> str:
    """A command that asks the server something, to be pasted into a shell; a model that cannot chat continues."""
    greeting = {"messages": [{"role": "user", "content": "Hello! Who are you?"}]}
    body = json.dumps({"model": model_name, **(greeting if chats else {"prompt": "Once upon a time"})})
    route = "chat/completions" if chats else "completions"
    return f"curl {url}/v1/{route} -H 'Content-Type: application/json' -d {shlex.quote(body)}"
