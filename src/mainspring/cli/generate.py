"""`mainspring generate`: one prompt, its completion streamed to the terminal."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from mainspring.cli.layout_options import Ep, Pp, Tp, TpInvariant, layout_of, work_if_worker
from mainspring.cli.model_options import Device, Dtype, Model, Numerics, Prompt, Raw
from mainspring.errors import ConfigError

if TYPE_CHECKING:
    from mainspring.engine.llm import LLM
    from mainspring.engine.sampling_params import SamplingParams


def generate(
    model: Model,
    prompt: Prompt,
    max_tokens: Annotated[int, typer.Option(help="Most tokens to generate.")] = 256,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token every time.")] = 0.7,
    top_p: Annotated[float, typer.Option(help="Keep the likeliest tokens up to this mass.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="Keep that many likeliest tokens; 0 keeps all.")] = 0,
    min_p: Annotated[
        float, typer.Option(help="Keep tokens at least this fraction as likely as the likeliest.")
    ] = 0.0,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same text.")] = None,
    stop: Annotated[
        list[str] | None, typer.Option(help="End the text before this string; may be repeated.")
    ] = None,
    raw: Raw = False,
    system: Annotated[str | None, typer.Option(help="A system message for the chat template.")] = None,
    device: Device = "cpu",
    dtype: Dtype = None,
    numerics: Numerics = "lockstep",
    tp: Tp = 1,
    pp: Pp = 1,
    ep: Ep = 1,
    tp_invariant: TpInvariant = False,
) -> None:
    """Complete a prompt, or answer it where the model has a chat template; the text streams to standard output."""
    from mainspring.engine.llm import LLM
    from mainspring.engine.sampling_params import SamplingParams

    layout = layout_of(tp=tp, pp=pp, ep=ep, tp_invariant=tp_invariant)
    work_if_worker(layout, device)
    if numerics not in ("lockstep", "fast"):
        raise ConfigError(f"numerics {numerics!r} is not one of lockstep, fast")
    params = SamplingParams(
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        seed=seed,
        max_tokens=max_tokens,
        stop=stop,
    )
    text = sys.stdin.read() if prompt == "-" else prompt
    console = Console(stderr=True)
    with console.status(f"Loading {model}"):
        # One stream at a time: the seats of a server would only cost memory.
        llm = LLM(
            model,
            device=device,
            dtype=dtype,
            numerics="lockstep" if numerics == "lockstep" else "fast",
            layout=layout,
            max_num_seqs=1,
        )
    with llm:
        _stream(llm, text, params, console, raw=raw, system=system)


def _stream(
    llm: LLM, text: str, params: SamplingParams, console: Console, *, raw: bool, system: str | None
) -> None:
    has_template = llm.tokenizer is not None and llm.tokenizer.chat_template is not None
    if raw or not has_template:
        if system is not None:
            raise ConfigError("--system needs a model with a chat template, and not --raw")
        outputs = llm.stream(text, params)
    else:
        messages = [{"role": "user", "content": text}]
        if system is not None:
            messages.insert(0, {"role": "system", "content": system})
        outputs = llm.stream_chat(messages, params)
    began = time.perf_counter()
    num_tokens = 0
    try:
        for output in outputs:
            num_tokens += len(output.outputs[0].token_ids)
            sys.stdout.write(output.outputs[0].text)
            sys.stdout.flush()
    finally:
        sys.stdout.write("\n")
        sys.stdout.flush()
    seconds = time.perf_counter() - began
    if console.is_terminal:
        console.print(
            f"[dim]{num_tokens} tokens in {seconds:.1f} s, {num_tokens / seconds:.1f} tokens/s[/]",
            highlight=False,
        )
