"""Value and reward models: their numbers are transformers', their gradients their own, pairs teach them to rank."""

from __future__ import annotations

import json
import math
from collections import deque
from itertools import islice
from pathlib import Path

import pytest
import torch
import transformers

from mainspring.errors import CheckpointError, ConfigError, MainspringError, UnsupportedModelError
from mainspring.model.checkpoint import save_model
from mainspring.rl.reward_model import ModelRewards, RewardModelSettings, rank, reward_model
from mainspring.rl.rewards import Completion
from mainspring.rl.samples import Sample
from mainspring.rl.value_model import Task, ValueModel
from mainspring.train.optimizer import Optimizer
from mainspring.train.recipe import OptimizerSection, ScheduleSection
from rl import oracles, sorting
from train.models import tiny_model

STEADY = ScheduleSection(kind="constant", warmup_fraction=0.0)
SEQUENCES = [[3, 1, 2, 10, 1, 2], [5, 10], [9, 8, 7, 10, 7, 8, 9, 11]]
AUTO = {
    "token": transformers.AutoModelForTokenClassification,
    "sequence": transformers.AutoModelForSequenceClassification,
}


def _with_head(task: Task, seed: int = 0) -> ValueModel:
    model = ValueModel.of(sorting.model(seed=seed), task)
    with torch.no_grad():
        for parameter in model.score.parameters():
            parameter.normal_(0, 1, generator=torch.Generator().manual_seed(seed))
    return model


