"""A post-training run: from a recipe to a checkpoint, validated, logged, interruptible and resumable at every step.

OUTPUT/metrics.jsonl    one line a step: rewards, losses, max |delta log-prob|, tokens per second of each phase
OUTPUT/rollouts.jsonl   every group: the prompt, its answers, their rewards and advantages (`mainspring rl view`)
OUTPUT/step-N           checkpoints (`rl.checkpoint`)

Over several ranks (`rl.rank_learner`) each makes an `RlRun`; the first writes metrics.jsonl, every one its groups.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from mainspring.engine.config import EngineConfig
from mainspring.engine.sampling_params import SamplingParams
from mainspring.errors import CheckpointError
from mainspring.formats.named_models import resolve
from mainspring.formats.tokenizer import Tokenizer
from mainspring.model.checkpoint import load_model
from mainspring.model.decoder import Decoder
from mainspring.parallel.launch import local_rank
from mainspring.rl import materials
from mainspring.rl.checkpoint import RlState, read_run_state
from mainspring.rl.closes import Closes
from mainspring.rl.dpo import DpoMetrics, DpoSettings, dpo, judge, reference_log_probs
from mainspring.rl.environment_worker import EnvironmentWorker
from mainspring.rl.grpo import grpo
from mainspring.rl.learner import Asked, DeviceLearner, Learner
from mainspring.rl.policy_metrics import PolicyMetrics
from mainspring.rl.policy_update import most, total
from mainspring.rl.ppo import ppo
from mainspring.rl.prompts import Prompt, Texts
from mainspring.rl.rank_learner import RankLearner
from mainspring.rl.ranks import RankRollouts
from mainspring.rl.recipe import RlRecipe, rl_recipe_to_dict
from mainspring.rl.reward_model import ModelRewards, RewardModelMetrics, rank, reward_model
from mainspring.rl.rewards import RewardWorker
from mainspring.rl.rollouts import Rollouts, RolloutState
from mainspring.rl.run_log import RunLog, flat, rate
from mainspring.rl.sample_files import read_pairs, read_samples
from mainspring.rl.samples import Pair, Sample
from mainspring.rl.sft import SftMetrics, sft, sft_loss
from mainspring.rl.value_model import ValueModel
from mainspring.rl.vapo import vapo
from mainspring.rl.vc_ppo import vc_ppo
from mainspring.train.checkpoint import choose_start
from mainspring.train.interrupt import StopRequest
from mainspring.train.make_runner import Ranks
from mainspring.train.metrics import Progress
from mainspring.train.runner import usable_device

Metrics = SftMetrics | DpoMetrics | RewardModelMetrics | PolicyMetrics


@dataclass(frozen=True)
class RlResult:
    """How a run ended."""

    checkpoint: Path
    step: int
    interrupted: bool
    validation: float | None
    """Mean reward of the held-out prompts' answers (without rollouts the loss); None if nothing is held out."""


