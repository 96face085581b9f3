"""What learns in a run from a recipe, over the data-parallel ranks that torchrun has started (ZeRO 0 to 3).

    torchrun --nproc-per-node 2 -m mainspring rl RECIPE --zero 3

Each rank holds its shards of the weights, the masters and the moments, and writes its share of a step's answers with an
engine of the whole model (`rl.ranks`). A checkpoint is the one that one device would write, each rank its own part of
it; where a rank's rollouts stand is beside the optimizer's state in rollouts-RANK.json.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import torch

from mainspring.errors import ConfigError
from mainspring.formats.files import write_json
from mainspring.formats.model_config import ModelConfig
from mainspring.formats.safetensors_file import CheckpointReader
from mainspring.formats.tokenizer import Tokenizer
from mainspring.model.checkpoint import load_model, saved_config
from mainspring.model.decoder import Decoder
from mainspring.model.initialise import torch_dtype
from mainspring.ops import Policy
from mainspring.parallel.checkpoint import (
    agreed,
    check_names,
    held,
    load_weights,
    shared_directory,
    stored_weights,
    write_together,
)
from mainspring.parallel.layout import Layout
from mainspring.parallel.mesh import Mesh
from mainspring.parallel.parallelize import parallelize
from mainspring.parallel.units import Units
from mainspring.rl.checkpoint import RlState, load_critic, rollouts_file, save_critic, write_state
from mainspring.rl.critic import Critic
from mainspring.rl.learner import Asked
from mainspring.rl.ranks import RankRollouts
from mainspring.rl.recipe import GRPO_FAMILY, WITH_CRITIC, RlRecipe
from mainspring.rl.value_model import ValueModel
from mainspring.train.checkpoint import load_optimizer, publish
from mainspring.train.optimizer import Optimizer
from mainspring.train.rank_optimizer import RankOptimizer


class RankLearner:
    """See `learner.Learner`. Every rank makes one, of the same checkpoint, and calls its methods together."""

    def __init__(
        self, recipe: RlRecipe, directory: Path, device: torch.device, start: Path | None, world: int
    ) -> None:
        """directory: of the weights; start: the checkpoint that is continued.

        Raises ConfigError for what does not run over ranks, and what the layout and the weights raise.
        """
        _check(recipe)
        self._recipe = recipe
        config, tp = ModelConfig.from_file(directory), recipe.parallel.tp
        if tp < 1 or world % tp:
            raise ConfigError(
                f"parallel.tp = {tp} does not divide the {world} ranks that torchrun has started"
            )
        layout = Layout(dp=world // tp, tp=tp, zero=recipe.parallel.zero, tp_invariant=tp > 1)
        layout.check(config)
        self._mesh = Mesh.build(layout.axes, key_copies=layout.key_copies(config))
        policy, dtype = Policy(recipe.model.numerics), torch_dtype(recipe.model.dtype)
        empty = Decoder(config, policy=policy, device="meta", dtype=dtype).train()
        self._units = Units(parallelize(empty, layout, self._mesh), device)
        load_weights(self._units, directory)
        self.model = self._units.model
        self.optimizer = RankOptimizer(self._units, recipe.optimizer)
        self.critic = self._make_critic(directory, start)
        self.group = self._mesh.group("dp")
        self.writes_groups = self._mesh.group("tp").rank == 0

    def rollouts(self, asked: Asked) -> RankRollouts:
        return RankRollouts(
            self._units,
            asked.prompts,
            asked.texts,
            asked.scorer,
            self._recipe.rollouts,
            sampling=asked.sampling,
            engine=asked.engine,
            environment=asked.environment,
        )

    def _make_critic(self, directory: Path, start: Path | None) -> Critic | None:
        """Whole on every rank."""
        recipe, model = self._recipe, self.model
        if recipe.algorithm not in WITH_CRITIC:
            return None
        if start is not None:
            return load_critic(start, model, recipe.critic)
        policy = load_model(directory, device=model.device, dtype=model.dtype, numerics=recipe.model.numerics)
        values = ValueModel.of(policy)
        return Critic(values, Optimizer(values, recipe.critic))

    def load_optimizers(self, start: Path) -> None:
        reader = CheckpointReader(start / "optimizer")
        specs = self.optimizer.sharded.checkpoint().specs
        check_names(reader, {name: spec.shape for name, spec in specs.items()})
        self.optimizer.sharded.load(reader)
        if self.critic is not None:
            load_optimizer(start / "critic", self.critic.optimizer, self.model.device)

    def save(self, output: Path, tokenizer: Tokenizer, state: RlState, keep: int) -> Path:
        path, world, units = output / f"step-{state.step:08d}", self._mesh.group("world"), self._units
        weights = held(stored_weights(units), units, "weight", None)
        moments = held(self.optimizer.sharded.checkpoint(), units, "state", None)
        with shared_directory(path, world) as partial:
            write_together(partial, weights, units, world)
            write_together(partial / "optimizer", moments, units, world)
            with agreed(world, f"write {path}"):
                if world.rank == 0:
                    write_json(partial / "config.json", saved_config(self.model.config, self.model.dtype))
                    tokenizer.save(partial)
                    if self.critic is not None:
                        save_critic(partial, self.critic)
                    write_state(partial, state)
                else:
                    write_json(rollouts_file(partial, world.rank), asdict(state.rollouts))
        with agreed(world, f"publish {path}"):
            if world.rank == 0:
                publish(output, path, keep)
        return path


def _check(recipe: RlRecipe) -> None:
    over_ranks = (*GRPO_FAMILY, *WITH_CRITIC)
    if recipe.algorithm not in over_ranks:
        raise ConfigError(
            f"algorithm = {recipe.algorithm!r} runs on one device; over ranks run {', '.join(over_ranks)}"
        )
    engine = recipe.engine
    if recipe.lora.rank or engine.ahead or engine.snapshot or engine.ray_workers:
        raise ConfigError(
            "lora.rank, engine.ahead, engine.snapshot and engine.ray_workers are settings of one device; over ranks "
            "each engine has the whole model's weights, gathered after every step"
        )
