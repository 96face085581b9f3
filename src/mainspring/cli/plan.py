"""`mainspring plan`: layouts of a model that fit, with memory and communication by formula."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from mainspring.errors import ConfigError

_UNITS = {
    "": 1,
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
}
_BYTES = {"bfloat16": 2, "float32": 4}


def plan(
    model: Annotated[
        Path, typer.Argument(help="A Hugging Face directory or its config.json; weights are not read.")
    ],
    gpus: Annotated[int, typer.Option(help="How many ranks.", min=1)] = 8,
    memory: Annotated[str, typer.Option(help="Memory of each, as 80GB or 79.6GiB.")] = "80GB",
    micro_batches: Annotated[int, typer.Option(help="Micro-batches of a step, over all ranks.", min=1)] = 32,
    tokens: Annotated[int, typer.Option(help="Tokens of a micro-batch.", min=1)] = 8192,
    sequence_length: Annotated[int, typer.Option(help="Tokens of a document.", min=1)] = 2048,
    dtype: Annotated[str, typer.Option(help="bfloat16 (float32 masters) or float32.")] = "bfloat16",
    per_host: Annotated[
        int, typer.Option(help="GPUs of a host; tensor parallelism stays inside.", min=1)
    ] = 8,
    count: Annotated[int, typer.Option("--show", help="How many layouts to list.", min=1)] = 20,
    timeline: Annotated[
        str | None,
        typer.Option(help="Draw the pipeline of this layout, as pp=4,schedule=zero_bubble, and stop."),
    ] = None,
    svg: Annotated[Path | None, typer.Option(help="Write the timeline's picture there as well.")] = None,
) -> None:
    """List the layouts of MODEL on so many GPUs that fit their memory, the fastest estimate first.

    Memory a rank is of ZeRO's and Megatron's formulas, communication what the busiest rank sends in a step.
    """
    if timeline is not None:
        _draw(timeline, micro_batches, svg)
        return
    from mainspring.formats.model_config import ModelConfig
    from mainspring.formats.named_models import resolve
    from mainspring.train.memory import Batch
    from mainspring.train.plan import plans

    if dtype not in _BYTES:
        raise ConfigError(f"--dtype {dtype}: choose among {', '.join(_BYTES)}")
    source = model if model.exists() else resolve(model, dtype).path
    config = ModelConfig.from_file(source)
    found = plans(
        config,
        gpus,
        parse_bytes(memory),
        Batch(micro_batches, tokens, _BYTES[dtype]),
        sequence_length,
        per_host,
    )
    typer.echo(
        f"{len(found)} layouts of {gpus} ranks fit {memory}; a step of {micro_batches} micro-batches of {tokens} tokens"
    )
    head = (
        "params",
        "grads",
        "optim",
        "activ",
        "head",
        "total GB",
        "bubble",
        "tp",
        "pp",
        "cp",
        "data",
        "ep GB",
    )
    width = max(len(str(p.layout)) for p in found[:count])
    typer.echo("layout".ljust(width) + "".join(name.rjust(9) for name in head))
    for p in found[:count]:
        m, c = p.memory, p.communication
        held = (m.parameters, m.gradients, m.optimizer, m.activations, m.head, m.total)
        cells = [f"{value / 1e9:9.2f}" for value in held] + [f"{p.bubble:9.1%}"]
        cells += [f"{value / 1e9:9.2f}" for value in (c.tp, c.pp, c.cp, c.data, c.ep)]
        typer.echo(str(p.layout).ljust(width) + "".join(cells))


def _draw(text: str, micro_batches: int, svg: Path | None) -> None:
    """A layout's schedule, a backward pass twice as long as a forward one."""
    from mainspring.formats.files import write_file
    from mainspring.parallel.layout import Layout
    from mainspring.parallel.schedule import make_schedule, simulate
    from mainspring.parallel.timeline import draw_svg, draw_text

    layout = Layout.parse(text)
    if micro_batches % layout.dp:
        raise ConfigError(
            f"--timeline {text}: dp {layout.dp} does not divide the {micro_batches} micro-batches"
        )
    schedule = make_schedule(layout.schedule, layout.pp, layout.virtual, micro_batches // layout.dp)
    drawn = simulate(schedule, layout.stages)
    typer.echo(draw_text(drawn))
    if svg is not None:
        write_file(svg, draw_svg(drawn).encode())


def parse_bytes(text: str) -> int:
    """80GB, 79.6GiB, 16000000000. Raises ConfigError for anything else."""
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([a-zA-Z]*)\s*", text)
    if match is None or match[2].upper() not in _UNITS:
        raise ConfigError(f"--memory {text!r}: write a number with a unit, as 80GB or 79.6GiB")
    return int(float(match[1]) * _UNITS[match[2].upper()])
