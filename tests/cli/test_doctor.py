"""`mainspring doctor` names every operation of the source, and who serves it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import mainspring.ops
from mainspring.cli.main import app
from mainspring.ops.catalogue import operations
from mainspring.ops.policy import FAST, LOCKSTEP

SOURCE = Path(mainspring.ops.__path__[0])


def test_every_operation_of_the_source_is_found() -> None:
    written = {
        name
        for path in SOURCE.glob("*.py")
        for name in re.findall(r"= Operation\(\s*\"(\w+)\"", path.read_text())
    }
    assert {o.name for o in operations()} == written
    assert "flash_attention" in written


def test_it_shows_who_serves_each_operation() -> None:
    runner = CliRunner(env={"COLUMNS": "300"})
    for arguments in (
        ["doctor"],
        ["doctor", "--ops"],
        ["doctor", "--dtype", "float32", "--numerics", "fast", "--train"],
    ):
        done = runner.invoke(app, arguments)
        assert done.exit_code == 0, done.output
        for operation in operations():
            assert operation.name in done.output
    assert "runs on CUDA devices, not on cpu" in runner.invoke(app, ["doctor", "--ops"]).output


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_what_it_shows_is_what_a_call_gets(dtype: str) -> None:
    done = CliRunner(env={"COLUMNS": "300"}).invoke(app, ["doctor", "--ops", "--dtype", dtype])
    cells = [[cell.strip() for cell in line.strip("│").split("│")] for line in done.output.splitlines()]
    shown = {row[0]: row[1:] for row in cells if len(row) == 5}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tensor = torch.empty(1, dtype=getattr(torch, dtype), device=device)
    for operation in operations():
        served = []
        for policy in (LOCKSTEP, FAST):
            for needs_grad in (False, True):
                run = operation.select(tensor, policy, needs_grad)
                names = [i.backend for i in operation.implementations if i.run is run]
                served.append(names)
        assert len(shown[operation.name]) == len(served)
        for name, names in zip(shown[operation.name], served, strict=True):
            assert name in names, (operation.name, name, names)
