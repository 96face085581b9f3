"""`mainspring rl RECIPE.toml`: post-training by a recipe; `mainspring rl view RUN`: page through what was written."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

_INTERRUPTED = 130  # what a shell reports after Ctrl-C


class _TrainsByDefault(TyperGroup):
    """`mainspring rl RECIPE` is `mainspring rl train RECIPE`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and not args[0].startswith("-") and args[0] not in self.commands:
            args = ["train", *args]
        rest: list[str] = super().parse_args(ctx, args)
        return rest


rl = typer.Typer(
    name="rl",
    cls=_TrainsByDefault,
    no_args_is_help=True,
    help="Post-training: SFT, DPO, reward models, GRPO and its relatives, PPO, VC-PPO, VAPO.",
)


@rl.command()
def train(
    recipe: Annotated[Path, typer.Argument(help="A TOML recipe, for example recipes/grpo_sums.toml.")],
    output: Annotated[Path | None, typer.Option(help="Directory of checkpoints and metrics.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the newest checkpoint.")] = False,
    restart: Annotated[bool, typer.Option("--restart", help="Delete a former run's checkpoints.")] = False,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change a setting: --set grpo.max_steps=100."),
    ] = None,
    zero: Annotated[
        int | None, typer.Option(help="ZeRO stage of the ranks that torchrun has started, 0 to 3.")
    ] = None,
) -> None:
    """Train by a recipe (the word `train` may be left out). Ctrl-C writes a checkpoint and stops.

    All that learn from rollouts on several ranks: torchrun --nproc-per-node 2 -m mainspring rl RECIPE --zero 3.
    """
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as in `mainspring train`; read when PyTorch is loaded
    if resume and restart:
        raise typer.BadParameter("--resume and --restart exclude each other")
    from mainspring.rl.recipe import load_rl_recipe

    overrides = list(set_ or [])
    if output is not None:
        overrides.append(f"output={str(output)!r}")
    if zero is not None:
        overrides.append(f"parallel.zero={zero}")
    settings = load_rl_recipe(recipe, overrides)
    from mainspring.parallel.launch import joined
    from mainspring.rl.run import RlRun
    from mainspring.train.checkpoint import checkpoints
    from mainspring.train.make_runner import Ranks

    with joined(settings.model.device):
        # torchrun --max-restarts starts the same command anew when a rank has died: then it continues.
        if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0 and not resume:
            resume, restart = bool(checkpoints(Path(settings.output).expanduser())), False
        result = RlRun(settings, resume=resume, restart=restart, ranks=Ranks.present()).run()
    if result.interrupted:
        raise typer.Exit(_INTERRUPTED)


@rl.command()
def view(
    run: Annotated[Path, typer.Argument(help="A run's directory, or its rollouts.jsonl.")],
    step: Annotated[int | None, typer.Option(help="Only groups of this step.")] = None,
    mixed: Annotated[bool, typer.Option("--mixed", help="Only groups whose rewards differ.")] = False,
    pager: Annotated[
        bool, typer.Option(help="Page through them; without a terminal all are printed.")
    ] = True,
) -> None:
    """Show every group of a run: the prompt, its answers, their rewards and advantages."""
    from rich.console import Console

    from mainspring.cli.rollout_pages import group_page, read_groups

    console = Console(highlight=False)
    pages = (group_page(record) for record in read_groups(run, step, mixed))
    if pager and console.is_terminal:
        with console.pager(styles=True):
            for page in pages:
                console.print(page)
        return
    for page in pages:
        console.print(page)
