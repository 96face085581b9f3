"""The training run: from a recipe to a checkpoint, interruptible and resumable at every step."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mainspring.errors import CheckpointError, MainspringError
from mainspring.train.background import BackgroundWriter
from mainspring.train.checkpoint import TrainerState, choose_start, read_state
from mainspring.train.evaluate import Evaluation, evaluate
from mainspring.train.flops import peak_flops, training_flops
from mainspring.train.interrupt import StopRequest
from mainspring.train.make_runner import Ranks, make_runner
from mainspring.train.metrics import MetricsFile, Progress, StepMetrics, as_record
from mainspring.train.packing import DataPosition
from mainspring.train.prepare import prepare
from mainspring.train.recipe import Recipe
from mainspring.train.recipe_file import recipe_to_dict
from mainspring.train.sampling import sample
from mainspring.train.schedule import learning_rate_factor, progress


@dataclass(frozen=True)
class TrainingResult:
    """How a run ended."""

    checkpoint: Path
    step: int
    interrupted: bool
    evaluation: Evaluation | None
    """None if nothing is held out, or the run was interrupted."""
    samples: tuple[str, ...]


@dataclass
class _Window:
    """Sums since the last report."""

    loss: float = 0.0
    steps: int = 0
    tokens: int = 0
    flops: int = 0
    seconds: float = 0.0


class Trainer:
    """One sitting of a run. `run` trains to the end, or until Ctrl-C, and leaves a checkpoint either way."""

    def __init__(
        self,
        recipe: Recipe,
        *,
        resume: bool = False,
        restart: bool = False,
        show: Progress | None = None,
        ranks: Ranks | None = None,
    ):
        """Reads the texts, builds or loads model and optimizer. Under a layout every rank makes a Trainer.

        resume continues from the newest checkpoint in recipe.output; restart deletes what a former run left
        there. Raises ConfigError if a run is there and neither is set, RecipeError, CheckpointError,
        TokenizerError and whatever the model's configuration raises.
        """
        self._begun = time.monotonic()
        self._recipe = recipe
        ranks = ranks or Ranks.alone()
        self._ranks = ranks
        self._show = show or Progress(silent=not ranks.speaks)
        self._output = Path(recipe.output).expanduser()
        settings = recipe.training
        if settings.threads is not None:
            torch.set_num_threads(settings.threads)
        with ranks.first_alone():  # looks, deletes and prepares; the others then find all done
            resume_from = choose_start(self._output, resume, restart and ranks.speaks)
            self._data = prepare(recipe, self._output / "data", self._show.say)
        state = read_state(resume_from) if resume_from is not None else None
        self._check_state(state)
        self._stream = self._data.stream(
            settings.sequence_length,
            settings.tokens_per_micro_batch,
            recipe.seed,
            state.position if state else DataPosition(),
        )
        torch.manual_seed(recipe.seed)
        self._runner = make_runner(recipe, self._data, resume_from, ranks)
        if resume_from is not None:
            self._show.say(f"resuming from {resume_from}")
        self._step = state.step if state else 0
        self._tokens = state.tokens if state else 0
        self._elapsed_before = state.elapsed if state else 0.0
        runner = self._runner
        peak, peak_source = peak_flops(runner.device, runner.dtype)
        self._peak = peak * runner.world
        self._show.say(
            f"{runner.num_weights():,} weights, {settings.dtype} on {runner.device}"
            f"{f', {runner.world} ranks' if runner.world > 1 else ''}; "
            f"MFU is of {self._peak / 1e12:.3g} TFLOP/s ({peak_source})"
        )
        self._stopped = False
        self._writer = BackgroundWriter()
        self._writing: int | None = None
        """The step whose checkpoint is being written."""
        self._metrics = (
            MetricsFile(self._output / "metrics.jsonl", self._step if state else None)
            if ranks.speaks
            else None
        )

    def run(self) -> TrainingResult:
        """Trains. Raises MainspringError if the loss is no longer finite or a checkpoint cannot be written.

        A checkpoint that is being written then is finished first, if it can be; older ones stay.
        """
        self._training_since = time.monotonic()
        self._record("start", {"step": self._step, "recipe": recipe_to_dict(self._recipe)})
        try:
            with StopRequest() as stop:
                self._loop(stop)
                path = self._save_now()
                if self._stopped:
                    self._show.say(
                        f"stopped at step {self._step}; continue with --resume. Checkpoint: {path}"
                    )
                    return TrainingResult(path, self._step, True, None, ())
            return self._finish(path)
        finally:
            self._abandon_save()
            self._runner.close()
            if self._metrics is not None:
                self._metrics.close()

    def _loop(self, stop: StopRequest) -> None:
        recipe, window = self._recipe, _Window()
        while (done := self._agreed_progress(stop)) < 1.0 and not self._stopped:
            started = time.monotonic()
            # The factor of the middle of the step: neither the first nor the last step moves nothing.
            factor = learning_rate_factor(recipe.schedule, min(done + 0.5 / recipe.training.max_steps, 1.0))
            grad_norm = self._train_step(factor, window)
            window.seconds += time.monotonic() - started
            due = self._step % recipe.training.log_every == 0
            over = self._agreed_progress(stop) >= 1.0
            if due or over:
                self._report(window, factor, grad_norm)
                window = _Window()
            if recipe.evaluation.every and self._step % recipe.evaluation.every == 0 and not over:
                self._evaluate()
            if recipe.samples.every and self._step % recipe.samples.every == 0 and not over:
                self._samples()
            if recipe.checkpoint.every and self._step % recipe.checkpoint.every == 0 and not over:
                self._begin_save()

    def _train_step(self, factor: float, window: _Window) -> float:
        """One optimizer step over `accumulation_steps` micro-batches; returns the gradient's norm."""
        training = self._recipe.training
        micro_batches = [next(self._stream) for _ in range(training.accumulation_steps)]
        loss, grad_norm = self._runner.train_step(micro_batches, factor, training.clip_norm)
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            found = self._runner.first_non_finite(micro_batches)
            raise MainspringError(
                f"step {self._step + 1}: the loss is {loss} and the gradient's norm {grad_norm}; "
                f"the first to be not finite is {found or 'a gradient: all outputs are finite'}. "
                "Lower optimizer.lr (and muon_lr), or raise schedule.warmup_fraction. "
                "The last checkpoint is untouched."
            )
        total = sum(len(micro.tokens) for micro in micro_batches)
        self._step += 1
        self._tokens += total
        window.loss += loss
        window.steps += 1
        window.tokens += total
        window.flops += sum(training_flops(self._runner.config, micro.lengths) for micro in micro_batches)
        return grad_norm

    def _elapsed(self) -> float:
        return self._elapsed_before + time.monotonic() - self._training_since

    def _budget(self) -> float | None:
        """Seconds of training that the time budget leaves after reading and tokenizing."""
        budget = self._recipe.training.max_seconds
        return None if budget is None else max(budget - (self._training_since - self._begun), 1e-3)

    def _progress(self) -> float:
        return progress(self._step, self._recipe.training.max_steps, self._elapsed(), self._budget())

    def _agreed_progress(self, stop: StopRequest) -> float:
        """The progress, the same on every rank, and whether any of them was asked to stop.

        Raises on all ranks where a save has failed on one.
        """
        self._stopped, failed, elapsed = self._runner.agree(
            stop.requested, self._writer.failed, self._elapsed()
        )
        if failed:
            self._finish_save()
        self._record_save(self._writer.collect())
        return progress(self._step, self._recipe.training.max_steps, elapsed, self._budget())

    def _record(self, event: str, values: Mapping[str, Any]) -> None:
        if self._metrics is not None:
            self._metrics.write(event, values)

    def _report(self, window: _Window, factor: float, grad_norm: float) -> None:
        done, elapsed, experts = self._progress(), self._elapsed(), self._runner.experts
        metrics = StepMetrics(
            step=self._step,
            epoch=self._tokens / self._stream.tokens_per_epoch,
            tokens=self._tokens,
            loss=window.loss / window.steps,
            lr_factor=factor,
            grad_norm=grad_norm,
            tokens_per_second=window.tokens / window.seconds,
            mfu=window.flops / window.seconds / self._peak,
            elapsed=elapsed,
            eta=elapsed / done - elapsed,
            expert_imbalance=experts.imbalance if experts else None,
            experts_idle=experts.idle if experts else None,
            slots_dropped=experts.dropped if experts else None,
        )
        self._record("step", as_record(metrics))
        self._show.show(metrics, self._recipe.training.max_steps)

    def _evaluate(self) -> Evaluation:
        settings = self._recipe.training
        result = evaluate(
            self._runner,
            self._data.train,
            self._data.holdout,
            self._data.holdout_bytes,
            sequence_length=settings.sequence_length,
            stride=self._recipe.evaluation.stride or settings.sequence_length // 2,
            tokens_per_batch=settings.tokens_per_micro_batch,
        )
        record = {"bits_per_byte": result.bits_per_byte, "loss": result.loss, "tokens": result.tokens}
        self._record("evaluation", {"step": self._step, "bytes": result.num_bytes, **record})
        self._show.say(
            f"step {self._step}: {result.bits_per_byte:.4f} bits per byte on {result.num_bytes:,} held-out bytes "
            f"({result.tokens:,} tokens)"
        )
        return result

    def _begin_save(self) -> None:
        """Writes a checkpoint of this moment, beside the next steps if the recipe does not say otherwise."""
        if not self._recipe.checkpoint.background:
            self._save_now()
            return
        self._finish_save()
        write = self._checkpoint_writer(background=True)
        self._writing = self._step
        self._writer.start(write)

    def _save_now(self) -> Path:
        """Writes a checkpoint, once the one that is being written is complete."""
        self._finish_save()
        path = self._checkpoint_writer(background=False)()
        self._record("checkpoint", {"step": self._step, "path": str(path)})
        return path

    def _checkpoint_writer(self, *, background: bool) -> Callable[[], Path]:
        state = TrainerState(
            step=self._step,
            tokens=self._tokens,
            elapsed=self._elapsed(),
            epoch=self._stream.position.epoch,
            index=self._stream.position.index,
            fingerprint=self._data.fingerprint,
            recipe=recipe_to_dict(self._recipe),
        )
        keep = self._recipe.checkpoint.keep
        return self._runner.checkpoint_writer(
            self._output, self._data.tokenizer, state, keep, background=background
        )

    def _finish_save(self) -> None:
        """Waits for the checkpoint that is being written, if there is one. Raises what writing it raised."""
        self._record_save(self._writer.wait(self._runner.waits))

    def _record_save(self, path: Path | None) -> None:
        if path is not None:
            self._record("checkpoint", {"step": self._writing, "path": str(path)})
            self._writing = None

    def _abandon_save(self) -> None:
        """The run ends by an error: a checkpoint that is being written is finished, or says why it is not."""
        try:
            self._finish_save()
        except Exception as error:
            self._show.say(f"the checkpoint of step {self._writing} is not written either: {error}")

    def _finish(self, path: Path) -> TrainingResult:
        evaluation = self._evaluate() if self._data.holdout_bytes else None
        samples = self._samples()
        seconds = time.monotonic() - self._begun
        self._record("end", {"step": self._step, "seconds": seconds})
        self._show.say(f"{self._step} steps, {seconds:.0f} s in all. Checkpoint: {path}")
        return TrainingResult(path, self._step, False, evaluation, samples)

    def _samples(self) -> tuple[str, ...]:
        """Draws, shows and records what the recipe's prompts are continued by; all ranks take part."""
        settings, tokenizer = self._recipe.samples, self._data.tokenizer
        if not settings.prompts:
            return ()
        start = [tokenizer.end_of_text]
        prompts = [start + tokens.tolist() for tokens in tokenizer.encode(list(settings.prompts))]
        continued = sample(
            self._runner.next_logits,
            prompts,
            max_tokens=settings.max_tokens,
            temperature=settings.temperature,
            top_k=settings.top_k,
            stop_token_ids=[tokenizer.end_of_text],
            context_length=self._recipe.training.sequence_length,
            seed=self._recipe.seed,
        )
        texts = tuple(tokenizer.decode(tokens) for tokens in continued)
        for prompt, text in zip(settings.prompts, texts, strict=True):
            self._show.say(f"--- {prompt!r}\n{prompt}{text}")
        self._record("samples", {"step": self._step, "texts": texts})
        return texts

    def _check_state(self, state: TrainerState | None) -> None:
        if state is not None and state.fingerprint != self._data.fingerprint:
            raise CheckpointError(
                "the texts, their weights or the tokenizer's settings have changed since the checkpoint was written; "
                "put them back to resume, or start anew with --restart"
            )
