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
) -> None:
    """Train a language model by a recipe. Ctrl-C writes a checkpoint and stops."""
    # GNU OpenMP's threads otherwise spin for milliseconds at every barrier; beside another busy process
    # each then waits for a core that the other's spinning holds. Read when PyTorch is loaded.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    from mainspring.train.recipe_file import load_recipe

    overrides = list(set_ or [])
    if output is not None:
        overrides.append(f"output={str(output)!r}")
    try:
        if resume and restart:
            raise typer.BadParameter("--resume and --restart exclude each other")
        settings = load_recipe(recipe, overrides)
        from mainspring.train.trainer import (
            Trainer,
        )  # after the recipe is known to be good: this loads PyTorch

        result = Trainer(settings, resume=resume, restart=restart).run()
    except MainspringError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error
    if result.interrupted:
        raise typer.Exit(_INTERRUPTED)