class RlRun:
    """One sitting of a run. `run` trains to the end, or until Ctrl-C, and leaves a checkpoint either way."""

    def __init__(
        self,
        recipe: RlRecipe,
        *,
        resume: bool = False,
        restart: bool = False,
        show: Progress | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        """Reads data and model, builds engine and optimizer.

        resume continues from the newest checkpoint in recipe.output; restart deletes what a former run left there.
        Raises ConfigError for data with a bad line (named) and settings that do not fit, and what loading a model,
        a tokenizer and a checkpoint raises.
        """
        self._recipe = recipe
        self._ranks = ranks or Ranks.alone()
        self._show = show or Progress(silent=not self._ranks.speaks)
        self._output = Path(recipe.output).expanduser()
        self._resources = ExitStack()
        if recipe.model.threads is not None:
            torch.set_num_threads(recipe.model.threads)
        world, number = self._ranks.world, self._ranks.rank
        own = local_rank() if world > 1 and recipe.model.device == "cuda" else None
        self._device = usable_device(recipe.model.device, own, setting="model.device")
        with (
            self._ranks.first_alone()
        ):  # deletes what was there, converts a GGUF; the others then find all done
            start = choose_start(self._output, resume, restart and self._ranks.speaks)
            state = None if start is None else read_run_state(start, world, number)
            if state is not None and start is not None:
                _check_same(start, state.recipe, recipe)
            # Adapters belong to the weights that the recipe names; else a checkpoint has the weights themselves.
            source = recipe.model.path if start is None or recipe.lora.rank else start
            directory = resolve(source, recipe.model.dtype).path
        self._tokenizer = Tokenizer.from_directory(directory)
        self._learner: Learner
        if world > 1:
            self._learner = RankLearner(recipe, directory, self._device, start, world)
        else:
            self._learner = DeviceLearner(recipe, directory, self._device, start)
        self._texts = materials.texts_of(self._tokenizer, self._learner.model.config, recipe.data)
        self._samples: tuple[list[Sample], list[Sample]] = ([], [])
        self._pairs: tuple[list[Pair], list[Pair]] = ([], [])
        self._held_out: list[Prompt] = []
        self._rollouts = self._read_data()
        self._reference = self._make_reference()
        self._step = 0
        self._elapsed = 0.0
        if state is not None and start is not None:
            self._learner.load_optimizers(start)
            self._step, self._elapsed = state.step, state.elapsed
            if self._rollouts is not None:
                self._rollouts.restore(state.rollouts)
            self._show.say(f"resuming from {start}")
        resume_at = self._step if state is not None else None
        self._log = RunLog(
            self._output, number, resume_at, groups=self._learner.writes_groups, decode=self._texts.decode
        )

    def run(self) -> RlResult:
        """Trains. Raises what the algorithm raises; the last checkpoint stays."""
        recipe = self._recipe
        began = time.monotonic() - self._elapsed
        self._log.record("start", {"step": self._step, "recipe": rl_recipe_to_dict(recipe)})
        with self._resources, StopRequest() as stop:
            try:
                if self._step == 0:
                    self._validate()
                for metrics in self._steps():
                    self._step = metrics.step
                    self._elapsed = time.monotonic() - began
                    self._report(metrics)
                    over = self._step == recipe.settings.max_steps
                    if recipe.validation.every and self._step % recipe.validation.every == 0 and not over:
                        self._validate()
                    if self._largest([stop.requested])[0]:  # of any rank
                        break
                    if recipe.checkpoint.every and self._step % recipe.checkpoint.every == 0 and not over:
                        self._save()
                interrupted = self._step < recipe.settings.max_steps
                path = self._save()
                if interrupted:
                    self._show.say(
                        f"stopped at step {self._step}; continue with --resume. Checkpoint: {path}"
                    )
                    return RlResult(path, self._step, True, None)
                found = self._validate()
                self._show.say(f"{self._step} steps, {self._elapsed:.0f} s. Checkpoint: {path}")
                return RlResult(path, self._step, False, found)
            finally:
                self._log.close()

    def _read_data(self) -> Rollouts | None:
        """What is held out and what is learnt from; the rollouts that ask the prompts, if there are any."""
        recipe, texts = self._recipe, self._texts
        data = recipe.data
        if recipe.algorithm == "sft":
            rules = materials.token_rules(texts, self._tokenizer, data)
            held_out = read_samples(data.validation, rules) if data.validation else []
            self._samples = read_samples(data.train, rules), held_out
            return None
        if recipe.algorithm in ("dpo", "reward_model"):
            rules = materials.token_rules(texts, self._tokenizer, data)
            pairs = read_pairs(data.validation, rules) if data.validation else []
            self._pairs = read_pairs(data.train, rules), pairs
            return None
        encode = materials.prompt_encoder(texts, self._tokenizer, data)
        prompts, self._held_out = materials.read_all_prompts(data, encode)
        return self._make_rollouts(prompts, texts)

    def _make_rollouts(self, prompts: Sequence[Prompt], texts: Texts) -> Rollouts:
        recipe = self._recipe
        scorer: RewardWorker | ModelRewards
        if recipe.reward.model:
            judge = ValueModel.load(
                resolve(recipe.reward.model).path,
                device=self._device,
                dtype=recipe.model.dtype,
                numerics=recipe.model.numerics,
            )
            scorer = ModelRewards(judge.requires_grad_(False))
        else:
            scorer = self._resources.enter_context(
                RewardWorker(
                    materials.reward_function(recipe.reward),
                    timeout=recipe.reward.timeout,
                    max_failures=recipe.reward.max_failures,
                )
            )
        self._scorer = scorer
        engine = recipe.engine
        config = EngineConfig(
            max_num_seqs=engine.max_num_seqs,
            max_num_batched_tokens=engine.max_num_batched_tokens,
            kv_cache_bytes=engine.kv_cache_bytes,
            max_model_len=materials.longest(
                prompts, self._held_out, recipe.rollouts.max_tokens, self._learner.model.config
            )
            if not recipe.reward.environment
            else None,
        )
        make = materials.environment_factory(recipe.reward)
        environment = None
        if make is not None:
            environment = EnvironmentWorker(make, timeout=recipe.reward.timeout)
            self._resources.enter_context(environment)
        sampling = SamplingParams(temperature=engine.temperature)
        rollouts = self._learner.rollouts(Asked(prompts, texts, scorer, sampling, config, environment))
        if isinstance(rollouts, Closes):
            self._resources.enter_context(rollouts)
        return rollouts

    def _make_reference(self) -> Decoder | None:
        """The model as the recipe names it, where a setting needs it."""
        recipe = self._recipe
        settings = recipe.settings
        wanted = getattr(settings, "kl_loss", 0.0) or getattr(settings, "kl_reward", 0.0)
        if not (wanted or (recipe.algorithm == "dpo" and not recipe.dpo.reference_free)):
            return None
        directory = resolve(recipe.model.path, recipe.model.dtype).path
        model = load_model(
            directory, device=self._device, dtype=recipe.model.dtype, numerics=recipe.model.numerics
        )
        return model.requires_grad_(False)

    def _steps(self) -> Iterator[Metrics]:
        recipe, first, learner = self._recipe, self._step, self._learner
        if self._rollouts is not None:
            return self._policy_steps(self._rollouts)
        assert isinstance(learner, DeviceLearner)  # all others run on one device
        model, optimizer = learner.model, learner.optimizer
        if recipe.algorithm == "sft":
            return sft(model, optimizer, self._samples[0], recipe.sft, first_step=first)
        if recipe.algorithm == "dpo":
            anchors = self._anchors(self._pairs[0])
            return dpo(model, optimizer, self._pairs[0], anchors, recipe.dpo, first_step=first)
        assert isinstance(model, ValueModel)  # of reward_model
        return reward_model(model, optimizer, self._pairs[0], recipe.reward_model, first_step=first)

    def _policy_steps(self, rollouts: Rollouts) -> Iterator[Metrics]:
        recipe, learner, critic = self._recipe, self._learner, self._learner.critic
        model, optimizer, group = learner.model, learner.optimizer, learner.group
        reference, first = self._reference, self._step
        if critic is None:
            settings = recipe.grpo
            return grpo(
                model, optimizer, rollouts, settings, reference=reference, first_step=first, group=group
            )
        if recipe.algorithm == "ppo":
            return ppo(
                model,
                optimizer,
                critic,
                rollouts,
                recipe.ppo,
                reference=reference,
                first_step=first,
                group=group,
            )
        if recipe.algorithm == "vc_ppo":
            return vc_ppo(
                model,
                optimizer,
                critic,
                rollouts,
                recipe.vc_ppo,
                reference=reference,
                first_step=first,
                group=group,
            )
        return vapo(
            model,
            optimizer,
            critic,
            rollouts,
            recipe.vapo,
            reference=reference,
            first_step=first,
            group=group,
        )

    def _anchors(self, pairs: Sequence[Pair]) -> torch.Tensor | None:
        if self._reference is None:
            return None
        settings: DpoSettings = self._recipe.dpo
        return reference_log_probs(
            self._reference, pairs, settings.tokens_per_microbatch, mean=settings.mean_log_probs
        )

    def _report(self, metrics: Metrics) -> None:
        record = flat(metrics)
        record["elapsed"] = self._elapsed
        if isinstance(metrics, PolicyMetrics):
            if isinstance(self._scorer, RewardWorker):
                record["reward_failures"] = int(self._sum([self._scorer.failures])[0])
            if self._recipe.reward.environment and self._rollouts is not None:
                record["environment_failures"] = int(self._sum([self._rollouts.failures])[0])
            if isinstance(self._rollouts, RankRollouts):
                resharding = self._rollouts.resharding
                record["resharding_seconds"] = self._largest([resharding.seconds])[0]
                record["resharding_peak_bytes"] = resharding.peak_bytes
            record["rollout_tokens_per_second"] = rate(metrics.tokens, metrics.rollout_seconds)
            record["update_tokens_per_second"] = rate(metrics.tokens, metrics.update_seconds)
            assert self._rollouts is not None  # groups are of rollouts
            self._log.groups(self._step, self._rollouts.prompts, metrics.groups, metrics.advantages)
        self._log.record("step", record)
        shown = ("loss", "reward", "length", "entropy", "grad_norm", "max_delta")
        parts = [f"{name} {record[name]:.4g}" for name in shown if record.get(name) is not None]
        self._show.say(f"step {self._step}/{self._recipe.settings.max_steps}  " + "  ".join(parts))

    def _validate(self) -> float | None:
        """Of what is held out: the mean reward, or the loss."""
        recipe, model = self._recipe, self._learner.model
        record: dict[str, Any] = {"step": self._step}
        if recipe.algorithm == "sft" and self._samples[1]:
            assert isinstance(model, Decoder)
            record["loss"] = sft_loss(model, self._samples[1], recipe.sft.tokens_per_microbatch)
        elif isinstance(model, ValueModel) and self._pairs[1]:
            tokens = recipe.reward_model.tokens_per_microbatch
            record |= asdict(rank(model, self._pairs[1], tokens, margin=recipe.reward_model.margin))
        elif recipe.algorithm == "dpo" and self._pairs[1]:
            assert isinstance(model, Decoder)
            held_out = self._pairs[1]
            judged = judge(model, held_out, self._anchors(held_out), recipe.dpo)
            record |= {"loss": judged.loss, "margin": judged.margin, "accuracy": judged.accuracy}
        elif self._rollouts is not None and self._held_out:
            settings = recipe.validation
            groups = self._rollouts.answer(
                self._held_out, samples=settings.samples, temperature=settings.temperature
            )
            answers = [answer for group in groups for answer in group]
            sums = (sum(a.reward for a in answers), sum(a.num_written for a in answers), len(answers))
            reward, length, count = self._sum(sums)
            if count:
                record |= {"reward": reward / count, "length": length / count, "answers": int(count)}
        if len(record) == 1:
            return None
        self._log.record("validation", record)
        self._show.say("validation: " + "  ".join(f"{k} {v:.4g}" for k, v in record.items()))
        return float(record.get("reward", record.get("loss", math.nan)))

    def _save(self) -> Path:
        rollouts = RolloutState() if self._rollouts is None else self._rollouts.state
        recipe = rl_recipe_to_dict(self._recipe)
        state = RlState(self._step, self._elapsed, rollouts, recipe, self._ranks.world)
        path = self._learner.save(self._output, self._tokenizer, state, self._recipe.checkpoint.keep)
        self._log.record("checkpoint", {"step": self._step, "path": str(path)})
        return path

    def _sum(self, values: Sequence[float]) -> list[float]:
        """Over the ranks, all of which call this."""
        return total(values, self._learner.group, self._device)

    def _largest(self, values: Sequence[float]) -> list[float]:
        return most(values, self._learner.group, self._device)


def _check_same(start: Path, then: Mapping[str, Any], now: RlRecipe) -> None:
    """Raises CheckpointError for a checkpoint of another algorithm or model."""
    for name, was, wanted in (
        ("algorithm", then["algorithm"], now.algorithm),
        ("model.path", then["model"]["path"], now.model.path),
    ):
        if was != wanted:
            raise CheckpointError(
                f"{start} was written by a run with {name} = {was!r}, not {wanted!r}; set it back, set another output, "
                "or start anew with --restart"
            )
