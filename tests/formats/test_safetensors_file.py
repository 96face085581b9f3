"""Checkpoints are read strictly and written slice by slice, whole or not at all."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from mainspring.errors import CheckpointError
from mainspring.formats.safetensors_file import CheckpointReader, SafetensorsWriter, TensorSpec

DTYPES = {"F32": "<f4", "F16": "<f2", "I64": "<i8", "U8": "u1", "BOOL": "?"}


def tensors_strategy() -> st.SearchStrategy[dict[str, np.ndarray[Any, Any]]]:
    shapes = st.lists(st.integers(0, 5), max_size=3).map(tuple)
    arrays = st.tuples(st.sampled_from(sorted(DTYPES)), shapes, st.integers(0, 2**32)).map(
        lambda t: np.asarray(np.random.default_rng(t[2]).integers(0, 2, t[1]) * 3, DTYPES[t[0]])
    )
    return st.dictionaries(
        st.text(min_size=1, max_size=8).filter(lambda n: n != "__metadata__"), arrays, max_size=6
    )


def specs_of(tensors: dict[str, np.ndarray[Any, Any]]) -> dict[str, TensorSpec]:
    names = {np.dtype(code): name for name, code in DTYPES.items()}
    return {name: TensorSpec(names[array.dtype], array.shape) for name, array in tensors.items()}


def write(directory: Path, tensors: dict[str, np.ndarray[Any, Any]], max_shard_bytes: int = 10**9) -> None:
    with SafetensorsWriter(directory, specs_of(tensors), max_shard_bytes=max_shard_bytes) as writer:
        for name, array in tensors.items():
            writer.write(name, array)
        writer.finish()


def assert_holds(directory: Path, tensors: dict[str, np.ndarray[Any, Any]]) -> None:
    reader = CheckpointReader(directory)
    assert set(reader.names()) == set(tensors)
    for name, array in tensors.items():
        entry = reader.entry(name)
        assert entry.shape == array.shape
        assert np.array_equal(entry.numpy(), array)


@settings(max_examples=40, deadline=None)
@given(tensors=tensors_strategy(), max_shard_bytes=st.integers(1, 200))
def test_what_is_written_is_read_here_and_by_the_reference_library(
    tmp_path_factory: pytest.TempPathFactory, tensors: dict[str, np.ndarray[Any, Any]], max_shard_bytes: int
) -> None:
    directory = tmp_path_factory.mktemp("checkpoint")
    write(directory, tensors, max_shard_bytes)
    assert_holds(directory, tensors)
    loaded = {n: a for file in directory.glob("*.safetensors") for n, a in load_file(file).items()}
    assert loaded.keys() == tensors.keys()
    assert all(np.array_equal(loaded[name], tensors[name]) for name in tensors)


@settings(max_examples=25, deadline=None)
@given(tensors=tensors_strategy())
def test_files_of_the_reference_library_are_read(
    tmp_path_factory: pytest.TempPathFactory, tensors: dict[str, np.ndarray[Any, Any]]
) -> None:
    directory = tmp_path_factory.mktemp("checkpoint")
    save_file(tensors, directory / "model.safetensors")
    assert_holds(directory, tensors)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_blocks_written_in_any_order_make_up_the_tensor(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    shape = tuple(data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=3)))
    array = np.arange(np.prod(shape), dtype="<f4").reshape(shape)
    cuts = [data.draw(st.integers(0, n)) for n in shape]
    corners = [[(0, cut), (cut, n)] for cut, n in zip(cuts, shape, strict=True)]
    blocks = [()]
    for sides in corners:
        blocks = [(*block, side) for block in blocks for side in sides]
    directory = tmp_path_factory.mktemp("checkpoint")
    with SafetensorsWriter(directory, {"t": TensorSpec("F32", shape)}) as writer:
        for block in data.draw(st.permutations(blocks)):
            piece = array[tuple(slice(begin, end) for begin, end in block)]
            writer.write_block("t", piece, tuple(begin for begin, _ in block))
        writer.finish()
    assert_holds(directory, {"t": array})


def test_written_files_carry_the_format_that_transformers_asks_for(tmp_path: Path) -> None:
    write(tmp_path, {"a": np.ones(3, "<f4")})
    raw = (tmp_path / "model.safetensors").read_bytes()
    (size,) = struct.unpack("<Q", raw[:8])
    assert json.loads(raw[8 : 8 + size])["__metadata__"] == {"format": "pt"}
    assert size % 8 == 0


def test_a_tensor_larger_than_a_shard_gets_its_own(tmp_path: Path) -> None:
    tensors = {"small": np.ones(2, "<f4"), "large": np.ones(100, "<f4"), "last": np.ones(2, "<f4")}
    write(tmp_path, tensors, max_shard_bytes=64)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) == 3
    assert index["metadata"]["total_size"] == 416


@pytest.mark.parametrize("first", [10**9, 8])
@pytest.mark.parametrize("second", [10**9, 8])
def test_a_new_checkpoint_replaces_the_old_one_and_its_files(tmp_path: Path, first: int, second: int) -> None:
    old = {name: np.full(2, 1, "<f4") for name in "abc"}
    new = {name: np.full(2, 2, "<f4") for name in "abcd"}
    write(tmp_path, old, first)
    write(tmp_path, new, second)
    assert_holds(tmp_path, new)
    write(tmp_path, old, second)
    assert_holds(tmp_path, old)
    expected = 1 if second > 8 else 4  # one file, or three shards and their index
    assert len(list(tmp_path.iterdir())) == expected


@pytest.mark.parametrize("shard", [10**9, 8])
def test_an_interrupted_save_leaves_the_old_checkpoint_and_nothing_else(tmp_path: Path, shard: int) -> None:
    old = {name: np.full(2, 1, "<f4") for name in "abc"}
    write(tmp_path, old, shard)
    before = sorted(path.name for path in tmp_path.iterdir())

    def interrupted() -> None:
        with SafetensorsWriter(tmp_path, specs_of(old), max_shard_bytes=shard) as writer:
            writer.write("a", np.full(2, 9, "<f4"))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert_holds(tmp_path, old)


def test_a_failing_rename_leaves_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = {name: np.full(2, 1, "<f4") for name in "abc"}
    write(tmp_path, old, 8)

    def fail(source: object, target: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mainspring.formats.files.os.replace", fail)
    with pytest.raises(CheckpointError, match="No space left"):
        write(tmp_path, {name: np.full(2, 2, "<f4") for name in "abc"}, 8)
    monkeypatch.undo()
    assert_holds(tmp_path, old)
    assert not list(tmp_path.glob(".*"))


def test_incomplete_tensors_are_named(tmp_path: Path) -> None:
    with SafetensorsWriter(tmp_path, {"a": TensorSpec("F32", (4,)), "b": TensorSpec("F32", (4,))}) as writer:
        writer.write("a", np.ones(4, "<f4"))
        writer.write("b", np.ones(1, "<f4"), offset=4)
        with pytest.raises(CheckpointError, match="'b' with 4 of 16 bytes"):
            writer.finish()
    assert not list(tmp_path.iterdir())


def test_writes_outside_a_tensor_are_refused(tmp_path: Path) -> None:
    with SafetensorsWriter(tmp_path, {"a": TensorSpec("F32", (2, 2))}) as writer:
        with pytest.raises(CheckpointError, match="12 to 20 lie outside tensor 'a' of 16"):
            writer.write("a", np.ones(2, "<f4"), offset=12)
        with pytest.raises(CheckpointError, match="no place for tensor 'b'"):
            writer.write("b", b"")
        with pytest.raises(CheckpointError, match="does not fit"):
            writer.write_block("a", np.ones((1, 2), "<f4"), (2, 0))
        with pytest.raises(CheckpointError, match="does not fit"):
            writer.write_block("a", np.ones((1, 2), "<f8"), (0, 0))
        with pytest.raises(CheckpointError, match="does not fit"):
            writer.write_block("a", np.ones(2, "<f4"), (0,))


def with_header(path: Path, header: object, data: bytes) -> Path:
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + data)
    return path


def tensor(begin: int, end: int, shape: list[int] | None = None, dtype: str = "F32") -> dict[str, Any]:
    return {
        "dtype": dtype,
        "shape": [(end - begin) // 4] if shape is None else shape,
        "data_offsets": [begin, end],
    }


@pytest.mark.parametrize(
    ("header", "size", "problem"),
    [
        ({"a": tensor(0, 8), "b": tensor(4, 12)}, 12, "overlaps"),
        ({"a": tensor(0, 8), "b": tensor(12, 16)}, 16, "hole"),
        ({"a": tensor(0, 8)}, 4, "truncated"),
        ({"a": tensor(0, 8)}, 9, "longer than its tensors"),
        ({"a": tensor(0, 8, [3])}, 8, "takes 12 bytes"),
        ({"a": tensor(0, 8, [-2])}, 8, "sizes"),
        ({"a": tensor(0, 8, [2], "X32")}, 8, "'X32' is not supported"),
        ({"a": [1, 2]}, 0, "sizes"),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0]}}, 8, "sizes"),
        (b'{"a": 1, "a": 2}', 0, "twice"),
        (b"[]", 0, "not a JSON object"),
        (b"\xff\xfe", 0, "not valid JSON"),
    ],
)
def test_a_corrupt_file_is_refused(tmp_path: Path, header: object, size: int, problem: str) -> None:
    path = with_header(tmp_path / "model.safetensors", header, bytes(size))
    with pytest.raises(CheckpointError, match=problem):
        CheckpointReader(path)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_file_cut_anywhere_is_refused(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    directory = tmp_path_factory.mktemp("checkpoint")
    write(directory, {"a": np.ones((3, 4), "<f4"), "b": np.ones(5, "<f2")})
    path = directory / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    with pytest.raises(CheckpointError):
        CheckpointReader(directory)


def test_an_index_must_agree_with_its_shards(tmp_path: Path) -> None:
    write(tmp_path, {name: np.ones(2, "<f4") for name in "ab"}, 8)
    index_path = tmp_path / "model.safetensors.index.json"
    index = json.loads(index_path.read_text())
    shards = index["weight_map"]

    def problem(weight_map: object) -> str:
        index_path.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(CheckpointError) as caught:
            CheckpointReader(tmp_path)
        return str(caught.value)

    assert "lacks it" in problem({"a": shards["a"], "b": shards["a"]})
    assert "No such file" in problem({**shards, "c": "model-00009-of-00009.safetensors"})
    assert "must lie beside" in problem({**shards, "c": "../secret.safetensors"})
    assert "weight_map" in problem([1])
    (tmp_path / shards["b"]).unlink()
    assert shards["b"] in problem(shards)


def test_a_shard_with_a_tensor_that_the_index_does_not_know_is_refused(tmp_path: Path) -> None:
    write(tmp_path, {name: np.ones(2, "<f4") for name in "ab"}, 8)
    index_path = tmp_path / "model.safetensors.index.json"
    shards = json.loads(index_path.read_text())["weight_map"]
    save_file({"b": np.ones(2, "<f4"), "stray": np.ones(2, "<f4")}, tmp_path / shards["b"])
    with pytest.raises(CheckpointError, match="stray"):
        CheckpointReader(tmp_path)


def test_a_directory_without_weights_says_what_it_has(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        CheckpointReader(tmp_path / "absent")
    with pytest.raises(CheckpointError, match="neither"):
        CheckpointReader(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(CheckpointError, match="pickle, which is never read"):
        CheckpointReader(tmp_path)


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    write(tmp_path, {"a": np.ones(2, "<f4")})
    with pytest.raises(CheckpointError, match="no tensor 'b'"):
        CheckpointReader(tmp_path).entry("b")


def test_writing_to_a_view_never_reaches_the_file(tmp_path: Path) -> None:
    write(tmp_path, {"a": np.ones(2, "<f4")})
    CheckpointReader(tmp_path).entry("a").data[:4] = bytes(4)
    assert_holds(tmp_path, {"a": np.ones(2, "<f4")})


def test_views_outlive_their_reader_and_a_replaced_file(tmp_path: Path) -> None:
    write(tmp_path, {"a": np.ones(2, "<f4")})
    entry = CheckpointReader(tmp_path).entry("a")
    write(tmp_path, {"a": np.zeros(2, "<f4")})
    assert np.array_equal(entry.numpy(), np.ones(2, "<f4"))
