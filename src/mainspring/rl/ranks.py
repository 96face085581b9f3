"""Rollouts of a policy that is spread over data-parallel ranks (ZeRO 0 to 3): each rank writes its share of a step.

    units = Units(parallelize(model, Layout.parse("dp=4,zero=3"), mesh), device)
    rollouts = RankRollouts(units, prompts, texts, scorer, RolloutSettings())
    optimizer = RankOptimizer(units, OptimizerSection(lr=1e-6))
    for metrics in grpo(units.model, optimizer, rollouts, settings, group=mesh.group("dp")): ...

Every rank has an engine with the whole model. After a step its weights are gathered from the shards, tensor by tensor,
and their checksum is held against the shards'. All ranks together write what one device would: a prompt's place in the
stream decides who asks it, and its answers' random numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from mainspring.engine.config import EngineConfig
from mainspring.engine.sampling_params import SamplingParams
from mainspring.errors import ConfigError, LockstepError
from mainspring.model.decoder import Decoder
from mainspring.parallel.units import Units
from mainspring.rl.environment import Environment
from mainspring.rl.prompts import Prompt, Texts
from mainspring.rl.resharding import Resharding
from mainspring.rl.rewards import Scorer
from mainspring.rl.rollout_settings import RolloutSettings
from mainspring.rl.rollouts import Rollouts


class RankRollouts(Rollouts):
    """A rank's share. Every rank makes one and calls `take_weights` together; `collect` is each rank's own affair.

    resharding: what the last `take_weights` took. Raises ConfigError for a layout other
    than dp and zero (an engine of the whole model would round otherwise than a tensor-parallel trainer), and for
    prompts_per_step that the ranks cannot share evenly; else what `Rollouts` raises.
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
        group = units.mesh.group("dp")
        if group.size != units.model.layout.world:
            raise ConfigError(
                f"the layout has {units.model.layout.world} ranks, {group.size} of them data-parallel; rollouts by "
                "engines of the whole model need a layout of dp and zero only"
            )
        if settings.prompts_per_step % group.size:
            raise ConfigError(
                f"prompts_per_step = {settings.prompts_per_step} is no multiple of the {group.size} ranks"
            )
        model = units.model
        whole = Decoder(model.config, policy=model.policy, device=model.device, dtype=model.dtype)
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
        self._resharding = Resharding(units, whole)
        self.take_weights(0)

    def take_weights(self, version: int) -> None:
        """See `Rollouts.take_weights`; a collective call. Raises LockstepError where a checksum differs."""
        try:
            self.resharding = self._resharding.run()
        except LockstepError as error:
            raise LockstepError(f"version {version}: {error}") from error
        super().take_weights(version)
