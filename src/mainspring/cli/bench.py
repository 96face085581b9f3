"""`mainspring bench`: how fast the engine is, offline or through a server."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console
from rich.table import Table

from mainspring.errors import ConfigError
from mainspring.formats.files import write_json

if TYPE_CHECKING:
    from mainspring.engine.throughput import Measurement

bench = typer.Typer(name="bench", help="Measure the engine.", no_args_is_help=True)


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
    console = Console()
    first_token = None
    if bench.FIRST_TOKEN in names:  # before this process takes the GPU's memory
        first_token = bench.seconds_to_first_token(shape, place, chosen)
        console.print(f"first token after {first_token:.1f} s")
    model = bench.random_model(bench.shape_config(shape), place, torch_dtype(dtype), chosen)
    llm = LLM(
        model,
        max_model_len=min(max_model_len, model.config.max_position_embeddings),
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        kv_cache_dtype="fp8" if kv_cache_dtype == "fp8" else "auto",
        cuda_graphs=None if cuda_graphs else False,
    )
    console.print(llm.engine.describe())
    bench.warm_up(llm)
    measurements = []
    for number, name in enumerate(names):
        if name != bench.FIRST_TOKEN:
            measurements.append(bench.run_workload(llm, bench.WORKLOADS[name](), repetitions, seed=number))
            console.print(_table(measurements[-1:]))
    result = bench.report(llm, shape, measurements, first_token)
    if output is not None:
        write_json(output, result)
    else:
        console.print_json(json.dumps({k: v for k, v in result.items() if k != "measurements"}))


def _table(measurements: list[Measurement]) -> Table:
    table = Table("case", "requests", "tokens", "unit", "best", "all", "steps")
    for m in measurements:
        rates = m.tokens_per_second
        table.add_row(
            m.name, str(m.num_requests), f"{m.tokens:,}", m.unit, f"{max(rates):,.0f}",
            " ".join(f"{rate:,.0f}" for rate in rates), str(m.steps[-1]),
        )  # fmt: skip
    return table
