"""`mainspring tensor`: the C++ framework from the command line; none of it needs PyTorch."""

from __future__ import annotations

import sys
import time
from typing import Annotated

import typer
from rich.console import Console

from mainspring.cli.model_options import Model, Prompt, Raw

tensor = typer.Typer(
    name="tensor", help="The C++ tensor framework: models without PyTorch.", no_args_is_help=True
)


@tensor.callback()
def _group() -> None:
    """The C++ tensor framework: models without PyTorch."""


@tensor.command()
def generate(
    model: Model,
    prompt: Prompt,
    max_tokens: Annotated[int, typer.Option(help="Most tokens to generate.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token every time.")] = 0.0,
    seed: Annotated[int, typer.Option(help="The same seed gives the same text.")] = 0,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "bfloat16",
    raw: Raw = False,
    threads: Annotated[int | None, typer.Option(help="Threads; all processors by default.")] = None,
) -> None:
    """Complete a prompt on the CPU with the C++ framework; the text streams to standard output."""
    import mainspring.tensor as mt
    from mainspring.errors import ConfigError
    from mainspring.formats.named_models import resolve
    from mainspring.formats.tokenizer import IncrementalDecoder, Tokenizer
    from mainspring.tensor.llama import LlamaModel

    if dtype not in ("float32", "bfloat16"):
        raise ConfigError(f"dtype {dtype!r} is not one of float32, bfloat16")
    if threads is not None:
        mt.set_num_threads(threads)
    text = sys.stdin.read() if prompt == "-" else prompt
    console = Console(stderr=True)
    with console.status(f"Loading {model}"):
        path = resolve(model, dtype).path
        tokenizer = Tokenizer.from_directory(path)
        decoder = LlamaModel.from_directory(path, getattr(mt, dtype))
    if not raw and tokenizer.chat_template is not None:
        chat = tokenizer.apply_chat_template([{"role": "user", "content": text}])
        ids = tokenizer.encode(chat, add_special_tokens=False)
    else:
        ids = tokenizer.encode(text)
    pieces = IncrementalDecoder(tokenizer)
    began, count = time.perf_counter(), 0
    try:
        for token in decoder.generate(ids, max_tokens, temperature, mt.Generator(seed)):
            count += 1
            sys.stdout.write(pieces.push(token))
            sys.stdout.flush()
    finally:
        sys.stdout.write(pieces.flush() + "\n")
        sys.stdout.flush()
    seconds = time.perf_counter() - began
    if console.is_terminal:
        console.print(
            f"[dim]{count} tokens in {seconds:.1f} s, {count / seconds:.1f} tokens/s[/]", highlight=False
        )
