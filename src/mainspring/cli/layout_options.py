"""The options by which `serve`, `generate` and `bench throughput` spread one model over several processes."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from mainspring.errors import ConfigError

Tp = Annotated[int, typer.Option(help="Tensor-parallel ranks: each layer is shared.")]
Pp = Annotated[int, typer.Option(help="Pipeline-parallel ranks: each has some of the layers.")]
Ep = Annotated[int, typer.Option(help="Expert-parallel ranks: each has some of the experts.")]
TpInvariant = Annotated[
    bool, typer.Option("--tp-invariant", help="The same bits at every tensor-parallel degree.")
]


def layout_of(*, tp: int, pp: int, ep: int, tp_invariant: bool) -> str | None:
    """As `Layout.parse` reads it; None for one process. Raises ConfigError. (Without PyTorch: it is checked against
    the model by the engine.)"""
    degrees = {"tp": tp, "pp": pp, "ep": ep}
    for name, degree in degrees.items():
        if degree < 1:
            raise ConfigError(f"--{name} is {degree}, but must be at least 1")
    degrees["dp"] = ep  # experts are spread over copies of all the rest
    parts = [f"{name}={degree}" for name, degree in degrees.items() if degree > 1]
    if tp_invariant:
        parts.append("tp_invariant=true")
    return ",".join(parts) or None


def work_if_worker(layout: str | None, device: str) -> None:
    """Where torchrun has started this process as another rank than the first, does that rank's work and exits.

    Raises ConfigError: torchrun has started several, but no layout says how they share the model.
    """
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started == 1:
        return
    if layout is None:
        raise ConfigError(
            f"torchrun has started {started} ranks; say how they share the model (--tp {started})"
        )
    if int(os.environ["RANK"]) > 0:
        from mainspring.engine.ranks.worker import work

        work("cuda" if device.startswith("cuda") else device)
        raise typer.Exit(0)
