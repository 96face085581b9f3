"""Writes that leave either the old state or the new one: write beside, fsync, rename."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def fsync_directory(path: Path) -> None:
    """Makes renames inside `path` survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def beside(path: Path) -> Path:
    """A fresh hidden name next to `path`, on the same file system, for what is not complete yet."""
    return path.with_name(f".{path.name}.{secrets.token_hex(6)}.partial")


def write_file(path: Path, data: bytes) -> None:
    """Replaces the file at `path` with `data`; a failure leaves the old one whole and nothing beside it."""
    partial = beside(path)
    try:
        with open(partial, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    fsync_directory(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Replaces the file at `path` with `value` as indented UTF-8 JSON, as `write_file` does."""
    write_file(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


@contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """Yields a directory beside `path` that becomes `path` when the block ends, and vanishes if it raises.

    The files in it must have been fsynced by whoever wrote them. Raises OSError if `path` is by then a
    directory with something in it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = beside(path)
    partial.mkdir()
    try:
        yield partial
        fsync_directory(partial)
        os.rename(partial, path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    fsync_directory(path.parent)


@contextmanager
def replaced_directory(path: Path) -> Iterator[Path]:
    """As `new_directory`, but a directory that stands at `path` is replaced: it is whole until the new one is there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = beside(path)
    partial.mkdir()
    try:
        yield partial
        exchange_directory(partial, path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def exchange_directory(partial: Path, path: Path) -> None:
    """Renames the complete directory `partial` to `path`; what stood there goes, once the new one is in its place."""
    fsync_directory(partial)
    old = beside(path) if path.exists() else None
    if old is not None:
        os.rename(path, old)
    try:
        os.rename(partial, path)
    except OSError:
        if old is not None:
            os.rename(old, path)
        raise
    fsync_directory(path.parent)
    if old is not None:
        shutil.rmtree(old)
