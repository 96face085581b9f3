"""The rooms: lower ones never import higher ones, and what needs no PyTorch works without it."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import mainspring

SOURCE = Path(mainspring.__file__).parent

# What each room may import, besides itself and `errors`. docs/design.md draws the same picture.
BELOW_MODEL = {"formats", "ops"}
BELOW_TRAIN = BELOW_MODEL | {"model", "parallel"}
BELOW_RL = BELOW_TRAIN | {"train", "engine"}
MAY_IMPORT = {
    "errors": set(),
    "formats": set(),
    "ops": {"formats"},
    "model": BELOW_MODEL,
    "parallel": BELOW_MODEL | {"model"},
    "train": BELOW_TRAIN,
    "engine": BELOW_TRAIN,
    "rl": BELOW_RL,
    "context": BELOW_RL | {"rl"},
    "rag": BELOW_RL,
    "agents": BELOW_RL | {"rag"},
    "insight": BELOW_RL | {"rag", "agents"},
    "editor": BELOW_RL | {"rag", "agents", "insight"},
    "console": {"formats", "engine"},
    "tensor": {"formats"},
}


def _room(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def _imported_rooms(path: Path) -> set[str]:
    """Every `mainspring.X` that the file imports, inside functions and under TYPE_CHECKING too."""
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text())):
        modules: list[str] = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute, so that a reader sees the room"
            modules = [
                f"{node.module}.{alias.name}" if node.module == "mainspring" else str(node.module)
                for alias in node.names
            ]
        rooms |= {m.split(".")[1] for m in modules if m.startswith("mainspring.")}
    return rooms


FILES = sorted(p for p in SOURCE.rglob("*.py") if p.parent != SOURCE or p.name == "errors.py")


def test_every_room_is_known() -> None:
    assert {_room(p) for p in FILES} <= {*MAY_IMPORT, "cli"}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_a_file_imports_only_its_own_room_and_lower_ones(path: Path) -> None:
    room = _room(path)
    if room == "cli":
        return  # the top of the house
    allowed = MAY_IMPORT[room] | {room, "errors"}
    assert _imported_rooms(path) <= allowed


def _run_without_torch(code: str) -> subprocess.CompletedProcess[str]:
    block = "import sys; sys.modules['torch'] = None\n"
    return subprocess.run([sys.executable, "-c", block + code], capture_output=True, text=True, timeout=60)


def test_formats_and_the_command_line_help_work_without_torch() -> None:
    imports = "\n".join(
        f"import mainspring.formats.{p.stem}"
        for p in (SOURCE / "formats").glob("*.py")
        if p.stem != "__init__"
    )
    done = _run_without_torch("import mainspring\n" + imports)
    assert done.returncode == 0, done.stderr
    done = _run_without_torch(
        "sys.argv = ['mainspring', '--help']\nfrom mainspring.cli.main import main\nmain()"
    )
    assert done.returncode == 0, done.stderr
    for command in ("serve", "generate", "train", "doctor"):
        assert command in done.stdout


def test_public_names_load_on_first_use() -> None:
    assert set(mainspring.__all__) <= set(dir(mainspring))
    for name in mainspring.__all__:
        assert callable(getattr(mainspring, name))
    with pytest.raises(AttributeError, match="no attribute 'abacus'"):
        mainspring.abacus  # noqa: B018 - the access is what is tested
