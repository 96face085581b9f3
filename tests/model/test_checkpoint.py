"""Directories that are whole, sharded, broken or contradictory; fresh weights."""

from __future__ import annotations

import json
import struct
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mainspring.errors import CheckpointError, ConfigError, InvalidRequestError, ModelNotFoundError
from mainspring.model.checkpoint import create_model, load_model, save_model
from mainspring.model.decoder import Decoder
from support.families import FAMILIES, model_config

LLAMA = model_config(FAMILIES[0])


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save_model(create_model(LLAMA, seed=1), tmp_path / "model")
    return tmp_path / "model"


def _same_weights(a: Decoder, b: Decoder) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
@pytest.mark.parametrize("max_shard_bytes", [1 << 30, 30_000])
def test_saving_and_loading_changes_no_bit(family, max_shard_bytes: int, tmp_path: Path) -> None:
    model = create_model(model_config(family), dtype="bfloat16", seed=3)
    save_model(model, tmp_path / "m", max_shard_bytes=max_shard_bytes)
    again = load_model(tmp_path / "m")
    assert again.dtype == torch.bfloat16
    assert again.config == replace(model.config, dtype="bfloat16")
    assert _same_weights(again, model)


def test_saving_again_replaces_the_model_and_its_shards(saved: Path) -> None:
    other = create_model(LLAMA, seed=2)
    save_model(other, saved, max_shard_bytes=30_000)
    assert _same_weights(load_model(saved), other)
    save_model(other, saved)
    assert sorted(p.name for p in saved.iterdir()) == ["config.json", "model.safetensors"]


def test_unknown_config_keys_survive(saved: Path, tmp_path: Path) -> None:
    config = json.loads((saved / "config.json").read_text())
    config["our_note"] = {"kept": [1, 2]}
    (saved / "config.json").write_text(json.dumps(config))
    save_model(load_model(saved), tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["our_note"] == {"kept": [1, 2]}


def test_dtype_is_the_checkpoints_unless_asked_for(saved: Path) -> None:
    assert load_model(saved).dtype == torch.float32
    assert load_model(saved, dtype="bfloat16").dtype == torch.bfloat16
    with pytest.raises(ConfigError, match="dtype 'int4' is not one of float32"):
        load_model(saved, dtype="int4")


@pytest.mark.parametrize(
    ("device", "message"), [("cuda:99", "'cuda:99' is not there"), ("abacus", "is not one that")]
)
def test_a_device_that_is_not_there_is_refused(saved: Path, device: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_model(saved, device=device)


def test_the_same_seed_gives_the_same_weights() -> None:
    assert _same_weights(create_model(LLAMA, seed=5), create_model(LLAMA, seed=5))
    assert not _same_weights(create_model(LLAMA, seed=5), create_model(LLAMA, seed=6))


def test_a_missing_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="no-such-model"):
        load_model(tmp_path / "no-such-model")


def test_a_missing_weight_file_is_named(saved: Path) -> None:
    (saved / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors"):
        load_model(saved)


def test_a_truncated_weight_file_is_refused(saved: Path) -> None:
    data = (saved / "model.safetensors").read_bytes()
    (saved / "model.safetensors").write_bytes(data[:-100])
    with pytest.raises(CheckpointError, match="truncated"):
        load_model(saved)


def _rewrite_header(path: Path, change) -> None:
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    change(header)
    encoded = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + data[8 + size :])


def test_a_tensor_that_the_model_needs_is_missed(saved: Path) -> None:
    _rewrite_header(
        saved / "model.safetensors",
        lambda h: h.update({"model.layers.9.extra": h.pop("model.layers.1.mlp.up_proj.weight")}),
    )
    with pytest.raises(CheckpointError, match=r"lacks 1 of .* 'model\.layers\.1\.mlp\.up_proj\.weight'"):
        load_model(saved)


def test_a_tensor_that_the_model_does_not_know_is_refused(saved: Path) -> None:
    config = json.loads((saved / "config.json").read_text())
    config["num_hidden_layers"] = 2
    (saved / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"does not account for; the first is 'model\.layers\.2"):
        load_model(saved)


def test_a_shape_that_contradicts_the_config_is_refused(saved: Path) -> None:
    config = json.loads((saved / "config.json").read_text())
    config["vocab_size"] = 98
    (saved / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"has shape \[97, 48\], its config.json needs \[98, 48\]"):
        load_model(saved)


def test_saving_onto_a_file_is_refused_and_leaves_it(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("kept")
    with pytest.raises(CheckpointError, match="is a file"):
        save_model(create_model(LLAMA), tmp_path / "precious")
    assert (tmp_path / "precious").read_text() == "kept"


def test_a_failed_save_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = create_model(LLAMA)
    calls = iter(range(5))

    def fail_late(self, *args) -> None:
        if next(calls, None) is None:
            raise CheckpointError("disk full")
        write(self, *args)

    from mainspring.formats.safetensors_file import SafetensorsWriter

    write = SafetensorsWriter.write
    monkeypatch.setattr(SafetensorsWriter, "write", fail_late)
    with pytest.raises(CheckpointError, match="disk full"):
        save_model(model, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("sequences", "message"),
    [([[1], []], "sequence 1 is empty"), ([[1, 97]], "0 to 96"), ([[-1]], "from -1")],
)
def test_log_probs_refuse_what_is_no_sequence(sequences: list[list[int]], message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        create_model(LLAMA).log_probs(sequences)


def test_log_probs_of_single_tokens_are_empty() -> None:
    pieces = create_model(LLAMA).log_probs([[1], [2, 3]])
    assert [len(p) for p in pieces] == [0, 1]
    assert create_model(LLAMA).log_probs([]) == []
