"""Source code, cut along its syntax: each class and function is a section under its name, by tree-sitter."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

from tree_sitter import Language, Node, Parser

from mainspring.rag.documents.decoding import decode
from mainspring.rag.documents.document import Extract

# Suffix of a file -> (package of the grammar, its function).
GRAMMARS: Mapping[str, tuple[str, str]] = {
    ".py": ("tree_sitter_python", "language"), ".pyi": ("tree_sitter_python", "language"),
    ".js": ("tree_sitter_javascript", "language"), ".mjs": ("tree_sitter_javascript", "language"),
    ".jsx": ("tree_sitter_javascript", "language"), ".ts": ("tree_sitter_typescript", "language_typescript"),
    ".tsx": ("tree_sitter_typescript", "language_tsx"), ".c": ("tree_sitter_c", "language"),
    ".h": ("tree_sitter_cpp", "language"), ".cc": ("tree_sitter_cpp", "language"),
    ".cpp": ("tree_sitter_cpp", "language"), ".hpp": ("tree_sitter_cpp", "language"),
    ".cu": ("tree_sitter_cpp", "language"), ".cuh": ("tree_sitter_cpp", "language"),
    ".rs": ("tree_sitter_rust", "language"), ".go": ("tree_sitter_go", "language"),
    ".java": ("tree_sitter_java", "language"), ".sh": ("tree_sitter_bash", "language"),
}  # fmt: skip
_DEFINITIONS = {
    "class_definition", "function_definition", "class_declaration", "function_declaration", "method_definition",
    "method_declaration", "struct_item", "enum_item", "impl_item", "trait_item", "function_item", "mod_item",
    "interface_declaration", "enum_declaration", "class_specifier", "struct_specifier", "namespace_definition",
    "type_declaration", "constructor_declaration",
}  # fmt: skip
_MAX_DEPTH = 4  # of definitions within each other that get a heading


def read_source_code(path: Path, data: bytes) -> Extract:
    """The source as it is; definitions as headings, each beginning at its decorators and comments."""
    text = decode(path, data)
    encoded = text.encode()
    tree = _parser(path.suffix.lower()).parse(encoded)
    found: list[tuple[int, int, str]] = []
    _collect(tree.root_node, 1, found)
    offsets = _character_offsets(encoded, [start for start, _, _ in found])
    return Extract(text, [(offsets[start], level, title) for start, level, title in found], title=path.name)


@lru_cache
def _parser(suffix: str) -> Parser:
    package, function = GRAMMARS[suffix]
    return Parser(Language(getattr(importlib.import_module(package), function)()))


def _collect(root: Node, level: int, found: list[tuple[int, int, str]]) -> None:
    """(byte offset, level, signature) of each definition below `root`, in order."""
    stack = [(child, level) for child in reversed(root.children)]
    while stack:
        node, level = stack.pop()
        if node.type in _DEFINITIONS and node.child_by_field_name("body") is not None:
            found.append((_beginning(node), level, _signature(node)))
            level += 1
        if level <= _MAX_DEPTH:
            stack.extend((child, level) for child in reversed(node.children))


def _beginning(node: Node) -> int:
    """Where the decorators and comments that stand directly above a definition begin, at the start of their line."""
    if node.parent is not None and node.parent.type == "decorated_definition":
        node = node.parent
    first = node
    above = node.prev_sibling
    while above is not None and "comment" in above.type and above.end_point[0] + 1 >= first.start_point[0]:
        if above.prev_sibling is not None and above.prev_sibling.end_point[0] == above.start_point[0]:
            break  # the comment ends a line of code
        first, above = above, above.prev_sibling
    return first.start_byte


def _signature(node: Node) -> str:
    """A definition's text up to its body, on one line."""
    body = node.child_by_field_name("body")
    assert body is not None and node.text is not None  # `_collect` took only those
    head = node.text[: body.start_byte - node.start_byte].decode(errors="replace")
    return " ".join(head.split()).rstrip(" {:")[:200]


def _character_offsets(encoded: bytes, byte_offsets: list[int]) -> dict[int, int]:
    """Byte offset -> number of characters before it. The offsets ascend."""
    result: dict[int, int] = {}
    done = characters = 0
    for offset in sorted(set(byte_offsets)):
        characters += len(encoded[done:offset].decode())
        result[offset] = characters
        done = offset
    return result
