"""Rollouts of a policy that is spread over data-parallel ranks (ZeRO 0 to 3): each rank writes its share of a step.

    units = Units(parallelize(model, Layout.parse("dp=4,zero=3"), mesh), device)
    rollouts = RankRollouts(units, prompts, texts, scorer, RolloutSettings())
    optimizer = RankOptimizer(units, OptimizerSection(lr=1e-6))
    for metrics in grpo(units.model, optimizer, rollouts, settings, group=mesh.group("dp")): ...

Every rank has an engine with the whole model. After a step its weights are gathered from the shards, tensor by tensor,
and their checksum is held against the shards'. All ranks together write what one device would: a prompt's place in the
stream decides who asks it, and its answers' random numbers. The ranks of a tensor-parallel group write the same
answers, which the first of them rewards; trainer and engines then sum in the order that no degree changes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from mainspring.engine.config import EngineConfig
from mainspring.engine.ranks.layout import check_chunks
from mainspring.engine.sampling_params import SamplingParams
from mainspring.errors import ConfigError, LockstepError
from mainspring.model.decoder import Decoder
from mainspring.parallel.collectives import all_reduce
from mainspring.parallel.units import Units
from mainspring.rl.environment import Environment
from mainspring.rl.invariant_decoder import InvariantDecoder
from mainspring.rl.prompts import Prompt, Texts
from mainspring.rl.resharding import Resharding
from mainspring.rl.rewards import Completion, Scorer
from mainspring.rl.rollout_settings import RolloutSettings
from mainspring.rl.rollouts import Rollouts


class RankRollouts(Rollouts):
    """A rank's share. Every rank makes one and calls `take_weights` together; `collect` is each rank's own affair.

    resharding: what the last `take_weights` took. Raises ConfigError for a layout of more than dp, zero and tp with
    tp_invariant (an engine of the whole model would round otherwise than the trainer), for prompts_per_step that the
    ranks cannot share evenly, and for environments under tp, whose ranks might hear different things; else what
    `Rollouts` raises.
    """

    def __init__(
        self,
        units: Units,
        prompts: Sequence[Prompt],
        texts: Texts,
        scorer: Scorer,
        settings: RolloutSettings | None = None,
        *,
        sampling: SamplingParams | None = None,
        engine: EngineConfig | None = None,
        environment: Callable[[], Environment] | None = None,
    ) -> None:
        """settings: of the whole step, as on one device."""
        settings = settings if settings is not None else RolloutSettings()
        group, tp, layout = units.mesh.group("dp"), units.mesh.group("tp"), units.model.layout
        if group.size * tp.size != layout.world or (tp.size > 1 and not layout.tp_invariant):
            raise ConfigError(
                f"layout {layout}: rollouts by engines of the whole model need a layout of dp and zero, and of tp only "
                "with tp_invariant, without which the trainer rounds otherwise than they do"
            )
        if settings.prompts_per_step % group.size:
            raise ConfigError(
                f"prompts_per_step = {settings.prompts_per_step} is no multiple of the {group.size} data-parallel ranks"
            )
        if environment is not None and tp.size > 1:
            raise ConfigError("environments are not shared by tensor-parallel ranks; use tp 1")
        model = units.model
        if tp.size > 1 and model.device.type == "cuda":
            check_chunks(layout, model.config)
        kind = InvariantDecoder if layout.tp_invariant else Decoder
        whole = kind(model.config, policy=model.policy, device=model.device, dtype=model.dtype)
        super().__init__(
            whole.requires_grad_(False),
            prompts,
            texts,
            scorer,
            replace(settings, prompts_per_step=settings.prompts_per_step // group.size),
            sampling=sampling if sampling is not None else SamplingParams(),
            engine=engine,
            environment=environment,
        )
        self._share = (group.rank, group.size)
        self._tp = tp
        self._resharding = Resharding(units, whole)
        self.take_weights(0)

    def take_weights(self, version: int) -> None:
        """See `Rollouts.take_weights`; a collective call. Raises LockstepError where a checksum differs."""
        try:
            self.resharding = self._resharding.run()
        except LockstepError as error:
            raise LockstepError(f"version {version}: {error}") from error
        super().take_weights(version)

    def _scores(self, completions: Sequence[Completion]) -> list[float | None]:
        """By the first rank of a tensor-parallel group for all of it: a function may fail on one and not on another."""
        if self._tp.size == 1:
            return super()._scores(completions)
        found = torch.zeros(2, len(completions), dtype=torch.float64, device=self._model.device)
        if self._tp.rank == 0:
            for place, reward in enumerate(super()._scores(completions)):
                if reward is not None:
                    found[:, place] = torch.tensor([1.0, reward], dtype=torch.float64)
        given, rewards = all_reduce(found, self._tp).tolist()
        return [reward if there else None for there, reward in zip(given, rewards, strict=True)]
