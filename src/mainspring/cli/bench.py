"""`mainspring bench`: how fast the engine is, offline or through a server."""

from __future__ import annotations

import asyncio
import json
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console
from rich.table import Table

from mainspring.cli.layout_options import Ep, Pp, Tp, TpInvariant, layout_of, work_if_worker
from mainspring.errors import ConfigError
from mainspring.formats.files import write_file, write_json

if TYPE_CHECKING:
    from mainspring.engine.measure.load import LoadPlan, LoadResult
    from mainspring.engine.throughput import Measurement

bench = typer.Typer(name="bench", help="Measure the offline engine, or any server.", no_args_is_help=True)


@bench.command()
def throughput(
    shape: Annotated[
        str, typer.Argument(help="qwen3-0.6b, llama-3.1-8b, or a config.json; weights are random.")
    ] = "qwen3-0.6b",
    cases: Annotated[
        str,
        typer.Option(help="Comma-separated: mix, mix-1024, one-stream, 8-streams, prefill, first-token."),
    ] = "mix,one-stream,8-streams,prefill,first-token",
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N; empty: a GPU if there is one.")] = "",
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    numerics: Annotated[str, typer.Option(help="lockstep or fast.")] = "lockstep",
    repetitions: Annotated[int, typer.Option(min=1, help="Runs of each case.")] = 3,
    max_model_len: Annotated[int, typer.Option(help="Longest sequence in tokens.")] = 4096,
    max_num_seqs: Annotated[int | None, typer.Option(help="Most requests that run at once.")] = None,
    max_num_batched_tokens: Annotated[int | None, typer.Option(help="Most tokens of a step.")] = None,
    kv_cache_dtype: Annotated[str, typer.Option(help="auto or fp8.")] = "auto",
    cuda_graphs: Annotated[bool, typer.Option(help="Replay decode steps from CUDA graphs.")] = True,
    tp: Tp = 1,
    pp: Pp = 1,
    ep: Ep = 1,
    tp_invariant: TpInvariant = False,
    output: Annotated[Path | None, typer.Option("--json", help="Write the result here.")] = None,
) -> None:
    """Measure the offline engine on random weights: output tokens a second of a mix, of streams, and of prefill."""
    import torch

    from mainspring.engine import throughput as bench
    from mainspring.engine.llm import LLM
    from mainspring.model.initialise import torch_dtype

    names = [name.strip() for name in cases.split(",") if name.strip()]
    known = [*bench.WORKLOADS, bench.FIRST_TOKEN]
    for name in names:
        if name not in known:
            raise ConfigError(f"case {name!r} is not one of {', '.join(known)}")
    if numerics not in ("lockstep", "fast") or kv_cache_dtype not in ("auto", "fp8"):
        raise ConfigError(
            f"numerics is lockstep or fast and kv_cache_dtype auto or fp8, not {numerics!r} and {kv_cache_dtype!r}"
        )
    chosen: Literal["lockstep", "fast"] = "lockstep" if numerics == "lockstep" else "fast"
    place = device or ("cuda" if torch.cuda.is_available() else "cpu")
    layout = layout_of(tp=tp, pp=pp, ep=ep, tp_invariant=tp_invariant)
    if bench.FIRST_TOKEN in names and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(
            "the case first-token starts a process of its own, which is no rank of torchrun's: leave it out of --cases"
        )
    work_if_worker(layout, place)
    console = Console()
    first_token = None
    if bench.FIRST_TOKEN in names:  # before this process takes the GPU's memory
        first_token = bench.seconds_to_first_token(shape, place, chosen, layout)
        console.print(f"first token after {first_token:.1f} s")
    model = bench.random_model(bench.shape_config(shape), place, torch_dtype(dtype), chosen, layout)
    llm = LLM(
        model,
        max_model_len=min(max_model_len, model.config.max_position_embeddings),
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        kv_cache_dtype="fp8" if kv_cache_dtype == "fp8" else "auto",
        cuda_graphs=None if cuda_graphs else False,
    )
    with llm:
        console.print(llm.engine.describe())
        bench.warm_up(llm)
        measurements = []
        for number, name in enumerate(names):
            if name != bench.FIRST_TOKEN:
                workload = bench.WORKLOADS[name]()
                measurements.append(bench.run_workload(llm, workload, repetitions, seed=number))
                console.print(_table(measurements[-1:]))
        result = bench.report(llm, shape, measurements, first_token)
    if output is not None:
        write_json(output, result)
    else:
        console.print_json(json.dumps({k: v for k, v in result.items() if k != "measurements"}))


