"""PPO, VC-PPO and VAPO: what a step computes, what each adds to the one before, and that they learn."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice

import pytest
import torch
from torch import Tensor

from mainspring.errors import ConfigError, MainspringError
from mainspring.model.decoder import Decoder
from mainspring.rl.critic import Critic, judged
from mainspring.rl.policy_update import MicroBatch, mini_batches
from mainspring.rl.ppo import PpoSettings, clipped_loss, gae_estimate, ppo
from mainspring.rl.ppo_metrics import PpoMetrics
from mainspring.rl.prompts import Prompt
from mainspring.rl.reward_model import ModelRewards
from mainspring.rl.rewards import Completion, Scorer
from mainspring.rl.rollout_settings import RolloutSettings
from mainspring.rl.rollouts import Rollouts
from mainspring.rl.samples import written_log_probs, written_log_probs_and_entropy
from mainspring.rl.trajectories import Trajectory, pack
from mainspring.rl.value_model import ValueModel
from mainspring.rl.vapo import VapoSettings, imitating_loss, length_adaptive_estimate, vapo
from mainspring.rl.vc_ppo import VcPpoSettings, vc_ppo
from mainspring.train.optimizer import Optimizer
from mainspring.train.recipe import OptimizerSection, ScheduleSection
from rl import oracles, sorting

STEADY = ScheduleSection(kind="constant", warmup_fraction=0.0)
# A large eps makes AdamW's step a smooth function of the gradient, so that equal weights mean equal gradients.
SMOOTH = OptimizerSection(lr=0.1, eps=1.0, weight_decay=0.0)
QUICK = OptimizerSection(lr=1e-2, weight_decay=0.0)


class Run:
    """A policy, its critic and its rollouts, as they are at the start."""

    def __init__(
        self,
        optimizer: OptimizerSection = SMOOTH,
        *,
        scorer: Scorer | None = None,
        prompts: Sequence[Prompt] | None = None,
        seed: int = 0,
    ) -> None:
        self.model = sorting.model("lockstep", seed)
        self.optimizer = Optimizer(self.model, optimizer)
        values = ValueModel.of(self.model)
        self.critic = Critic(values, Optimizer(values, optimizer))
        self.rollouts = Rollouts(
            self.model,
            prompts if prompts is not None else sorting.prompts(9, 1),
            sorting.TEXTS,
            scorer if scorer is not None else sorting.Graded(),
            RolloutSettings(prompts_per_step=3, group_size=4, max_tokens=7, seed=2),
        )

    def ppo(
        self, settings: PpoSettings, reference: Decoder | None = None, first_step: int = 0
    ) -> list[PpoMetrics]:
        return list(
            ppo(
                self.model,
                self.optimizer,
                self.critic,
                self.rollouts,
                settings,
                reference=reference,
                first_step=first_step,
            )
        )

    def answers(self) -> list[Trajectory]:
        return [answer for group in self.rollouts.collect() for answer in group]


def _equal(one: Decoder, other: Decoder, atol: float = 0.0) -> None:
    for (name, a), b in zip(one.named_parameters(), other.parameters(), strict=True):
        assert (a - b).abs().max() <= atol, name


def _moved(model: Decoder) -> float:
    start = sorting.model("lockstep")
    return max(
        float((a - b).detach().abs().max())
        for a, b in zip(model.parameters(), start.parameters(), strict=False)
    )


def test_a_step_judges_answers_by_rewards_values_and_the_reference() -> None:
    run, reference = Run(), sorting.model("lockstep", seed=4)
    with torch.no_grad():
        run.critic.model.score.weight.normal_(0, 0.5, generator=torch.Generator().manual_seed(1))
    answers = run.answers()
    settings = PpoSettings(gamma=0.9, lam=0.8)
    found = judged(
        answers,
        run.critic,
        gae_estimate(settings),
        reference=reference,
        kl_reward=0.3,
        temperature=1.0,
        whiten=False,
        tokens_per_microbatch=40,
    )
    advantages, returns = [], []
    for answer in answers:
        samples = [answer.sample]
        values = run.critic.model.written_values(samples).tolist()
        theirs = written_log_probs(reference, samples)[0].tolist()
        rewards = [-0.3 * (p - q) for p, q in zip(answer.log_probs, theirs, strict=True)]
        rewards[-1] += answer.reward
        own = oracles.advantages(rewards, values, [True] * len(values), 0.9, 0.8, 0.0)
        advantages += own
        returns += [a + v for a, v in zip(own, values, strict=True)]
    assert found.advantages.tolist() == pytest.approx(advantages, abs=1e-5)
    assert found.returns.tolist() == pytest.approx(returns, abs=1e-5)
    part = found.select([5, 0])
    first, second = (found.batch.lengths[:n].sum() for n in (5, 6))
    assert part.advantages.tolist() == [
        *found.advantages[first:second].tolist(),
        *found.advantages[: found.batch.lengths[0]].tolist(),
    ]
    assert part.batch.samples == (answers[5].sample, answers[0].sample)


def test_the_first_step_is_on_policy_to_the_bit_and_reports_its_answers() -> None:
    run, twin = Run(), Run()
    answers = twin.answers()
    metrics = run.ppo(PpoSettings(max_steps=1, schedule=STEADY, whiten=False, loss_mean="tokens"))[0]
    assert metrics.max_delta == 0.0
    assert (metrics.clip_fraction, metrics.kl_old) == (0.0, 0.0)
    assert metrics.reward == pytest.approx(sum(a.reward for a in answers) / 12)
    assert metrics.tokens == sum(a.num_written for a in answers)
    assert metrics.finished == sum(a.finished for a in answers) / 12
    # The critic begins at zero and every λ-weighted sum of its errors is λ^(distance to the end) · reward.
    weights = [0.95 ** (a.num_written - 1 - i) * a.reward for a in answers for i in range(a.num_written)]
    assert metrics.loss == pytest.approx(-sum(weights) / len(weights), rel=1e-5)
    assert metrics.value_loss == pytest.approx(sum(w * w for w in weights) / len(weights) / 2, rel=1e-5)
    assert metrics.explained_variance == pytest.approx(0.0, abs=1e-6)
    _, entropy, _ = written_log_probs_and_entropy(twin.model, [a.sample for a in answers])
    assert metrics.entropy == pytest.approx(float(entropy.detach().mean()), rel=1e-5)
    assert (metrics.compared, metrics.lag, len(metrics.groups)) == (metrics.tokens, 0.0, 3)
    assert math.isnan(metrics.kl_reference)


def _micro(model: Decoder, answers: Sequence[Trajectory], shift: Tensor) -> MicroBatch:
    packed = pack(answers)
    log_probs, entropy, lengths = written_log_probs_and_entropy(model, packed.samples)
    old = log_probs.detach() - shift
    whole = slice(0, len(answers)), slice(0, len(log_probs))
    return MicroBatch(packed.samples, *whole, lengths, log_probs, entropy, old, packed.versions)


def test_losses_are_their_formulas() -> None:
    run = Run()
    answers = [replace(a, reward=float(i % 3 == 0)) for i, a in enumerate(run.answers())]
    reference = sorting.model("lockstep", seed=4)
    experience = judged(
        answers,
        run.critic,
        gae_estimate(PpoSettings()),
        reference=reference,
        kl_reward=0.0,
        temperature=1.0,
        whiten=True,
        tokens_per_microbatch=1000,
    )
    num_tokens, lengths = experience.batch.num_tokens, experience.batch.lengths.tolist()
    shift = torch.randn(num_tokens, generator=torch.Generator().manual_seed(0)) * 0.3
    micro = _micro(run.model, answers, shift)
    settings = VapoSettings(entropy_bonus=0.01, kl_loss=0.2, dual_clip=3.0)
    with torch.no_grad():
        share, sums = imitating_loss(settings)(experience)(micro)
    assert experience.reference_log_probs is not None
    losses, nll, right = [], 0.0, 0
    rewards = experience.batch.rewards.repeat_interleave(experience.batch.lengths)
    for x, a, p, q, h, reward in zip(
        (micro.log_probs - micro.old_log_probs).tolist(),
        experience.advantages.tolist(),
        micro.log_probs.tolist(),
        experience.reference_log_probs.tolist(),
        micro.entropy.tolist(),
        rewards.tolist(),
        strict=True,
    ):
        k3 = math.expm1(q - p) - (q - p)
        losses.append(oracles.policy_loss(x, a, 0.2, 0.28, 3.0)[0] - 0.01 * h + 0.2 * k3)
        if reward == 1.0:
            nll -= p
            right += 1
    assert float(share) == pytest.approx(sum(losses) / num_tokens + 0.1 * nll / right, rel=1e-4)
    assert float(sums["entropy"]) == pytest.approx(float(micro.entropy.detach().sum()))
    by_answer = replace(settings, loss_mean="sequences", positive_nll=0.0)
    means = [float(t.mean()) for t in torch.tensor(losses).split(lengths)]
    assert float(clipped_loss(by_answer)(experience)(micro)[0].detach()) == pytest.approx(
        sum(means) / 12, rel=1e-4
    )
    # Where the weights at the step's beginning are others than those that wrote, ratios are to the former, and tokens
    # weigh by their probability over the latter's, capped.
    nearby = micro.log_probs.detach() - 0.3 * torch.randn(
        num_tokens, generator=torch.Generator().manual_seed(5)
    )
    weights = (nearby - micro.old_log_probs).exp().clamp(max=1.1)
    assert 0 < int((weights == 1.1).sum()) < num_tokens
    ratios = (micro.log_probs.detach() - nearby).tolist()
    surrogates = [
        oracles.policy_loss(x, a, 0.2, 0.2, None)[0]
        for x, a in zip(ratios, experience.advantages.tolist(), strict=True)
    ]
    capped = PpoSettings(importance_cap=1.1, loss_mean="tokens")
    found = clipped_loss(capped)(replace(experience, nearby_log_probs=nearby))(micro)[0]
    assert float(found.detach()) == pytest.approx(
        float((weights * torch.tensor(surrogates)).mean()), rel=1e-4
    )
    none_right = replace(settings, right_from=2.0)
    expected = sum(losses) / num_tokens
    assert float(imitating_loss(none_right)(experience)(micro)[0].detach()) == pytest.approx(
        expected, rel=1e-4
    )


@pytest.mark.parametrize("algorithm", ["ppo", "vapo"])
def test_runs_do_not_depend_on_tokens_per_microbatch(algorithm: str) -> None:
    runs = [Run(), Run()]
    for run, tokens in zip(runs, (10**6, 40), strict=True):
        if algorithm == "ppo":
            run.ppo(PpoSettings(max_steps=2, tokens_per_microbatch=tokens, schedule=STEADY, mini_batches=2))
        else:
            settings = VapoSettings(
                max_steps=2, tokens_per_microbatch=tokens, schedule=STEADY, warmup_steps=1, right_from=0.2
            )
            deque(vapo(run.model, run.optimizer, run.critic, run.rollouts, settings), maxlen=0)
    assert _moved(runs[0].model) > 1e-3
    assert _moved(runs[0].critic.model) > 1e-5
    _equal(runs[0].model, runs[1].model, atol=1e-5)
    _equal(runs[0].critic.model, runs[1].critic.model, atol=1e-5)


def test_stopped_runs_continue_to_the_bit() -> None:
    settings = VapoSettings(max_steps=5, warmup_steps=1, mini_batches=2, epochs=2, right_from=0.2)
    whole, stopped = Run(QUICK), Run(QUICK)
    deque(vapo(whole.model, whole.optimizer, whole.critic, whole.rollouts, settings), maxlen=0)
    deque(
        islice(vapo(stopped.model, stopped.optimizer, stopped.critic, stopped.rollouts, settings), 3),
        maxlen=0,
    )
    resumed = Run(QUICK, seed=8)
    for ours, theirs, optimizer, old in (
        (resumed.model, stopped.model, resumed.optimizer, stopped.optimizer),
        (resumed.critic.model, stopped.critic.model, resumed.critic.optimizer, stopped.critic.optimizer),
    ):
        ours.load_state_dict(theirs.state_dict())
        optimizer.load_state_tensors({name: t.clone() for name, t in old.state_tensors().items()})
    resumed.rollouts.restore(stopped.rollouts.state)
    steps = vapo(resumed.model, resumed.optimizer, resumed.critic, resumed.rollouts, settings, first_step=3)
    assert [m.step for m in steps] == [4, 5]
    _equal(resumed.model, whole.model)
    _equal(resumed.critic.model, whole.critic.model)


class _ByPrompt:
    """What the answer is does not matter: even digits are worth 1, odd ones nothing."""

    def score(self, completions: Sequence[Completion]) -> list[float | None]:
        return [float(int(c.prompt[0]) % 2 == 0) for c in completions]


def test_value_pretraining_teaches_the_critic_and_leaves_the_policy() -> None:
    run = Run(QUICK, scorer=_ByPrompt())
    with (
        torch.no_grad()
    ):  # a trunk that has learnt to look at the prompt would have larger weights than a new one
        for parameter in run.critic.model.layers.parameters():
            parameter.mul_(10.0 if parameter.ndim == 2 else 1.0)
    settings = VcPpoSettings(max_steps=21, warmup_steps=20, schedule=STEADY)
    steps = vc_ppo(run.model, run.optimizer, run.critic, run.rollouts, settings)
    metrics = list(islice(steps, 20))
    assert _moved(run.model) == 0.0
    assert max(m.explained_variance for m in metrics[:3]) < 0.3
    assert min(m.explained_variance for m in metrics[-3:]) > 0.8
    assert all(math.isnan(m.loss) for m in metrics)
    assert all(m.compared > 0 and m.max_delta == 0.0 for m in metrics)  # lockstep is watched all the same
    assert not math.isnan(next(steps).loss)
    assert _moved(run.model) > 0.0


def test_what_each_adds_can_be_taken_away() -> None:
    """VAPO without its parts is VC-PPO, and VC-PPO without its own is PPO, to the bit."""
    common = {"max_steps": 3, "schedule": STEADY, "mini_batches": 2}
    runs = [Run(QUICK) for _ in range(4)]
    runs[0].ppo(PpoSettings(**common))
    plain = VcPpoSettings(**common, warmup_steps=0, critic_lam=0.95)
    deque(vc_ppo(runs[1].model, runs[1].optimizer, runs[1].critic, runs[1].rollouts, plain), maxlen=0)
    bare = VapoSettings(
        **common,
        warmup_steps=0,
        critic_lam=0.95,
        clip_high=0.2,
        loss_mean="sequences",
        alpha=None,
        positive_nll=0.0,
    )
    for run, settings in zip(runs[2:], (bare, replace(bare, critic_lam=1.0)), strict=True):
        deque(vapo(run.model, run.optimizer, run.critic, run.rollouts, settings), maxlen=0)
    _equal(runs[0].model, runs[1].model)
    _equal(runs[1].model, runs[2].model)
    _equal(runs[1].critic.model, runs[2].critic.model)
    critics = [run.critic.model.score.weight for run in runs[2:]]
    assert not torch.equal(*critics)


def test_each_answer_has_the_lambda_of_its_length() -> None:
    answers = Run().answers()
    batch = pack(answers)
    rewards = torch.zeros(batch.num_tokens).index_put((batch.last,), torch.ones(len(answers)))
    estimate = length_adaptive_estimate(VapoSettings(alpha=1.0, shortest_lam=0.3))
    advantages, returns = estimate(batch, rewards, torch.zeros_like(rewards))
    assert returns.tolist() == [1.0] * batch.num_tokens
    for length, own in zip(batch.lengths.tolist(), advantages.split(batch.lengths.tolist()), strict=True):
        lam = max(1 - 1 / length, 0.3)
        assert own.tolist() == pytest.approx([lam ** (length - 1 - i) for i in range(length)])


def test_a_penalty_keeps_the_policy_near_the_reference() -> None:
    drifts = []
    for kl_reward, kl_loss in ((0.0, 0.0), (2.0, 0.0), (0.0, 5.0)):
        run = Run(QUICK, scorer=_EndsAtOnce(), prompts=[Prompt((1, sorting.SEPARATOR), "1>", "")])
        settings = PpoSettings(max_steps=12, schedule=STEADY, kl_reward=kl_reward, kl_loss=kl_loss, lam=1.0)
        metrics = run.ppo(settings, reference=sorting.model("lockstep"))
        drifts.append(metrics[-1].kl_reference)
    assert drifts[1] < 0.7 * drifts[0]
    assert drifts[2] < 0.7 * drifts[0]


class _EndsAtOnce:
    """Likes answers that say nothing: a bandit with twelve arms, one of them the end."""

    def score(self, completions: Sequence[Completion]) -> list[float | None]:
        return [1.0 if not c.answer else 0.0 for c in completions]


@pytest.mark.parametrize("algorithm", ["ppo", "vc_ppo", "vapo"])
def test_a_bandit_is_learnt_in_a_few_steps(algorithm: str) -> None:
    run = Run(QUICK, scorer=_EndsAtOnce(), prompts=[Prompt((1, sorting.SEPARATOR), "1>", "")])
    common = {"max_steps": 25, "schedule": STEADY}
    parts = (run.model, run.optimizer, run.critic, run.rollouts)
    if algorithm == "ppo":
        metrics = run.ppo(PpoSettings(**common))
    elif algorithm == "vc_ppo":
        metrics = list(vc_ppo(*parts, VcPpoSettings(**common, warmup_steps=3)))
    else:
        metrics = list(vapo(*parts, VapoSettings(**common, warmup_steps=3)))
    assert sum(m.reward for m in metrics[:4]) / 4 < 0.4
    assert sum(m.reward for m in metrics[-4:]) / 4 > 0.85
    assert {m.max_delta for m in metrics} == {0.0}


def test_a_reward_model_gives_the_rewards() -> None:
    judge = ValueModel.of(sorting.model("lockstep", seed=3), "sequence")
    with torch.no_grad():
        judge.score.weight.normal_(0, 1, generator=torch.Generator().manual_seed(0))
    run = Run(scorer=ModelRewards(judge))
    answers = run.answers()
    assert [a.reward for a in answers] == pytest.approx(
        judge.scores([a.tokens for a in answers]).tolist(), rel=1e-4
    )
    assert len({a.reward for a in answers}) > 6
    assert math.isfinite(run.ppo(PpoSettings(max_steps=1))[0].loss)


def test_every_epoch_takes_every_answer_once() -> None:
    parts = list(mini_batches(7, 3, 2, (0, 5)))
    assert [len(part) for part in parts] == [3, 2, 2, 3, 2, 2]
    assert sorted(i for part in parts[:3] for i in part) == list(range(7))
    assert parts[:3] != parts[3:]
    assert parts == list(mini_batches(7, 3, 2, (0, 5)))
    assert parts != list(mini_batches(7, 3, 2, (0, 6)))
    assert [len(part) for part in mini_batches(2, 8, 1, (0,))] == [1, 1]


def test_all_log_probs_are_compared_before_an_update_if_asked() -> None:
    run = Run()
    found = run.ppo(PpoSettings(max_steps=2, mini_batches=3, lockstep_check="all", warmup_steps=1))
    assert [m.max_delta for m in found] == [0.0, 0.0]
    stale = Run()
    answers = stale.answers()
    with torch.no_grad():
        stale.model.embedding.mul_(1.01)
    stale.rollouts.collect = lambda: [answers]
    with pytest.raises(MainspringError, match="log-probability"):
        stale.ppo(PpoSettings(max_steps=2, lockstep_check="all", warmup_steps=1))


def test_settings_that_do_not_fit_and_losses_that_are_not_finite_stop_the_run() -> None:
    run = Run()
    for settings, message in (
        (
            PpoSettings(max_steps=3, warmup_steps=3),
            "warmup_steps = 3 must be at least 0 and below max_steps = 3",
        ),
        (PpoSettings(epochs=0), "epochs = 0 must be at least 1"),
        (PpoSettings(kl_loss=0.1), "need a reference"),
    ):
        with pytest.raises(ConfigError, match=message):
            run.ppo(settings)
    with pytest.raises(ConfigError, match="positive_nll must be at least 0"):
        vapo(run.model, run.optimizer, run.critic, run.rollouts, VapoSettings(positive_nll=-1.0))
    with torch.no_grad():
        run.critic.model.embedding[sorting.SEPARATOR] = torch.inf
    with pytest.raises(MainspringError, match=r"step 1: value_.* is nan"):
        run.ppo(PpoSettings(max_steps=1, whiten=False))
