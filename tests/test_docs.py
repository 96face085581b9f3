"""The pages name what is there: commands and their options, files, folders, rooms, imports, links."""

from __future__ import annotations

import ast
import importlib.util
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main

import mainspring
from mainspring.cli.main import app

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)

# Endings that only files of this tree have on our pages; placeholders are in capitals or angle brackets.
SOURCE_FILE = re.compile(
    r"(?<![\w./<>*-])[\w./-]*[\w-]\.(?:py|pyi|cpp|cu|cuh|h)\b(?![\w(])|\brecipes/\w+\.toml"
)
OTHER_PROGRAMS = {"llama.cpp"}

COMMAND: Any = typer.main.get_command(app)
DEFAULTS = {"rl": ["train"]}  # `mainspring rl RECIPE` is `mainspring rl train RECIPE`

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))


@pytest.fixture(scope="module")
def files() -> list[str]:
    """Every file of the tree's own folders, as `/path`."""
    folders = ("src", "csrc", "tests", "benchmarks", "recipes", "docs", "tools")
    found = [p for folder in folders for p in (ROOT / folder).rglob("*") if p.is_file()]
    return [f"/{p.relative_to(ROOT)}" for p in found if "__pycache__" not in p.parts]


@pytest.fixture(scope="module")
def words(files: list[str]) -> set[str]:
    """Every name that stands in a source file, and the names of the files."""
    found = {Path(path).stem for path in files}
    for path in files:
        if (
            path.endswith((".py", ".h", ".cpp", ".cu", ".cuh", ".toml"))
            and Path(path).name != Path(__file__).name
        ):
            found |= set(re.findall(r"\w+", (ROOT / path[1:]).read_text()))
    return found


def _code_lines(page: Path) -> Iterator[str]:
    """The lines of all code blocks, continued ones joined, and the code words of the text."""
    text = page.read_text()
    for _, block in FENCE.findall(text):
        yield from block.replace("\\\n", " ").splitlines()
    yield from re.findall(r"`([^`\n]+)`", FENCE.sub("", text))


def _commands(page: Path) -> Iterator[list[str]]:
    """The words after `mainspring` wherever a page runs it."""
    for line in _code_lines(page):
        for part in re.split(r"&&|\|\||;", re.split(r"(?:^|\s)#\s", line)[0]):
            found = re.match(r"\s*(?:[A-Z_]+=\S+ )*(?:torchrun .*-m )?mainspring ([a-z].*)", part)
            if found and " | " not in found[1]:
                yield shlex.split(found[1].replace("[", "").replace("]", ""))


def _leaf(words: list[str]) -> tuple[Any, list[str]]:
    """The command that the words name, and the words after its name. A group of commands if they name none."""
    command: Any = COMMAND
    while words and hasattr(command, "commands"):
        if words[0] not in command.commands:
            words = [*DEFAULTS.get(command.name, []), *words]
        if words[0] not in command.commands:
            break
        command, words = command.commands[words[0]], words[1:]
    return command, words


@every_page
def test_commands_and_their_options_exist(page: Path) -> None:
    for words in _commands(page):
        command, rest = _leaf(words)
        assert not (rest and hasattr(command, "commands")), f"{page.name}: no mainspring {' '.join(words)}"
        known = {"--help"} | {name for p in command.params for name in (*p.opts, *p.secondary_opts)}
        unknown = [w for w in rest if w.startswith("--") and w.split("=")[0] not in known]
        assert not unknown, f"{page.name}: mainspring {' '.join(words)}: {unknown} unknown"


def test_the_readme_and_the_plan_name_every_command() -> None:
    commands = set(COMMAND.commands)
    shown = {words[0] for words in _commands(ROOT / "README.md")}
    assert shown == commands
    (planned,) = re.findall(
        r"^Command line: `mainspring ([a-z| ]+)`", (ROOT / "docs/design.md").read_text(), re.M
    )
    assert set(planned.split(" | ")) == commands


@every_page
def test_source_files_exist(page: Path, files: list[str]) -> None:
    for line in _code_lines(page):
        for name in SOURCE_FILE.findall(line):
            if name not in OTHER_PROGRAMS:
                assert any(path.endswith("/" + name) for path in files), f"{page.name}: no file {name}"


@every_page
def test_options_of_benchmarks_exist(page: Path) -> None:
    for line in _code_lines(page):
        found = re.search(r"(benchmarks/\w+\.py) ([^#]*)", line)
        if found:
            declared = set(re.findall(r'"(--[\w-]+)"', (ROOT / found[1]).read_text()))
            used = {word.split("=")[0] for word in found[2].split() if word.startswith("--")}
            assert used <= declared, f"{page.name}: {found[1]} has no {used - declared}"


