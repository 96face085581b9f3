"""`mainspring diff`: the log-probabilities of a server's tokens against ours."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mainspring.cli.model_options import Device, Dtype, Model, Numerics
from mainspring.cli.serve import one_of
from mainspring.errors import ConfigError

if TYPE_CHECKING:
    from mainspring.engine.measure.mismatch import Divergence, Mismatch, ServedText
    from mainspring.formats.tokenizer import Tokenizer

PROMPTS = (
    "The mainspring of a mechanical watch is",
    "Write a short story about a lighthouse keeper who",
    "def quicksort(items):\n",
    "The three laws of thermodynamics are",
    "In 1969, the first people on the Moon",
    "Question: What is 17 times 23? Answer:",
    "Dear Sir or Madam,\n\nI am writing to",
    "El veloz murciélago hindú comía feliz",
)


def diff(
    model: Model,
    url: Annotated[str, typer.Option(help="Any OpenAI-compatible server that serves this model.")],
    served_model_name: Annotated[
        str | None, typer.Option(help="The model's name there; the first that is served by default.")
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="A file with a prompt a line; eight built-in ones by default.")
    ] = None,
    max_tokens: Annotated[
        int, typer.Option(min=1, help="Tokens that the server writes to each prompt.")
    ] = 64,
    temperature: Annotated[float, typer.Option(help="The server samples at this temperature.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the server's sampling.")] = 0,
    tolerance: Annotated[float, typer.Option(min=0.0, help="Gaps above it, in nats, diverge.")] = 1e-3,
    api_key: Annotated[
        str | None, typer.Option(envvar="MAINSPRING_API_KEY", help="The server's key.")
    ] = None,
    device: Device = "cpu",
    dtype: Dtype = None,
    numerics: Numerics = "lockstep",
    output: Annotated[Path | None, typer.Option("--json", help="Write the result here.")] = None,
    fail_above: Annotated[
        float | None, typer.Option(min=0.0, help="Exit with status 1 if the largest gap is above this.")
    ] = None,
) -> None:
    """Let a server write, score its tokens with this model, and report where their log-probabilities differ."""
    from mainspring.engine.measure.mismatch import compare
    from mainspring.formats.files import write_json
    from mainspring.formats.named_models import resolve
    from mainspring.formats.tokenizer import Tokenizer
    from mainspring.model.checkpoint import load_model

    chosen: Literal["lockstep", "fast"] = one_of("numerics", numerics, ("lockstep", "fast"))
    texts = _read_prompts(prompts)
    console = Console()
    directory = resolve(model, dtype if dtype is not None else "bfloat16").path
    tokenizer = Tokenizer.from_directory(directory)
    with console.status(f"Asking {url}"):
        name, served = asyncio.run(
            _ask(url, api_key, served_model_name, tokenizer, texts, max_tokens, temperature, seed)
        )
    with console.status(f"Scoring with {model}"):
        loaded = load_model(directory, device=device, dtype=dtype, numerics=chosen)
        result = compare(loaded, name, tokenizer, served, tolerance=tolerance)
    _show(console, result)
    if output is not None:
        write_json(output, result.to_dict())
    if fail_above is not None and result.max_abs > fail_above:
        console.print(f"[bold red]The largest gap, {result.max_abs:.3g}, is above {fail_above:g}.[/]")
        raise typer.Exit(1)


def _read_prompts(path: Path | None) -> list[str]:
    if path is None:
        return list(PROMPTS)
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"The prompts {str(path)!r} cannot be read: {error}") from error
    if not lines:
        raise ConfigError(f"{path} holds no prompt; write one a line")
    return lines


async def _ask(
    url: str,
    api_key: str | None,
    name: str | None,
    tokenizer: Tokenizer,
    prompts: list[str],
    max_tokens: int,
    temperature: float,
    seed: int,
) -> tuple[str, list[ServedText | None]]:
    from mainspring.engine.measure.api_client import ApiClient
    from mainspring.engine.measure.mismatch import ask_server

    async with ApiClient(url, api_key) as client:
        served = name or await client.model()
        encoded = [tokenizer.encode(prompt) for prompt in prompts]
        texts = await ask_server(
            client, served, tokenizer, encoded, max_tokens=max_tokens, temperature=temperature, seed=seed
        )
    return served, texts


def _show(console: Console, result: Mismatch) -> None:
    """The gaps as a table, and the tokens that matter."""
    table = Table(
        "gap |server - ours|, nats", "tokens", "share", title=f"{escape(result.model)} against ours"
    )
    for name, count in result.histogram.items():
        table.add_row(name, f"{count:,}", f"{count / result.tokens:.1%}")
    console.print(table)
    percentiles = ", ".join(f"{name} {value:.3g}" for name, value in result.percentiles.items())
    console.print(
        f"{result.tokens:,} tokens of {result.prompts} prompts; {result.exact:,} equal to the last bit\n"
        f"mean |gap| {result.mean_abs:.3g}, {percentiles}, max {result.max_abs:.3g}\n"
        f"KL(server || ours): {result.mean:.3g} (mean gap), {result.k3:.3g} (k3)",
        highlight=False,
    )
    if result.skipped:
        console.print(f"{result.skipped} texts left out: their token ids are not known", highlight=False)
    if result.first is None:
        console.print(f"[green]No token diverges by more than {result.tolerance:g}.[/]", highlight=False)
    else:
        console.print(
            f"{result.diverging:,} tokens diverge by more than {result.tolerance:g}", highlight=False
        )
        _show_token(console, "first", result.first)
    if result.largest is not None:
        _show_token(console, "largest", result.largest)


def _show_token(console: Console, kind: str, item: Divergence) -> None:
    console.print(
        f"  {kind}: prompt {item.prompt}, token {item.position} ({item.token!r}, id {item.token_id}): "
        f"server {item.server:.6f}, ours {item.ours:.6f}, gap {item.gap:+.3g}",
        highlight=False,
        markup=False,
    )
