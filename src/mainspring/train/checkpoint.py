"""Checkpoints of a run: a Hugging Face directory, with what resuming needs beside the weights.

    OUTPUT/step-00001000/            config.json, model.safetensors, tokenizer.json, ...: a model to load or serve
    OUTPUT/step-00001000/optimizer/  model.safetensors (optimizer state, random state) and state.json
    OUTPUT/latest                    a link to the newest

A checkpoint appears whole or not at all.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mainspring.errors import CheckpointError, ConfigError
from mainspring.formats.files import beside, fsync_directory, replaced_directory, write_json
from mainspring.formats.safetensors_file import CheckpointReader, SafetensorsWriter, TensorSpec
from mainspring.model.checkpoint import saved_config, write_checkpoint
from mainspring.model.decoder import Decoder
from mainspring.parallel.host_copies import HostCopies
from mainspring.train.optimizer import Optimizer
from mainspring.train.packing import DataPosition
from mainspring.train.text_tokenizer import TextTokenizer

_DTYPES = {torch.float32: "F32", torch.uint8: "U8"}
_STEP_NAME = re.compile(r"step-(\d{8,})")
_VERSION = 1


@dataclass(frozen=True)
class TrainerState:
    """Where a run stands, apart from its tensors."""

    step: int
    """Optimizer steps that are done."""
    tokens: int
    elapsed: float
    """Seconds of training so far, over all sittings."""
    epoch: int
    index: int
    """The next micro-batch is number `index` of `epoch`."""
    fingerprint: str
    """Of the token data."""
    recipe: dict[str, Any]

    @property
    def position(self) -> DataPosition:
        return DataPosition(self.epoch, self.index)


def checkpoint_writer(
    output: Path,
    model: Decoder,
    optimizer: Optimizer,
    tokenizer: TextTokenizer,
    state: TrainerState,
    keep: int,
    copies: HostCopies | None,
) -> Callable[[], Path]:
    """What writes OUTPUT/step-N, points OUTPUT/latest at it, deletes all but the newest `keep` and returns its path.

    With `copies` it writes the values of this moment and may run while training goes on; without, those of the model
    and the optimizer themselves, so that it must run at once. It raises CheckpointError or OSError; older checkpoints
    are then whole.
    """
    path = output / f"step-{state.step:08d}"
    config = saved_config(model.config, model.dtype)
    weights = _held(model.hf_tensors(), "weight", copies)
    moments = _held(optimizer.state_tensors(), "state", copies) | random_states(model.device)
    if copies is not None:
        copies.finish()

    def write() -> Path:
        with replaced_directory(path) as partial:
            write_checkpoint(partial, weights, config)
            tokenizer.save(partial)
            (partial / "optimizer").mkdir()
            write_tensors(partial / "optimizer", moments)
            write_json(partial / "optimizer" / "state.json", state_record(state))
        publish(output, path, keep)
        return path

    return write


def publish(output: Path, path: Path, keep: int) -> None:
    """OUTPUT/latest names the checkpoint from now on; all but the newest `keep` go."""
    _link(output / "latest", path.name)
    for _, old in checkpoints(output)[:-keep]:
        shutil.rmtree(old)


def _held(tensors: Mapping[str, Tensor], kind: str, copies: HostCopies | None) -> dict[str, Tensor]:
    if copies is None:
        return dict(tensors)
    return {name: copies.copy(f"{kind}.{name}", tensor) for name, tensor in tensors.items()}


def state_record(state: TrainerState) -> dict[str, Any]:
    """What `read_state` reads."""
    return {"version": _VERSION, **asdict(state)}


def remove_partial(output: Path) -> None:
    """Deletes what a process that was killed in the middle of a save has left; nobody else may be saving there."""
    for partial in output.glob(".step-*.partial"):
        shutil.rmtree(partial, ignore_errors=True)


def checkpoints(output: Path) -> list[tuple[int, Path]]:
    """(step, path) of every checkpoint of a run, oldest first."""
    if not output.is_dir():
        return []
    found = []
    for path in output.iterdir():
        match = _STEP_NAME.fullmatch(path.name)
        if match and (path / "optimizer" / "state.json").is_file():
            found.append((int(match[1]), path))
    return sorted(found)


def choose_start(output: Path, resume: bool, restart: bool) -> Path | None:
    """The checkpoint to resume from; None starts anew. restart deletes those that are there. Raises ConfigError."""
    remove_partial(output)
    found = checkpoints(output)
    if resume:
        if not found:
            raise ConfigError(f"--resume: there is no checkpoint in {output}; leave the option out to start")
        return found[-1][1]
    if found and not restart:
        raise ConfigError(
            f"{output} holds a run at step {found[-1][0]}; continue it with --resume, "
            "delete it with --restart, or set another output"
        )
    for _, path in found:
        shutil.rmtree(path)
    (output / "latest").unlink(missing_ok=True)
    return None


def read_state(path: Path) -> TrainerState:
    """The state of a checkpoint. Raises CheckpointError if it cannot be read."""
    file = path / "optimizer" / "state.json"
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        version = record.pop("version")
        if version != _VERSION:
            raise CheckpointError(f"{file} has version {version}; this release reads version {_VERSION}")
        return TrainerState(**record)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"cannot read the training state {file}: {error}") from error


def load_optimizer(path: Path, optimizer: Optimizer, device: torch.device) -> None:
    """Puts optimizer state and random state of a checkpoint back. Raises CheckpointError where they do not fit."""
    reader = CheckpointReader(path / "optimizer")
    names = {code: dtype for dtype, code in _DTYPES.items()}
    tensors: dict[str, Tensor] = {}
    for name in reader.names():
        entry = reader.entry(name)
        if entry.dtype not in names:
            raise CheckpointError(f"{path}/optimizer: tensor {name!r} is {entry.dtype}; expected F32 or U8")
        tensors[name] = torch.frombuffer(entry.data, dtype=names[entry.dtype]).view(entry.shape)
    random = {name: tensors.pop(name) for name in list(tensors) if name.startswith("random.")}
    optimizer.load_state_tensors(tensors)
    if "random.cpu" not in random:
        raise CheckpointError(
            f"{path}/optimizer lacks the random state 'random.cpu'; the checkpoint is incomplete"
        )
    torch.set_rng_state(random["random.cpu"].clone())
    if device.type == "cuda" and "random.cuda" in random:
        torch.cuda.set_rng_state(random["random.cuda"].clone(), device)


def random_states(device: torch.device) -> dict[str, Tensor]:
    """PyTorch's, by the names that `load_optimizer` knows."""
    states = {"random.cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["random.cuda"] = torch.cuda.get_rng_state(device)
    return states


def write_tensors(directory: Path, tensors: Mapping[str, Tensor]) -> None:
    """A safetensors file of float32 and uint8 tensors in a directory that is there."""
    specs = {name: TensorSpec(_DTYPES[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors.items()}
    with SafetensorsWriter(directory, specs) as writer:
        for name, tensor in tensors.items():
            flat = tensor.detach().cpu().contiguous().flatten()
            writer.write(name, flat.view(torch.uint8).numpy())
        writer.finish()


def _link(link: Path, target: str) -> None:
    """Points `link` at a name in its own directory, in one step."""
    partial = beside(link)
    partial.symlink_to(target)
    try:
        os.replace(partial, link)
    except OSError:
        partial.unlink()
        raise
    fsync_directory(link.parent)