GUIDES = [p for p in PAGES if p.parent.name == "docs" and p.name != "serving.md"]
FOREIGN = {"linear_qkv", "partition_dim", "trust_remote_code"}  # Megatron-LM's and transformers'


@pytest.mark.parametrize("page", GUIDES, ids=lambda p: p.name)
def test_names_in_the_guides_are_names_of_the_code(page: Path, words: set[str]) -> None:
    text = FENCE.sub("", page.read_text())
    for span in re.findall(r"`([^`\n]+)`", text):
        named = set(re.findall(r"[A-Za-z]\w*_\w+|\b_\w+|\b[A-Z][a-z]+[A-Z]\w*", span))
        assert named - FOREIGN <= words, f"{page.name}: `{span}` names {named - FOREIGN - words}"


def _anchors(page: Path) -> set[str]:
    """What GitHub makes of the page's headings."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


@every_page
def test_links_lead_somewhere(page: Path) -> None:
    for target, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)\s]*))?\)", page.read_text()):
        if "://" not in target:
            there = page.parent / target if target else page
            assert there.exists(), f"{page.name}: nothing at {target}"
            assert not anchor or anchor in _anchors(there), f"{page.name}: {target} has no #{anchor}"


def test_every_page_is_reached_from_the_readme() -> None:
    reached, left = set(), [ROOT / "README.md"]
    while left:
        page = left.pop()
        reached.add(page)
        for target in re.findall(r"\]\(([^)#\s]+)", page.read_text()):
            there = (page.parent / target).resolve()
            left += {there, *there.glob("*.md")} & set(PAGES) - reached
    assert reached == set(PAGES)


def test_the_plan_draws_the_rooms_that_stand(files: list[str]) -> None:
    text = (ROOT / "docs/design.md").read_text()
    (drawing,) = (block for _, block in FENCE.findall(text) if block.startswith("src/mainspring/"))
    source, native = (
        part.partition("\n")[2] for part in re.split(r"^(?=csrc/)", drawing, flags=re.MULTILINE)
    )
    for folder, part in (("/src/mainspring/", source), ("/csrc/", native)):
        drawn = re.findall(r"^  (\w+)/", part, re.MULTILINE)
        assert set(drawn) == {p[len(folder) :].split("/")[0] for p in files if re.match(f"{folder}\\w+/", p)}
    folders = {str(Path(path).parent) + "/" for path in files}
    for name in re.findall(r"(?<![\w.])[\w./]*\w/(?= |,|;|:|\)|$)", drawing):
        assert any(("/" + name) in folder for folder in folders), f"no folder {name}"


def _top_level(module: str) -> set[str] | None:
    """The names that a module of ours binds, read and not run; None if it is not there."""
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        return None
    names: set[str] = set()
    for node in ast.parse(Path(spec.origin).read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {t.id for t in targets if isinstance(t, ast.Name)}
        elif isinstance(node, ast.ImportFrom):
            names |= {alias.asname or alias.name for alias in node.names}
    return names


@every_page
def test_imports_of_the_examples_exist(page: Path) -> None:
    for _, block in FENCE.findall(page.read_text()):
        for module, names in re.findall(
            r"^\s*from (mainspring[\w.]*) import ([\w, ]+)$", block, re.MULTILINE
        ):
            bound = _top_level(module)
            assert bound is not None, f"{page.name}: no module {module}"
            assert set(names.split(", ")) <= bound, (
                f"{page.name}: {module} lacks {set(names.split(', ')) - bound}"
            )
        for name in re.findall(r"\bms\.([A-Za-z_]+)", block):
            assert name in mainspring.__all__, f"{page.name}: no mainspring.{name}"


def test_the_metrics_of_the_serving_page_are_the_servers() -> None:
    page = (ROOT / "docs/serving.md").read_text()
    section = page.partition("\n## Metrics\n")[2].partition("\n## ")[0]
    source = (ROOT / "src/mainspring/engine/server/metrics.py").read_text()
    exported = set(re.findall(r'(?:"|PREFIX\}_)([a-z][a-z0-9_]+?)(?:_total)?"', source))
    shown = set(re.findall(r"`([a-z0-9_]{12,}?)(?:_total)?`", section))
    assert len(shown) > 20
    assert shown - {"finished_reason"} <= exported
