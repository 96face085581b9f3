"""`mainspring doctor` names every operation of the source, and who serves it."""

from __future__ import annotations

import re
from pathlib import Path

from typer.testing import CliRunner

import mainspring.ops
from mainspring.cli.main import app
from mainspring.ops.catalogue import operations

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
