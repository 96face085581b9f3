"""`mainspring doctor`: what this machine has, and which backend serves each operation, and why."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table


def doctor(
    dtype: Annotated[str, typer.Option(help="Dtype asked about: float32 or bfloat16.")] = "bfloat16",
    numerics: Annotated[str, typer.Option(help="lockstep or fast.")] = "lockstep",
    train: Annotated[bool, typer.Option(help="Ask about calls that record gradients.")] = False,
) -> None:
    """Show the machine, and which backend serves each operation and why."""
    import platform

    import torch

    import mainspring
    from mainspring.errors import ConfigError
    from mainspring.model.initialise import torch_dtype
    from mainspring.ops.attention import ATTENTION
    from mainspring.ops.grouped_linear import GROUPED_LINEAR
    from mainspring.ops.linear import LINEAR
    from mainspring.ops.log_probs import TOKEN_LOG_PROBS
    from mainspring.ops.norm import ADD_RMS_NORM, RMS_NORM
    from mainspring.ops.policy import Policy
    from mainspring.ops.registry import Call, Operation
    from mainspring.ops.rope import ROPE, ROPE_ANGLES
    from mainspring.ops.swiglu import SWIGLU

    if numerics not in ("lockstep", "fast"):
        raise ConfigError(f"numerics {numerics!r} is not one of lockstep, fast")
    policy = Policy("lockstep" if numerics == "lockstep" else "fast")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    out = Console()
    out.print(
        f"mainspring {mainspring.__version__}, Python {platform.python_version()}, torch {torch.__version__}"
    )
    if device == "cuda":
        out.print(f"GPU: {torch.cuda.get_device_name()}")
    out.print(f"CPU: {torch.get_num_threads()} threads, torch uses {torch.backends.cpu.get_cpu_capability()}")
    call = Call(device, torch_dtype(dtype), policy, train)
    table = Table(title=f"{device}, {dtype}, {numerics}{', training' if train else ''}", title_justify="left")
    for column in ("operation", "served by", "refused by"):
        table.add_column(column)
    operations: tuple[Operation[Any, Any], ...] = (
        ATTENTION, LINEAR, GROUPED_LINEAR, RMS_NORM, ADD_RMS_NORM, ROPE_ANGLES, ROPE, SWIGLU, TOKEN_LOG_PROBS,
    )  # fmt: skip
    for operation in operations:
        answers = operation.explain(call)
        serving = next((name for name, reason in answers if reason is None), "nothing")
        refusals = "; ".join(f"{name}: {reason}" for name, reason in answers if reason is not None)
        table.add_row(operation.name, serving, refusals)
    out.print(table)
