"""Checkpoints of a post-training run: Hugging Face directories, with what resuming needs beside the weights.

    OUTPUT/step-00000100/            config.json, model.safetensors, tokenizer.json: a model to serve or train on
    OUTPUT/step-00000100/optimizer/  optimizer state, and state.json: the step, the recipe, the rollouts' state
    OUTPUT/step-00000100/adapter/    where adapters are trained: they alone (the weights above have them added in)
    OUTPUT/step-00000100/critic/     the value model and its optimizer's state, where there is one

Ranks that run together write one such directory, and optimizer/rollouts-RANK.json beside the first rank's state.

A checkpoint appears whole or not at all; names and links are those of pretraining's (`train.checkpoint`).
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mainspring.errors import CheckpointError
from mainspring.formats.files import replaced_directory, write_json
from mainspring.formats.tokenizer import Tokenizer
from mainspring.model.checkpoint import save_model
from mainspring.model.decoder import Decoder
from mainspring.rl.conversation import Written
from mainspring.rl.critic import Critic
from mainspring.rl.lora import LoraDecoder
from mainspring.rl.rollouts import RolloutState
from mainspring.rl.samples import PolicyModel
from mainspring.rl.trajectories import Trajectory
from mainspring.rl.value_model import ValueModel
from mainspring.train.checkpoint import load_optimizer, publish, random_states, write_tensors
from mainspring.train.optimizer import Optimizer
from mainspring.train.recipe import OptimizerSection

ADAPTER = "adapter"
_VERSION = 1


@dataclass(frozen=True)
class RlState:
    """Where a run stands, apart from its tensors."""

    step: int
    elapsed: float
    """Seconds of training so far, over all sittings."""
    rollouts: RolloutState
    """This rank's, if there are several."""
    recipe: dict[str, Any]
    ranks: int = 1


def save_run(
    output: Path,
    model: Decoder,
    optimizer: Optimizer,
    critic: Critic | None,
    tokenizer: Tokenizer,
    state: RlState,
    keep: int,
) -> Path:
    """Writes OUTPUT/step-N, points OUTPUT/latest at it, deletes all but the newest `keep`. Returns its path."""
    path = output / f"step-{state.step:08d}"
    with replaced_directory(path) as partial:
        if isinstance(model, ValueModel):
            model.save(partial, tokenizer=tokenizer)
        elif isinstance(model, LoraDecoder):
            save_model(model.merged(), partial, tokenizer=tokenizer)
            model.lora.save(partial / ADAPTER)
        else:
            save_model(model, partial, tokenizer=tokenizer)
        (partial / "optimizer").mkdir()
        write_tensors(partial / "optimizer", optimizer.state_tensors() | random_states(model.device))
        if critic is not None:
            save_critic(partial, critic)
        write_state(partial, state)
    publish(output, path, keep)
    return path


def save_critic(directory: Path, critic: Critic) -> None:
    """Into a checkpoint that is being written."""
    critic.model.save(directory / "critic")
    (directory / "critic" / "optimizer").mkdir()
    moments = critic.optimizer.state_tensors() | random_states(critic.model.device)
    write_tensors(directory / "critic" / "optimizer", moments)


def write_state(directory: Path, state: RlState) -> None:
    """Into a checkpoint that is being written, whose optimizer/ is there."""
    write_json(directory / "optimizer" / "state.json", {"version": _VERSION, **asdict(state)})


def rollouts_file(directory: Path, rank: int) -> Path:
    """Where a checkpoint has the rollouts' state of a rank other than the first."""
    return directory / "optimizer" / f"rollouts-{rank}.json"


def read_run_state(path: Path, ranks: int = 1, rank: int = 0) -> RlState:
    """The state of a checkpoint, with the rollouts of this rank.

    Raises CheckpointError if it cannot be read, is not a post-training run's, or was written by another number of
    ranks.
    """
    file = path / "optimizer" / "state.json"
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        version = record["version"]
        if version != _VERSION:
            raise CheckpointError(f"{file} has version {version}; this release reads version {_VERSION}")
        wrote = record.get("ranks", 1)
        if wrote != ranks:
            raise CheckpointError(
                f"{path} was written by {wrote} rank(s), each with its own place among the prompts; this run has "
                f"{ranks}. Start as many, or begin a new run from the weights: --set model.path={str(path)!r}"
            )
        rollouts = record["rollouts"]
        if rank:
            file = rollouts_file(path, rank)
            rollouts = json.loads(file.read_text(encoding="utf-8"))
        return RlState(record["step"], record["elapsed"], _rollouts(rollouts), record["recipe"], wrote)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"cannot read the state of a post-training run from {file}: {type(error).__name__}: {error}"
        ) from error


def _rollouts(record: dict[str, Any]) -> RolloutState:
    carried = tuple(
        tuple(Written(**_tuples(conversation)) for conversation in group) for group in record["carried"]
    )
    ahead = tuple(tuple(Trajectory(**_tuples(answer)) for answer in group) for group in record["ahead"])
    return RolloutState(record["position"], carried, ahead)


def load_run_optimizers(path: Path, optimizer: Optimizer, critic: Critic | None, model: Decoder) -> None:
    """Puts the optimizers' states back. Raises CheckpointError where they do not fit."""
    load_optimizer(path, optimizer, model.device)
    if critic is not None:
        load_optimizer(path / "critic", critic.optimizer, model.device)


def load_critic(path: Path, model: PolicyModel, settings: OptimizerSection) -> Critic:
    """The critic of a checkpoint, with an optimizer whose state is not loaded yet. Raises CheckpointError."""
    if not (path / "critic").is_dir():
        raise CheckpointError(f"{path} has no critic; it was written by another algorithm")
    values = ValueModel.load(
        path / "critic", device=model.device, dtype=model.dtype, numerics=model.policy.numerics
    )
    return Critic(values, Optimizer(values, settings))


def _tuples(record: dict[str, Any]) -> dict[str, Any]:
    """JSON has lists only."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in record.items()}
