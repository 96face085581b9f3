"""`mainspring doctor`: what this machine has, and which backend serves each operation, and why."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    import torch

    from mainspring.ops.registry import Call


def doctor(
    dtype: Annotated[str, typer.Option(help="Dtype asked about: float32 or bfloat16.")] = "bfloat16",
    numerics: Annotated[str, typer.Option(help="lockstep or fast.")] = "lockstep",
    train: Annotated[bool, typer.Option(help="Ask about calls that record gradients.")] = False,
    ops: Annotated[
        bool,
        typer.Option("--ops", help="Only the operations, for both numerics, with and without gradients."),
    ] = False,
) -> None:
    """Show the machine, and which backend serves each operation and why."""
    import torch

    from mainspring.errors import ConfigError
    from mainspring.model.initialise import torch_dtype
    from mainspring.ops.policy import Policy
    from mainspring.ops.registry import Call

    if numerics not in ("lockstep", "fast"):
        raise ConfigError(f"numerics {numerics!r} is not one of lockstep, fast")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    out = Console()
    if ops:
        _show_operations(out, device, torch_dtype(dtype), dtype)
        return
    _show_machine(out, device)
    call = Call(device, torch_dtype(dtype), Policy("lockstep" if numerics == "lockstep" else "fast"), train)
    out.print(_reasons(call, f"{device}, {dtype}, {numerics}{', training' if train else ''}"))


def _show_machine(out: Console, device: str) -> None:
    import platform

    import torch

    import mainspring
    from mainspring.ops.cuda.compiler import find_nvcc

    out.print(
        f"mainspring {mainspring.__version__}, Python {platform.python_version()}, torch {torch.__version__}"
    )
    if device == "cuda":
        out.print(f"GPU: {torch.cuda.get_device_name()}; nvcc: {find_nvcc() or 'none'}")
    out.print(f"CPU: {torch.get_num_threads()} threads, torch uses {torch.backends.cpu.get_cpu_capability()}")


def _reasons(call: Call, title: str) -> Table:
    """Who serves one kind of call, and why the others do not."""
    from mainspring.ops.catalogue import operations

    table = Table(title=title, title_justify="left")
    for column in ("operation", "served by", "refused by"):
        table.add_column(column)
    for operation in operations():
        answers = operation.explain(call)
        serving = next((name for name, reason in answers if reason is None), "nothing")
        refusals = "; ".join(f"{name}: {reason}" for name, reason in answers if reason is not None)
        table.add_row(operation.name, serving, refusals)
    return table


def _show_operations(out: Console, device: str, dtype: torch.dtype, name: str) -> None:
    """Who serves each operation in every kind of call; then why those before it in its table do not."""
    from mainspring.ops.catalogue import operations
    from mainspring.ops.policy import FAST, LOCKSTEP
    from mainspring.ops.registry import Call

    table = Table(title=f"{device}, {name}", title_justify="left")
    for column in ("operation", "lockstep", "lockstep, training", "fast", "fast, training"):
        table.add_column(column, overflow="fold")
    reasons: dict[tuple[str, str], list[str]] = {}
    for operation in operations():
        servers: list[str] = []
        for policy in (LOCKSTEP, FAST):
            for train in (False, True):
                answers = operation.explain(Call(device, dtype, policy, train))
                serving = next((i for i, (_, reason) in enumerate(answers) if reason is None), len(answers))
                servers.append(answers[serving][0] if serving < len(answers) else "nothing")
                for backend, reason in answers[:serving]:
                    named = reasons.setdefault((backend, str(reason)), [])
                    if operation.name not in named:
                        named.append(operation.name)
        table.add_row(operation.name, *servers)
    out.print(table)
    for (backend, reason), names in reasons.items():
        out.print(f"[bold]{backend}[/bold] {reason}: {', '.join(names)}", highlight=False)