@pytest.mark.parametrize("task", ["token", "sequence"])
def test_a_saved_value_model_is_one_of_transformers_and_loads_back_to_the_bit(
    task: Task, tmp_path: Path
) -> None:
    model = _with_head(task)
    model.save(tmp_path / "value")
    theirs = AUTO[task].from_pretrained(tmp_path / "value", pad_token_id=0)
    assert type(theirs).__name__ == f"Qwen3For{task.capitalize()}Classification"
    with torch.no_grad():
        for sequence, values, score in zip(
            SEQUENCES, model.values(SEQUENCES), model.scores(SEQUENCES), strict=True
        ):
            logits = theirs.eval()(torch.tensor([sequence])).logits[0, ..., 0]
            ours = torch.cat([values, score[None]]) if task == "token" else score
            torch.testing.assert_close(ours, logits, rtol=1e-4, atol=1e-5)
    back = ValueModel.load(tmp_path / "value")
    assert back.task == task
    for (name, a), b in zip(model.named_parameters(), back.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_an_untied_policy_gives_a_critic_without_its_output_embedding(tmp_path: Path) -> None:
    policy = tiny_model(tie_word_embeddings=False)
    critic = ValueModel.of(policy)
    assert critic.num_parameters == policy.num_parameters - policy.output_weight.numel() + 16 + 1
    assert not critic.values([[1, 2, 3]])[0].any()  # the head begins at zero
    assert torch.equal(critic.embedding, policy.embedding)
    critic.embedding.data.zero_()
    assert policy.embedding.any()  # a copy
    critic.save(tmp_path / "critic")
    assert ValueModel.load(tmp_path / "critic", dtype="bfloat16").dtype == torch.bfloat16


def test_a_critic_that_begins_as_a_reward_model_scores_as_it_does() -> None:
    judge = _with_head("sequence")
    critic = ValueModel.of(judge)
    assert torch.equal(critic.scores(SEQUENCES), judge.scores(SEQUENCES))


def test_values_look_only_backwards_and_do_not_depend_on_the_packing() -> None:
    model = _with_head("token")
    together = model.values(SEQUENCES)
    assert (model.values([]), model.scores([]).shape) == ([], (0,))
    for sequence, values in zip(SEQUENCES, together, strict=True):
        torch.testing.assert_close(values, model.values([sequence])[0])
        prefixes = model.scores([sequence[: i + 1] for i in range(len(sequence) - 1)])
        torch.testing.assert_close(values, prefixes)


def test_written_values_stand_where_the_written_tokens_were_chosen() -> None:
    model = _with_head("token")
    samples = [
        Sample((3, 1, 10, 1, 3, 11), (False,) * 3 + (True,) * 3),
        Sample((4, 10, 4, 2, 11), (False, False, True, False, True)),
    ]
    before = [[3, 1, 10], [3, 1, 10, 1], [3, 1, 10, 1, 3], [4, 10], [4, 10, 4, 2]]
    torch.testing.assert_close(model.written_values(samples), model.scores(before))


def test_files_that_hold_no_value_model_are_refused(tmp_path: Path) -> None:
    policy = sorting.model()
    save_model(policy, tmp_path / "policy")
    with pytest.raises(
        UnsupportedModelError, match="architecture 'Qwen3ForCausalLM'; a value model's ends in"
    ):
        ValueModel.load(tmp_path / "policy")
    config = json.loads((tmp_path / "policy" / "config.json").read_text())
    config["architectures"] = ["Qwen3ForTokenClassification"]
    (tmp_path / "policy" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"lacks 2 .*score\.bias"):
        ValueModel.load(tmp_path / "policy")


def test_reward_training_begins_at_log_two_and_reports_what_it_optimises() -> None:
    judge, pairs = _with_head("sequence"), sorting.pairs(8, 3)
    chosen = judge.scores([p.chosen.tokens for p in pairs]).tolist()
    rejected = judge.scores([p.rejected.tokens for p in pairs]).tolist()
    settings = RewardModelSettings(8, tokens_per_microbatch=40, schedule=STEADY, margin=0.5)
    found = next(reward_model(judge, Optimizer(judge, OptimizerSection(lr=1e-3)), pairs, settings)).ranking
    differences = [c - r for c, r in zip(chosen, rejected, strict=True)]
    losses = [-math.log(oracles.sigmoid(d - 0.5)) for d in differences]
    assert found.loss == pytest.approx(sum(losses) / 8, rel=1e-4)
    assert found.accuracy == sum(d > 0 for d in differences) / 8
    assert found.difference == pytest.approx(sum(differences) / 8, rel=1e-4)
    fresh = ValueModel.of(sorting.model(), "sequence")
    assert rank(fresh, pairs).loss == pytest.approx(math.log(2))


def test_a_reward_model_learns_to_rank_held_out_answers_and_scores_conversations() -> None:
    judge = ValueModel.of(sorting.model(), "sequence")
    settings = RewardModelSettings(32, max_steps=60, schedule=STEADY)
    steps = reward_model(judge, Optimizer(judge, OptimizerSection(lr=1e-2)), sorting.pairs(1500, 1), settings)
    deque(steps, maxlen=0)
    held_out = rank(judge, sorting.pairs(200, 2), 100)
    assert held_out.accuracy > 0.85
    conversations = [(3, 1, 10, 1, 3, 11), (9, 7, 8, 10, 7, 8, 9, 11), (4, 10, 11)]
    completions = [Completion("", "", "", tokens) for tokens in conversations]
    expected = judge.scores(conversations).tolist()
    assert ModelRewards(judge, tokens_per_microbatch=8).score(completions) == pytest.approx(
        expected, rel=1e-4
    )
    with pytest.raises(ConfigError, match="a completion has none"):
        ModelRewards(judge).score([Completion("3", "3", "3")])


def test_reward_training_does_not_depend_on_the_cut_and_continues_to_the_bit() -> None:
    pairs = sorting.pairs(20, 7)
    ends: list[ValueModel] = []
    for stop_at, tokens in ((8, 10**6), (4, 10**6), (8, 60)):
        judge = _with_head("sequence")
        settings = RewardModelSettings(6, tokens_per_microbatch=tokens, max_steps=8)
        # A large eps makes AdamW's step a smooth function of the gradient.
        optimizer = Optimizer(judge, OptimizerSection(lr=0.1, eps=1.0, weight_decay=0.0))
        deque(islice(reward_model(judge, optimizer, pairs, settings), stop_at), maxlen=0)
        resumed = _with_head("sequence", seed=5)
        resumed.load_state_dict(judge.state_dict())
        other = Optimizer(resumed, OptimizerSection(lr=0.1, eps=1.0, weight_decay=0.0))
        other.load_state_tensors({name: t.clone() for name, t in optimizer.state_tensors().items()})
        deque(reward_model(resumed, other, pairs, settings, first_step=stop_at), maxlen=0)
        ends.append(resumed)
    for (name, a), b, c in zip(
        ends[0].named_parameters(), ends[1].parameters(), ends[2].parameters(), strict=True
    ):
        assert torch.equal(a, b), name
        torch.testing.assert_close(a, c, rtol=0, atol=1e-5)


def test_bad_pairs_and_losses_that_are_not_finite_stop_reward_training() -> None:
    judge = ValueModel.of(sorting.model(), "sequence")
    with pytest.raises(ConfigError, match="no pairs"):
        rank(judge, [])
    with torch.no_grad():
        judge.embedding[sorting.END] = torch.inf
    optimizer = Optimizer(judge, OptimizerSection())
    with pytest.raises(MainspringError, match="step 1: the loss is nan"):
        next(reward_model(judge, optimizer, sorting.pairs(4, 0), RewardModelSettings(4)))
