"""`mainspring train RECIPE.toml`: from text files to a checkpoint."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from mainspring.errors import MainspringError

_INTERRUPTED = 130  # what a shell reports after Ctrl-C


def train(
    recipe: Annotated[Path, typer.Argument(help="A TOML recipe, for example recipes/shakespeare.toml.")],
    output: Annotated[Path | None, typer.Option(help="Directory of checkpoints and metrics.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the newest checkpoint.")] = False,
    restart: Annotated[bool, typer.Option("--restart", help="Delete a former run's checkpoints.")] = False,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change a setting: --set training.max_steps=100."),
    ] = None,
    pp: Annotated[int | None, typer.Option(help="Pipeline-parallel degree.")] = None,
    dp: Annotated[
        int | None, typer.Option(help="Data-parallel degree; by default what the others leave.")
    ] = None,
    cp: Annotated[int | None, typer.Option(help="Context-parallel degree.")] = None,
    tp: Annotated[int | None, typer.Option(help="Tensor-parallel degree.")] = None,
    ep: Annotated[int | None, typer.Option(help="Expert-parallel degree, inside dp and cp.")] = None,
    zero: Annotated[int | None, typer.Option(help="ZeRO stage, 0 to 3.")] = None,
) -> None:
    """Train a language model by a recipe. Ctrl-C writes a checkpoint and stops.

    On several ranks: torchrun --nproc-per-node 4 -m mainspring train RECIPE --tp 2 --zero 1. Every key of the recipe's
    table `parallel` can be --set.
    """
    # GNU OpenMP's threads otherwise spin for milliseconds at every barrier; beside another busy process
    # each then waits for a core that the other's spinning holds. Read when PyTorch is loaded.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    from mainspring.train.recipe_file import load_recipe

    overrides = list(set_ or [])
    degrees = {"pp": pp, "dp": dp, "cp": cp, "tp": tp, "ep": ep, "zero": zero}
    overrides += [f"parallel.{name}={value}" for name, value in degrees.items() if value is not None]
    if output is not None:
        overrides.append(f"output={str(output)!r}")
    try:
        if resume and restart:
            raise typer.BadParameter("--resume and --restart exclude each other")
        settings = load_recipe(recipe, overrides)
        # After the recipe is known to be good: this loads PyTorch.
        from mainspring.parallel.launch import joined
        from mainspring.train.checkpoint import checkpoints
        from mainspring.train.make_runner import Ranks
        from mainspring.train.trainer import Trainer

        with joined(settings.training.device, in_order=settings.parallel.tp > 1):
            # torchrun --max-restarts starts the same command anew when a rank has died: then it continues.
            died = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
            if died and not resume:
                resume, restart = bool(checkpoints(Path(settings.output).expanduser())), False
            result = Trainer(settings, resume=resume, restart=restart, ranks=Ranks.present()).run()
    except MainspringError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error
    if result.interrupted:
        raise typer.Exit(_INTERRUPTED)
