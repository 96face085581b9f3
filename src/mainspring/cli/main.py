"""The `mainspring` command. Heavy imports wait until a command needs them, so that `--help` answers at once."""

from __future__ import annotations

import sys
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

import mainspring
from mainspring.cli.bench import bench
from mainspring.cli.diff import diff
from mainspring.cli.doctor import doctor
from mainspring.cli.generate import generate
from mainspring.cli.plan import plan
from mainspring.cli.rag import rag
from mainspring.cli.rl import rl
from mainspring.cli.serve import serve
from mainspring.cli.tensor import tensor
from mainspring.cli.train import train
from mainspring.cli.verify import verify
from mainspring.errors import MainspringError

INTERRUPTED = 130  # 128 + SIGINT, as shells report it

app = typer.Typer(
    name="mainspring",
    help="One stack for language models, from kernel to agent, on one model definition.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(serve)
app.command()(generate)
app.command()(train)
app.command()(plan)
app.command()(verify)
app.command()(diff)
app.command()(doctor)
app.add_typer(bench)
app.add_typer(tensor)
app.add_typer(rag)
app.add_typer(rl)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(mainspring.__version__)
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit."),
    ] = False,
) -> None:
    """One stack for language models, from kernel to agent, on one model definition."""


def main() -> None:
    """Entry point: a user's error is one clear message and exit status 1, Ctrl-C is a quiet 130."""
    try:
        app()
    except MainspringError as error:
        message = f"[bold red]error:[/] {escape(str(error))}"
        Console(stderr=True).print(message, highlight=False, soft_wrap=True)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
