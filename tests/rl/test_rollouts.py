"""Rollouts: the trainer's own probabilities, a function of seed and weights, carried over, resumed, refused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from mainspring.engine.config import EngineConfig
from mainspring.engine.sampling_params import SamplingParams
from mainspring.errors import ConfigError, MainspringError
from mainspring.model.decoder import Decoder
from mainspring.rl.environment import Turn
from mainspring.rl.prompts import Prompt
from mainspring.rl.rewards import Completion
from mainspring.rl.rollout_settings import RolloutSettings
from mainspring.rl.rollouts import Rollouts
from mainspring.rl.samples import written_log_probs, written_log_probs_and_entropy
from mainspring.rl.trajectories import Group, pack
from rl import sorting

SETTINGS = RolloutSettings(prompts_per_step=3, group_size=4, max_tokens=9, seed=5)


def rollouts(model: Decoder, settings: RolloutSettings = SETTINGS, **more: Any) -> Rollouts:
    return Rollouts(model, sorting.prompts(7, 1), sorting.TEXTS, sorting.Graded(), settings, **more)


def _is_exact(model: Decoder, groups: list[Group], temperature: float) -> None:
    packed = pack([t for group in groups for t in group])
    with torch.no_grad():
        log_probs, counts = written_log_probs(model, packed.samples, temperature)
    assert torch.equal(log_probs, packed.old_log_probs)
    assert torch.equal(counts, packed.lengths)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_engines_log_probs_are_the_trainers_to_the_bit(temperature: float, dtype: torch.dtype) -> None:
    model = sorting.model("lockstep").to(dtype)
    groups = rollouts(model, sampling=SamplingParams(temperature=temperature)).collect()
    assert [len(g) for g in groups] == [4, 4, 4]
    _is_exact(model, groups, temperature)
    samples = pack(groups[0]).samples
    with_entropy = written_log_probs_and_entropy(model, samples, temperature)
    assert torch.equal(with_entropy[0], written_log_probs(model, samples, temperature)[0])


def test_answers_depend_on_seed_and_place_not_on_how_the_engine_batches() -> None:
    model = sorting.model("lockstep")
    whole = rollouts(model)
    groups = [whole.collect(), whole.collect()]
    narrow = rollouts(model, engine=EngineConfig(max_num_seqs=2, max_num_batched_tokens=3, num_blocks=4))
    assert [narrow.collect(), narrow.collect()] == groups
    assert groups[0] != groups[1]
    assert rollouts(model, replace(SETTINGS, seed=6)).collect() != groups[0]
    answers = [t.tokens for t in groups[0][0]]
    assert len(set(answers)) > 1, "the members of a group are drawn independently"


def test_new_weights_have_a_new_version_and_no_old_keys() -> None:
    model = sorting.model("lockstep")
    source = rollouts(model)
    assert {v for g in source.collect() for t in g for v in t.versions} == {0}
    with torch.no_grad():
        model.embedding.mul_(1.5)
        model.layers[1].attention.qkv.weight.add_(0.3)
    source.take_weights(1)
    groups = source.collect()
    assert {v for g in groups for t in g for v in t.versions} == {1}
    _is_exact(model, groups, 1.0)


def test_a_snapshot_writes_with_the_weights_it_took() -> None:
    model, source = sorting.model("lockstep"), None
    source = rollouts(model, snapshot=True)
    before = rollouts(sorting.model("lockstep"))
    with torch.no_grad():
        model.embedding.mul_(2)
    assert source.collect() == before.collect()
    source.take_weights(1)
    _is_exact(model, source.collect(), 1.0)
    assert not source.is_shared


def test_partial_rollouts_go_on_where_they_stood() -> None:
    model = sorting.model("lockstep")
    settings = replace(SETTINGS, group_size=2)
    whole, sliced = rollouts(model, settings), rollouts(model, replace(settings, slice_tokens=2))
    found: dict[tuple[int, ...], Group] = {}
    for step in range(12):
        sliced.take_weights(step)
        for group in sliced.collect():
            found[tuple(t for x in group for t in x.tokens)] = group
    assert any(len(set(t.versions)) > 1 for g in found.values() for t in g), "some were carried over"
    assert all(list(t.versions) == sorted(t.versions) for g in found.values() for t in g)
    # The weights have not moved: cut into slices, the same answers come.
    for group in whole.collect():
        same = found[tuple(t for x in group for t in x.tokens)]
        assert [t.log_probs for t in same] == [t.log_probs for t in group]


@pytest.mark.parametrize("slice_tokens", [None, 2])
def test_a_run_goes_on_from_its_state_to_the_bit(slice_tokens: int | None) -> None:
    model = sorting.model("lockstep")
    settings = replace(SETTINGS, slice_tokens=slice_tokens)
    first = rollouts(model, settings)
    first.collect()
    state = first.state
    second = rollouts(model, settings)
    second.restore(state)
    for _ in range(3):
        assert first.collect() == second.collect()


class Echo:
    """Says how often it was spoken to, and ends after three turns."""

    def __init__(self) -> None:
        self.turns = 0

    def reset(self, prompt: Prompt) -> None:
        self.turns = 0

    def step(self, answer: str) -> Turn:
        self.turns += 1
        if answer.startswith("7"):
            raise ValueError("sevens are not liked")
        return Turn(text=f"{self.turns}>", done=self.turns == 3, reward=1.0)


@pytest.mark.parametrize("slice_tokens", [None, 3])
def test_an_environment_answers_and_its_tokens_are_not_the_policys(slice_tokens: int | None) -> None:
    model = sorting.model("lockstep")
    settings = replace(SETTINGS, prompts_per_step=6, max_tokens=20, slice_tokens=slice_tokens)
    source = rollouts(model, settings, environment=Echo)
    groups: list[Group] = []
    for _ in range(4):
        twin = rollouts(model, settings, environment=Echo)
        twin.restore(source.state)  # also in the middle of a conversation
        groups += (found := source.collect())
        assert twin.collect() == found
    _is_exact(model, groups, 1.0)
    complete = [t for g in groups for t in g if t.finished]
    assert complete, "some conversations have three turns within their budget"
    for t in complete:
        assert t.reward == 3.0
        told = [token for token, mine in zip(t.tokens, t.written, strict=True) if not mine]
        assert told[-4:] == [1, sorting.SEPARATOR, 2, sorting.SEPARATOR]


class Moody:
    """Gives a reward for what ends within four tokens only."""

    def score(self, completions: Sequence[Completion]) -> list[float | None]:
        return [1.0 if len(c.answer) <= 3 else None for c in completions]


class Broken:
    def score(self, completions: Sequence[Completion]) -> list[float | None]:
        return [None] * len(completions)


def test_samples_without_a_reward_are_dropped_and_counted() -> None:
    source = Rollouts(sorting.model(), sorting.prompts(7, 1), sorting.TEXTS, Moody(), SETTINGS)
    groups = source.collect()
    assert 0 < source.report.dropped < 12
    assert sum(map(len, groups)) == 12 - source.report.dropped
    assert all(groups)
    with pytest.raises(MainspringError, match="none of the 3 groups has a reward"):
        Rollouts(sorting.model(), sorting.prompts(7, 1), sorting.TEXTS, Broken(), SETTINGS).collect()


def test_held_out_prompts_are_answered_without_moving_the_stream() -> None:
    model = sorting.model("lockstep")
    source, other = rollouts(model), rollouts(model)
    held_out = source.answer(sorting.prompts(5, 9), samples=2, temperature=0.0)
    assert [len(g) for g in held_out] == [2] * 5
    assert all(g[0].tokens == g[1].tokens for g in held_out), "the likeliest token leaves no choice"
    assert source.collect() == other.collect()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"top_k": 5}, "top_k = 5"),
        ({"top_p": 0.9}, r"top_p = 0\.9"),
        ({"min_p": 0.1}, "min_p"),
        ({"presence_penalty": 1.0}, "presence_penalty"),
        ({"repetition_penalty": 1.1}, "repetition_penalty"),
        ({"logit_bias": {1: 1.0}}, "logit_bias"),
        ({"min_tokens": 1}, "min_tokens"),
        ({"temperature": 0.0}, "temperature is 0"),
    ],
)
def test_sampling_from_another_distribution_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        rollouts(sorting.model(), sampling=SamplingParams(**change))


def test_settings_that_cannot_be_kept_are_refused() -> None:
    model = sorting.model()
    with pytest.raises(ConfigError, match="group_size = 0"):
        rollouts(model, replace(SETTINGS, group_size=0))
    with pytest.raises(ConfigError, match=r"max_tokens = 900 make 90\d tokens"):
        rollouts(model, replace(SETTINGS, max_tokens=900))
    with pytest.raises(ConfigError, match="'fp8'"):
        rollouts(model, engine=EngineConfig(kv_cache_dtype="fp8"))
    with pytest.raises(ConfigError, match="no prompts"):
        Rollouts(model, [], sorting.TEXTS, sorting.Graded(), SETTINGS)
