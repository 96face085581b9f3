"""One step off: while the trainer learns from a step's answers, the engine writes the next ones.

It writes with a copy of the weights as they were when the step began, so what is learnt from is one version old. Its
old log-probabilities are those of the weights that wrote it, and `importance_cap` makes up for the rest.
What is checked is the engine against its own copy: a sample of each step's answers goes through that copy's packed
forward pass before the copy is overwritten.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

from mainspring.engine.config import EngineConfig
from mainspring.engine.sampling_params import SamplingParams
from mainspring.model.decoder import Decoder
from mainspring.rl.closes import Closes
from mainspring.rl.environment import Environment
from mainspring.rl.lockstep import LockstepCheck
from mainspring.rl.prompts import Prompt, Texts
from mainspring.rl.rewards import Scorer
from mainspring.rl.rollout_settings import RolloutSettings
from mainspring.rl.rollouts import RolloutReport, Rollouts, RolloutState
from mainspring.rl.trajectories import Group, Trajectory

_CHECKED_TOKENS = 8192  # of a step's answers, prompts included
_GONE = -1  # a version that no token has: the weights that wrote what was restored are not here to check it


class RolloutsAhead(Rollouts, Closes):
    """`collect` gives what was written since the last one, and begins the next; the first waits for its own.

    As deterministic as `Rollouts`: which weights write which answers does not depend on how fast either side is.
    `state` and `answer` wait for what is being written. On a GPU the engine runs without CUDA graphs: capturing one
    forbids the trainer's thread to allocate. Close it, or use it as a context manager. Raises what `Rollouts` raises.
    """

    def __init__(
        self,
        model: Decoder,
        prompts: Sequence[Prompt],
        texts: Texts,
        scorer: Scorer,
        settings: RolloutSettings | None = None,
        *,
        sampling: SamplingParams | None = None,
        engine: EngineConfig | None = None,
        environment: Callable[[], Environment] | None = None,
    ) -> None:
        engine = engine if engine is not None else EngineConfig()
        super().__init__(
            model,
            prompts,
            texts,
            scorer,
            settings,
            sampling=sampling if sampling is not None else SamplingParams(),
            engine=replace(engine, cuda_graphs=False),
            environment=environment,
            snapshot=True,
        )
        self._threads = ThreadPoolExecutor(1, thread_name_prefix="rollouts")
        self._writing: Future[tuple[list[Group], RolloutReport]] | None = None
        self._written: tuple[list[Group], RolloutReport] | None = None
        self._newest = 0
        self._check = LockstepCheck(self.engine_model, self)

    def take_weights(self, version: int) -> None:
        """The trainer's weights have moved: what is begun from here on is written with them."""
        self._newest = version

    def collect(self) -> list[Group]:
        """See `Rollouts.collect`. Raises LockstepError too: of the engine against its own weights."""
        self._settle()
        if self._written is None:
            self._catch_up()
            self._written = self._collect()
        groups, report = self._written
        self._written = None
        self._check.begin()
        # Those that wait longest to be learnt from are the ones carried over.
        self._check.score(_sample([*groups, super().carried()]), _CHECKED_TOKENS)
        self.report = replace(report, max_delta=self._check.max_delta, compared=self._check.num_compared)
        self._catch_up()
        self._writing = self._threads.submit(self._collect)
        return groups

    def carried(self) -> list[Trajectory]:
        """None to be looked at: they are being written on. `collect` has checked some."""
        return []

    @property
    def state(self) -> RolloutState:
        """With the answers that are written and not learnt from yet."""
        self._settle()
        ahead = () if self._written is None else tuple(tuple(group) for group in self._written[0])
        return replace(super().state, ahead=ahead)

    def restore(self, state: RolloutState) -> None:
        super().restore(state)
        self._written = ([list(group) for group in state.ahead], RolloutReport()) if state.ahead else None
        self.version = _GONE

    def answer(
        self, prompts: Sequence[Prompt], *, samples: int = 1, temperature: float | None = None, seed: int = 0
    ) -> list[Group]:
        """See `Rollouts.answer`: by the newest weights."""
        self._settle()
        self._catch_up()
        return super().answer(prompts, samples=samples, temperature=temperature, seed=seed)

    def close(self) -> None:
        """Waits for what is being written, and drops it."""
        self._threads.shutdown(wait=True)

    def _settle(self) -> None:
        """Nothing is being written any more. Raises what went wrong there."""
        if self._writing is not None:
            writing, self._writing = self._writing, None
            self._written = writing.result()

    def _catch_up(self) -> None:
        super().take_weights(self._newest)


def _sample(groups: Sequence[Sequence[Trajectory]]) -> list[Trajectory]:
    """One of each group, as many as have _CHECKED_TOKENS together."""
    chosen: list[Trajectory] = []
    room = _CHECKED_TOKENS
    for group in groups:
        if group and len(group[0].tokens) <= room:
            chosen.append(group[0])
            room -= len(group[0].tokens)
    return chosen
