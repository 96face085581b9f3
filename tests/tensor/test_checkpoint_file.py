"""Checkpoint files of the framework: whatever their header says, they are read or refused, and nothing else happens."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import mainspring.tensor as mt
from mainspring.errors import MainspringError
from mainspring.formats.safetensors_file import SINGLE_NAME

DATA = bytes(range(64))
HEADER = {
    "a": {"dtype": "F32", "shape": [2, 4], "data_offsets": [0, 32]},
    "b": {"dtype": "I64", "shape": [4], "data_offsets": [32, 64]},
    "__metadata__": {"format": "pt"},
}
quick = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


def file_of(header: bytes, data: bytes = DATA, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def read(path: Path, content: bytes) -> dict[str, mt.Tensor] | None:
    """The tensors, every byte of them read, or None where the file was refused as it should be."""
    (path / SINGLE_NAME).write_bytes(content)
    try:
        tensors = mt.load_file(path)
    except MainspringError:
        return None
    for tensor in tensors.values():
        tensor.tolist()
    return tensors


def test_a_good_file_is_read(tmp_path: Path) -> None:
    tensors = read(tmp_path, file_of(json.dumps(HEADER).encode()))
    assert tensors is not None
    assert tensors["b"].tolist() == np.frombuffer(DATA[32:], np.int64).tolist()
    assert tensors["a"].shape == (2, 4)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**66), 2**66) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


@quick
@given(
    entry=st.sampled_from(["a", "b", "__metadata__"]),
    field=st.sampled_from([None, "dtype", "shape", "data_offsets"]),
    value=json_values | st.lists(st.integers(-2, 70), max_size=3),
)
def test_any_value_in_any_place_of_the_header_is_read_or_refused(
    tmp_path: Path, entry: str, field: str | None, value: Any
) -> None:
    header = json.loads(json.dumps(HEADER))
    if field is None:
        header[entry] = value
    else:
        header[entry][field] = value
    read(tmp_path, file_of(json.dumps(header).encode()))


@quick
@given(changes=st.lists(st.tuples(st.integers(0, 199), st.integers(0, 255)), min_size=1, max_size=6))
def test_any_bytes_in_the_header_are_read_or_refused(tmp_path: Path, changes: list[tuple[int, int]]) -> None:
    content = bytearray(file_of(json.dumps(HEADER).encode()))
    for place, byte in changes:
        content[place % (len(content) - len(DATA))] = byte
    read(tmp_path, bytes(content))


@quick
@given(header=st.binary(max_size=40))
def test_headers_that_are_no_json_are_read_or_refused(tmp_path: Path, header: bytes) -> None:
    read(tmp_path, file_of(header))


@quick
@given(length=st.integers(0, 2**64 - 1), kept=st.integers(0, 300))
def test_lengths_that_lie_and_files_cut_short_are_refused(tmp_path: Path, length: int, kept: int) -> None:
    header = json.dumps(HEADER).encode()
    whole = file_of(header)
    if length != len(header):
        assert read(tmp_path, file_of(header, length=length)) is None
    if kept < len(whole):
        assert read(tmp_path, whole[:kept]) is None


@pytest.mark.parametrize(
    "spread", [([0, 32], [16, 48]), ([0, 32], [40, 72]), ([32, 0], [32, 64]), ([0, 31], [32, 64])]
)
def test_offsets_that_overlap_or_leave_the_file_are_refused(tmp_path: Path, spread: Any) -> None:
    header = json.loads(json.dumps(HEADER))
    header["a"]["data_offsets"], header["b"]["data_offsets"] = spread
    assert read(tmp_path, file_of(json.dumps(header).encode())) is None
