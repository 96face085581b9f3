"""Groups of answers by an engine in this process, on the trainer's own tensors: no weight is copied or converted.

    rollouts = Rollouts(model, prompts, texts, RewardWorker(same_number), RolloutSettings())
    groups = rollouts.collect()             # prompts_per_step groups of group_size trajectories
    ...                                     # the optimizer moves the weights
    rollouts.take_weights(version + 1)      # nothing that the old ones computed is used again

What is written depends on the seed, the place in the stream of prompts and the weights alone. A run continues to the
bit with the weights and `state`.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from mainspring.engine.admission import make_request
from mainspring.engine.config import EngineConfig
from mainspring.engine.core import EngineCore
from mainspring.engine.messages import TokenOutput
from mainspring.engine.sampling_params import SamplingParams
from mainspring.engine.weights import copy_weights
from mainspring.errors import ConfigError, MainspringError
from mainspring.model.decoder import Decoder
from mainspring.rl.conversation import Conversation, Written
from mainspring.rl.environment import Environment
from mainspring.rl.prompts import Prompt, Texts, epoch_order
from mainspring.rl.rewards import Completion, Scorer
from mainspring.rl.rollout_settings import UNCHANGED, RolloutSettings, check_rollouts
from mainspring.rl.trajectories import Group, Trajectory
from mainspring.rl.worker import WorkerStartError


@dataclass(frozen=True)
class RolloutState:
    """Where rollouts stand between two steps."""

    position: int = 0
    """Prompts of the endless stream that have been taken, by this rank if there are several."""
    carried: tuple[tuple[Written, ...], ...] = ()
    """Groups that are not finished, each with the conversations that it has so far."""
    ahead: tuple[tuple[Trajectory, ...], ...] = ()
    """Groups that are finished and not learnt from yet, where rollouts run ahead."""


@dataclass(frozen=True)
class RolloutReport:
    """Of the last `collect`."""

    tokens: int = 0
    """Written in it."""
    seconds: float = 0.0
    """Of generation."""
    reward_seconds: float = 0.0
    dropped: int = 0
    """Conversations without a reward."""
    carried: int = 0
    """Conversations that go on in the next step."""
    max_delta: float = 0.0
    """Where rollouts run ahead: of the engine's log-probabilities against its own copy's."""
    compared: int = 0
    """Tokens of which that was measured."""


class Rollouts:
    """Owns the engine. Not thread-safe; nothing else may change the weights while `collect` runs.

    version: of the weights that the engine has, the optimizer's steps so far. engine_model: what the engine computes
    with: the trainer's own model, or a copy that `take_weights` brings up to date (snapshot).

    Raises:
        ConfigError: settings out of range, or that would make the engine's probabilities others than the trainer's.
    """

    def __init__(
        self,
        model: Decoder,
        prompts: Sequence[Prompt],
        texts: Texts,
        scorer: Scorer,
        settings: RolloutSettings | None = None,
        *,
        sampling: SamplingParams = UNCHANGED,
        engine: EngineConfig | None = None,
        environment: Callable[[], Environment] | None = None,
        snapshot: bool = False,
    ) -> None:
        """sampling: its temperature and stop_token_ids count. environment: makes one for each conversation; its
        rewards are then the conversation's, and the scorer is not asked."""
        self.settings = settings if settings is not None else RolloutSettings()
        self.prompts = prompts
        self.temperature = sampling.temperature
        self.version = 0
        self.report = RolloutReport()
        self._model = model
        self._texts = texts
        self._scorer = scorer
        self._environment = environment
        config = engine if engine is not None else EngineConfig()
        check_rollouts(self.settings, sampling, config, model, prompts, texts)
        longest = max(len(prompt.tokens) for prompt in prompts) + self.settings.max_tokens
        if config.max_model_len is None and environment is None:
            config = replace(config, max_model_len=min(longest, model.config.max_position_embeddings))
        self.engine_model = _copy(model) if snapshot else model
        self._core = EngineCore(
            self.engine_model,
            replace(config, logprobs_temperature=sampling.temperature),
        )
        if environment is None and longest > self._core.limits.max_model_len:
            raise ConfigError(
                f"the longest prompt and max_tokens = {self.settings.max_tokens} make {longest} tokens, but the "
                f"engine takes {self._core.limits.max_model_len}; leave longer prompts out or lower max_tokens"
            )
        self._sampling = sampling
        self._position = 0
        self._share = (0, 1)  # which of how many takers of the stream of prompts this one is
        self._order: tuple[int, list[int]] = (-1, [])
        self._carried: list[list[Conversation]] = []
        self.failures = 0
        """Of environments, so far."""
        if self.settings.free_cache:
            self._core.sleep()

    @property
    def is_shared(self) -> bool:
        """The engine computes with the trainer's own tensors."""
        return self.engine_model is self._model

    @property
    def is_lockstep(self) -> bool:
        """The engine's log-probabilities are the trainer's, bit for bit."""
        return self._core.is_lockstep

    @property
    def state(self) -> RolloutState:
        carried = tuple(tuple(c.written for c in group) for group in self._carried)
        return RolloutState(self._position, carried)

    def restore(self, state: RolloutState) -> None:
        """Go on where another `Rollouts` of the same prompts and settings stood."""
        self._position = state.position
        self._carried = [
            [self._again(self.prompts[written.prompt], written) for written in group]
            for group in state.carried
        ]

    def take_weights(self, version: int) -> None:
        """The trainer's weights have moved: the engine writes with them from now on, and forgets the old ones' keys."""
        if not self.is_shared:
            copy_weights(self.engine_model, self._model.hf_tensors())
        self._core.reset_prefix_cache()
        self.version = version

    def collect(self) -> list[Group]:
        """prompts_per_step groups; fewer where unfinished ones are carried over, but never none.

        Raises MainspringError where rewards or environments have failed too often, or no group has a reward at all.
        """
        groups, self.report = self._collect()
        return groups

    def _collect(self) -> tuple[list[Group], RolloutReport]:
        began = time.monotonic()
        settings = self.settings
        groups = self._carried
        while len(groups) < settings.prompts_per_step:
            groups.append(self._next_group())
        tokens = 0
        finished: list[list[Conversation]] = []
        self._carried = []
        while not finished:  # a slice may be too short for any group to end in
            tokens += self._write([c for group in groups for c in group if not c.done])
            finished = [group for group in groups if all(c.done for c in group)]
            groups = [group for group in groups if not all(c.done for c in group)]
        self._carried = groups
        if settings.free_cache:
            self._core.sleep()
        wrote = time.monotonic()
        result = self._rewarded(finished)
        carried = sum(not c.done for group in groups for c in group)
        dropped = sum(map(len, finished)) - sum(map(len, result))
        report = RolloutReport(
            tokens, wrote - began, time.monotonic() - wrote, dropped=dropped, carried=carried
        )
        result = [group for group in result if group]
        if not result:
            raise MainspringError(
                f"none of the {len(finished)} groups has a reward: every one of {dropped} samples was dropped; "
                "see the reward function's failures"
            )
        return result, report

    def carried(self) -> list[Trajectory]:
        """The unfinished conversations so far, their rewards 0: for checks against the weights that wrote them."""
        return [c.trajectory(0.0) for group in self._carried for c in group if c.written.log_probs]

    def answer(
        self, prompts: Sequence[Prompt], *, samples: int = 1, temperature: float | None = None, seed: int = 0
    ) -> list[Group]:
        """Answers to other prompts, held-out ones for instance, and their rewards; the stream of prompts stays.

        Over ranks each answers its share. temperature: None as in training; 0 takes the likeliest token. A trajectory's
        `prompt` counts within `prompts`.
        """
        sampling = replace_temperature(self._sampling, temperature)
        rank, ranks = self._share
        groups = [
            [self._begin(i, p, _seed("validation", seed, i, member)) for member in range(samples)]
            for i, p in list(enumerate(prompts))[rank::ranks]
        ]
        self._write([c for group in groups for c in group if not c.done], sampling, sliced=False)
        if self.settings.free_cache:
            self._core.sleep()
        return self._rewarded(groups)

    def go_on(
        self,
        conversations: Sequence[tuple[Prompt, Written]],
        sampling: SamplingParams | None = None,
        *,
        sliced: bool = True,
    ) -> list[Written]:
        """What becomes of conversations that were begun elsewhere, unrewarded; the stream of prompts stays."""
        begun = []
        for prompt, written in conversations:
            begun.append(self._again(prompt, written))
        self._write([c for c in begun if not c.done], sampling, sliced=sliced)
        if self.settings.free_cache:
            self._core.sleep()
        return [conversation.written for conversation in begun]

    def _next_group(self) -> list[Conversation]:
        rank, ranks = self._share
        position = self._position * ranks + rank
        epoch, at = divmod(position, len(self.prompts))
        if self._order[0] != epoch:
            self._order = (epoch, epoch_order(epoch, len(self.prompts), self.settings.seed))
        index = self._order[1][at]
        seeds = [
            _seed("training", self.settings.seed, position, member)
            for member in range(self.settings.group_size)
        ]
        self._position += 1
        return [self._begin(index, self.prompts[index], seed) for seed in seeds]

    def _begin(self, index: int, prompt: Prompt, seed: int) -> Conversation:
        environment = None if self._environment is None else self._environment()
        conversation = Conversation(index, prompt, seed, environment, self._texts)
        self._tell(conversation, conversation.begin)
        return conversation

    def _again(self, prompt: Prompt, written: Written) -> Conversation:
        environment = None if self._environment is None else self._environment()
        conversation = Conversation(written.prompt, prompt, written.seed, environment, self._texts)
        self._tell(conversation, partial(conversation.replay, written))
        return conversation

    def _write(
        self,
        conversations: Sequence[Conversation],
        sampling: SamplingParams | None = None,
        *,
        sliced: bool = True,
    ) -> int:
        """Let the engine write until each is done or has had its slice; returns the tokens written."""
        if self._core.is_sleeping:
            self._core.wake()
        sampling = self._sampling if sampling is None else sampling
        slice_tokens = self.settings.slice_tokens if sliced else None
        limits = [
            self.settings.max_tokens
            if slice_tokens is None
            else min(self.settings.max_tokens, c.num_written + slice_tokens)
            for c in conversations
        ]
        open_ = {str(i): conversation for i, conversation in enumerate(conversations)}
        written = 0
        try:
            for name in list(open_):
                self._request(name, open_[name], limits[int(name)], sampling)
            while open_:
                for output in self._core.step():
                    written += len(output.token_ids)
                    conversation = open_[output.request_id]
                    conversation.take(output.token_ids, _log_probs(output), self.version)
                    if output.finish_reason is None:
                        continue
                    goes_on = self._turn_over(conversation, output, limits[int(output.request_id)])
                    if goes_on:
                        self._request(
                            output.request_id, conversation, limits[int(output.request_id)], sampling
                        )
                    else:
                        del open_[output.request_id]
        finally:
            for name in open_:
                self._core.abort(name)
        return written

    def _request(self, name: str, conversation: Conversation, limit: int, sampling: SamplingParams) -> None:
        params = SamplingParams(
            temperature=sampling.temperature,
            stop_token_ids=sampling.stop_token_ids,
            seed=conversation.seed,
            max_tokens=limit - conversation.num_written,
            logprobs=0,
        )
        limits = self._core.limits
        self._core.add_request(make_request(name, conversation.tokens, params, limits, self._texts.ends))

    def _turn_over(self, conversation: Conversation, output: TokenOutput, limit: int) -> bool:
        """A request has ended: whether the conversation goes on within this step."""
        if output.finish_reason == "length":
            # At the end of a slice it waits for the next step; at the end of its budget it is over.
            cut = (
                limit < self.settings.max_tokens
                and len(conversation.tokens) < self._core.limits.max_model_len
            )
            if not cut:
                conversation.end(finished=False)
            return False
        self._tell(conversation, conversation.turn_over)
        if conversation.done:
            return False
        room = self._core.limits.max_model_len - len(conversation.tokens)
        over = conversation.num_written >= self.settings.max_tokens
        if room < 1 or over or conversation.turns >= self.settings.max_turns:
            conversation.end(finished=False)
            return False
        return conversation.num_written < limit

    def _tell(self, conversation: Conversation, what: Callable[[], None]) -> None:
        """Lets an environment hear something; what it raises is that sample's failure."""
        try:
            what()
        except WorkerStartError:
            raise
        except Exception as error:
            conversation.fail()
            self._count_failure(error)

    def _count_failure(self, error: Exception) -> None:
        self.failures += 1
        if self.failures > self.settings.max_failures:
            raise MainspringError(
                f"environments have failed {self.failures} times, more than max_failures = "
                f"{self.settings.max_failures}; the last time: {type(error).__name__}: {error}"
            ) from error

    def _scores(self, completions: Sequence[Completion]) -> list[float | None]:
        return self._scorer.score(completions)

    def _rewarded(self, groups: Sequence[Sequence[Conversation]]) -> list[Group]:
        """Those that have a reward, as trajectories."""
        ended = [c for group in groups for c in group]
        if self._environment is None:
            rewards = self._scores([c.completion() for c in ended])
        else:
            rewards = [None if c.failed else c.reward for c in ended]
        left = iter(rewards)
        return [
            [c.trajectory(reward) for c, reward in zip(group, left) if reward is not None]  # noqa: B905 - the next group takes its own
            for group in groups
        ]


def replace_temperature(sampling: SamplingParams, temperature: float | None) -> SamplingParams:
    """The same but for the temperature, if one is given."""
    if temperature is None:
        return sampling
    return SamplingParams(temperature=temperature, stop_token_ids=sampling.stop_token_ids)


def _log_probs(output: TokenOutput) -> list[float]:
    assert output.logprobs is not None  # asked for in `_request`
    return [entry.logprobs[0] for entry in output.logprobs]


def _seed(*parts: object) -> int:
    """63 bits that differ wherever a part does."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest) >> 1


@torch.no_grad()
def _copy(model: Decoder) -> Decoder:
    copy = Decoder(model.config, policy=model.policy, device=model.device, dtype=model.dtype)
    copy.requires_grad_(False)
    copy_weights(copy, model.hf_tensors())
    return copy