@bench.command()
def serve(
    url: Annotated[str, typer.Argument(help="Any OpenAI-compatible server, such as http://127.0.0.1:8000.")],
    model: Annotated[
        str | None, typer.Option(help="The model's name there; the first that is served by default.")
    ] = None,
    num_requests: Annotated[int, typer.Option(help="Requests in all.")] = 200,
    request_rate: Annotated[
        float, typer.Option(help="Requests a second, arriving at random; inf sends all at once.")
    ] = math.inf,
    max_concurrency: Annotated[int | None, typer.Option(help="Requests under way at most.")] = None,
    input_tokens: Annotated[str, typer.Option(help="Prompt lengths: least-most.")] = "100-1024",
    output_tokens: Annotated[str, typer.Option(help="Answer lengths: least-most.")] = "100-1024",
    vocab_size: Annotated[
        int | None,
        typer.Option(
            help="Send token ids below it, of exact lengths; by default words, each of about a token."
        ),
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Ask through /v1/chat/completions.")] = False,
    temperature: Annotated[float, typer.Option(help="Sampling temperature.")] = 0.6,
    ignore_eos: Annotated[
        bool, typer.Option(help="Answers of the drawn lengths (a field of vLLM's and ours).")
    ] = True,
    seed: Annotated[int, typer.Option(help="Of lengths, prompts and arrivals.")] = 0,
    api_key: Annotated[
        str | None, typer.Option(envvar="MAINSPRING_API_KEY", help="The server's key.")
    ] = None,
    output: Annotated[Path | None, typer.Option("--json", help="Write the result here.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the latencies into this SVG file.")] = None,
) -> None:
    """Put load on a server: time to first token, inter-token latency, throughput, as its clients see them."""
    from mainspring.engine.measure.latency_plot import latency_svg
    from mainspring.engine.measure.load import LoadPlan

    plan = LoadPlan(
        num_requests=num_requests,
        request_rate=request_rate,
        max_concurrency=max_concurrency,
        input_tokens=_range("input_tokens", input_tokens),
        output_tokens=_range("output_tokens", output_tokens),
        vocab_size=vocab_size,
        chat=chat,
        temperature=temperature,
        ignore_eos=ignore_eos,
        seed=seed,
    )
    if plot is not None and plot.suffix != ".svg":
        raise ConfigError(f"the plot {str(plot)!r} must be an .svg file")
    console = Console()
    with console.status(f"{num_requests} requests to {url}"):
        result = asyncio.run(_load(url, api_key, model, plan))
    console.print(_load_table(result))
    for error, count in result.errors.items():
        console.print(f"{count} failed: {error}", highlight=False, markup=False)
    if output is not None:
        write_json(output, result.to_dict())
    if plot is not None:
        write_file(plot, latency_svg(result).encode())
    if not result.completed:
        raise typer.Exit(1)


async def _load(url: str, api_key: str | None, model: str | None, plan: LoadPlan) -> LoadResult:
    from mainspring.engine.measure.api_client import ApiClient
    from mainspring.engine.measure.load import run_load

    async with ApiClient(url, api_key) as client:
        return await run_load(client, url, model or await client.model(), plan)


def _range(name: str, text: str) -> tuple[int, int]:
    """Two numbers, "100-1024", or one for both."""
    low, _, high = text.partition("-")
    try:
        return int(low), int(high or low)
    except ValueError:
        raise ConfigError(f"{name} is {text!r}, but must be a length or a range such as 100-1024") from None


def _load_table(result: LoadResult) -> Table:
    table = Table(
        "milliseconds", "mean", "p50", "p90", "p95", "p99", "max",
        title=f"{result.completed} requests in {result.seconds:.1f} s, {result.failed} failed",
        caption=(
            f"{result.output_tokens_per_second:,.1f} output tokens/s, {result.total_tokens_per_second:,.1f} tokens/s "
            f"in all, {result.requests_per_second:.2f} requests/s, at most {result.peak_concurrency} at once"
        ),
    )  # fmt: skip
    rows = (
        ("time to first token", result.ttft),
        ("inter-token latency", result.itl),
        ("time per output token", result.tpot),
        ("whole request", result.e2e),
    )
    for name, measured in rows:
        if measured is not None:
            values = (measured.mean, *measured.percentiles.values(), measured.max)
            table.add_row(name, *(f"{value * 1e3:,.1f}" for value in values))
    return table


def _table(measurements: list[Measurement]) -> Table:
    table = Table("case", "requests", "tokens", "unit", "best", "all", "steps")
    for m in measurements:
        rates = m.tokens_per_second
        table.add_row(
            m.name, str(m.num_requests), f"{m.tokens:,}", m.unit, f"{max(rates):,.0f}",
            " ".join(f"{rate:,.0f}" for rate in rates), str(m.steps[-1]),
        )  # fmt: skip
    return table
