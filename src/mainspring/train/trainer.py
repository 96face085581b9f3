"""The training run: from a recipe to a checkpoint, interruptible and resumable at every step."""

from __future__ import annotations

import math
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mainspring.errors import CheckpointError, ConfigError, MainspringError
from mainspring.formats.model_config import ModelConfig
from mainspring.model.checkpoint import load_model
from mainspring.model.decoder import Decoder
from mainspring.model.initialise import create_model
from mainspring.ops import TokenBatch
from mainspring.train.checkpoint import (
    TrainerState,
    checkpoints,
    load_optimizer,
    read_state,
    save_checkpoint,
)
from mainspring.train.evaluate import Evaluation, evaluate
from mainspring.train.flops import peak_flops, training_flops
from mainspring.train.initialise import initialise
from mainspring.train.interrupt import StopRequest
from mainspring.train.metrics import MetricsFile, Progress, StepMetrics, as_record
from mainspring.train.optimizer import Optimizer
from mainspring.train.packing import DataPosition, MicroBatch, PackedStream
from mainspring.train.prepare import PreparedData, prepare
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
        self, recipe: Recipe, *, resume: bool = False, restart: bool = False, show: Progress | None = None
    ):
        """Reads the texts, builds or loads model and optimizer.

        resume continues from the newest checkpoint in recipe.output; restart deletes what a former run left
        there. Raises ConfigError if a run is there and neither is set, RecipeError, CheckpointError,
        TokenizerError and whatever the model's configuration raises.
        """
        self._begun = time.monotonic()
        self._recipe = recipe
        self._show = show or Progress()
        self._output = Path(recipe.output).expanduser()
        settings = recipe.training
        self._device = _usable_device(settings.device)
        if settings.threads is not None:
            torch.set_num_threads(settings.threads)
        resume_from = _choose_start(self._output, resume, restart)
        self._data = prepare(recipe, self._output / "data", self._show.say)
        state = read_state(resume_from) if resume_from is not None else None
        self._check_state(state)
        torch.manual_seed(recipe.seed)
        self._model = _make_model(recipe, self._data, resume_from, self._device)
        self._optimizer = Optimizer(self._model, recipe.optimizer)
        if resume_from is not None:
            load_optimizer(resume_from, self._optimizer, self._device)
            self._show.say(f"resuming from {resume_from}")
        self._step = state.step if state else 0
        self._tokens = state.tokens if state else 0
        self._elapsed_before = state.elapsed if state else 0.0
        self._stream = PackedStream(
            self._data.train,
            settings.sequence_length,
            settings.tokens_per_micro_batch,
            recipe.seed,
            state.position if state else DataPosition(),
        )
        self._peak, peak_source = peak_flops(self._device, self._model.dtype)
        weights = sum(parameter.numel() for parameter in self._model.parameters())
        self._show.say(
            f"{weights:,} weights, {settings.dtype} on {self._device}; "
            f"MFU is of {self._peak / 1e12:.3g} TFLOP/s ({peak_source})"
        )
        self._metrics = MetricsFile(self._output / "metrics.jsonl", self._step if state else None)

    def run(self) -> TrainingResult:
        """Trains. Raises MainspringError if the loss is no longer finite; the last checkpoint stays."""
        self._training_since = time.monotonic()
        self._metrics.write("start", {"step": self._step, "recipe": recipe_to_dict(self._recipe)})
        try:
            with StopRequest() as stop:
                self._loop(stop)
                path = self._save()
                if stop.requested:
                    self._show.say(
                        f"stopped at step {self._step}; continue with --resume. Checkpoint: {path}"
                    )
                    return TrainingResult(path, self._step, True, None, ())
            return self._finish(path)
        finally:
            self._metrics.close()

    def _loop(self, stop: StopRequest) -> None:
        recipe, window = self._recipe, _Window()
        while not stop.requested and (done := self._progress()) < 1.0:
            started = time.monotonic()
            # The factor of the middle of the step: neither the first nor the last step moves nothing.
            factor = learning_rate_factor(recipe.schedule, min(done + 0.5 / recipe.training.max_steps, 1.0))
            grad_norm = self._train_step(factor, window)
            window.seconds += time.monotonic() - started
            due = self._step % recipe.training.log_every == 0
            if due or self._progress() >= 1.0:
                self._report(window, factor, grad_norm)
                window = _Window()
            if (
                recipe.evaluation.every
                and self._step % recipe.evaluation.every == 0
                and self._progress() < 1.0
            ):
                self._evaluate()
            if (
                recipe.checkpoint.every
                and self._step % recipe.checkpoint.every == 0
                and self._progress() < 1.0
            ):
                self._save()

    def _train_step(self, factor: float, window: _Window) -> float:
        """One optimizer step over `accumulation_steps` micro-batches; returns the gradient's norm."""
        micro_batches = [next(self._stream) for _ in range(self._recipe.training.accumulation_steps)]
        total = sum(len(micro.tokens) for micro in micro_batches)
        step_loss = torch.zeros((), device=self._device)
        for micro in micro_batches:
            tokens, batch, targets = self._to_device(micro)
            # Each micro-batch's mean weighs by its tokens: the sum is the mean over the whole step.
            loss = self._model.loss(tokens, batch, targets) * (len(micro.tokens) / total)
            loss.backward()
            self._optimizer.accumulate()
            step_loss += loss.detach()
            window.flops += training_flops(self._model.config, micro.lengths)
        grad_norm = self._optimizer.step(factor, self._recipe.training.clip_norm)
        loss_value = float(step_loss)
        if not (math.isfinite(loss_value) and math.isfinite(grad_norm)):
            raise MainspringError(
                f"step {self._step + 1}: the loss is {loss_value} and the gradient's norm {grad_norm}; "
                "lower optimizer.lr (and muon_lr), or raise schedule.warmup_fraction. "
                "The last checkpoint is untouched."
            )
        self._step += 1
        self._tokens += total
        window.loss += loss_value
        window.steps += 1
        window.tokens += total
        return grad_norm

    def _to_device(self, micro: MicroBatch) -> tuple[torch.Tensor, TokenBatch, torch.Tensor]:
        return (
            torch.from_numpy(micro.tokens).to(self._device),
            TokenBatch.packed(micro.lengths, self._device),
            torch.from_numpy(micro.targets).to(self._device),
        )

    def _elapsed(self) -> float:
        return self._elapsed_before + time.monotonic() - self._training_since

    def _budget(self) -> float | None:
        """Seconds of training that the time budget leaves after reading and tokenizing."""
        budget = self._recipe.training.max_seconds
        return None if budget is None else max(budget - (self._training_since - self._begun), 1e-3)

    def _progress(self) -> float:
        return progress(self._step, self._recipe.training.max_steps, self._elapsed(), self._budget())

    def _report(self, window: _Window, factor: float, grad_norm: float) -> None:
        done, elapsed = self._progress(), self._elapsed()
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
        )
        self._metrics.write("step", as_record(metrics))
        self._show.show(metrics, self._recipe.training.max_steps)

    def _evaluate(self) -> Evaluation:
        settings = self._recipe.training
        result = evaluate(
            self._model,
            self._data.train,
            self._data.holdout,
            self._data.holdout_bytes,
            sequence_length=settings.sequence_length,
            stride=self._recipe.evaluation.stride or settings.sequence_length // 2,
            tokens_per_batch=settings.tokens_per_micro_batch,
        )
        record = {"bits_per_byte": result.bits_per_byte, "loss": result.loss, "tokens": result.tokens}
        self._metrics.write("evaluation", {"step": self._step, "bytes": result.num_bytes, **record})
        self._show.say(
            f"step {self._step}: {result.bits_per_byte:.4f} bits per byte on {result.num_bytes:,} held-out bytes "
            f"({result.tokens:,} tokens)"
        )
        return result

    def _save(self) -> Path:
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
        path = save_checkpoint(self._output, self._model, self._optimizer, self._data.tokenizer, state, keep)
        self._metrics.write("checkpoint", {"step": self._step, "path": str(path)})
        return path

    def _finish(self, path: Path) -> TrainingResult:
        evaluation = self._evaluate() if self._data.holdout_bytes else None
        samples = self._samples()
        for prompt, text in zip(self._recipe.samples.prompts, samples, strict=True):
            self._show.say(f"--- {prompt!r}\n{prompt}{text}")
        seconds = time.monotonic() - self._begun
        self._metrics.write("end", {"step": self._step, "seconds": seconds})
        self._show.say(f"{self._step} steps, {seconds:.0f} s in all. Checkpoint: {path}")
        return TrainingResult(path, self._step, False, evaluation, samples)

    def _samples(self) -> tuple[str, ...]:
        settings, tokenizer = self._recipe.samples, self._data.tokenizer
        if not settings.prompts:
            return ()
        start = [tokenizer.end_of_text]
        prompts = [start + tokens.tolist() for tokens in tokenizer.encode(list(settings.prompts))]
        continued = sample(
            self._model,
            prompts,
            max_tokens=settings.max_tokens,
            temperature=settings.temperature,
            top_k=settings.top_k,
            stop_token_ids=[tokenizer.end_of_text],
            context_length=self._recipe.training.sequence_length,
            seed=self._recipe.seed,
        )
        return tuple(tokenizer.decode(tokens) for tokens in continued)

    def _check_state(self, state: TrainerState | None) -> None:
        if state is not None and state.fingerprint != self._data.fingerprint:
            raise CheckpointError(
                "the texts or the tokenizer's settings have changed since the checkpoint was written; "
                "put them back to resume, or start anew with --restart"
            )


def _choose_start(output: Path, resume: bool, restart: bool) -> Path | None:
    """The checkpoint to resume from; None starts anew."""
    found = checkpoints(output)
    if resume:
        if not found:
            raise ConfigError(f"--resume: there is no checkpoint in {output}; leave the option out to start")
        return found[-1][1]
    if found and not restart:
        raise ConfigError(
            f"{output} holds a run at step {found[-1][0]}; continue it with --resume, "
            "delete it with --restart, or set another output"
        )
    for _, path in found:
        shutil.rmtree(path)
    (output / "latest").unlink(missing_ok=True)
    return None


def _usable_device(name: str) -> torch.device:
    """The device. On CUDA, PyTorch is told to take deterministic kernels, without which resuming is not exact."""
    if name == "cuda":
        if not torch.cuda.is_available():
            raise ConfigError("training.device = 'cuda', but PyTorch sees no CUDA device; set it to 'cpu'")
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it is first used
        torch.use_deterministic_algorithms(True)
    return torch.device(name)


def _make_model(
    recipe: Recipe, data: PreparedData, resume_from: Path | None, device: torch.device
) -> Decoder:
    settings = recipe.training
    if recipe.model.init_from is not None and resume_from is None:
        source = Path(recipe.model.init_from).expanduser()
        model = load_model(source, device=device, dtype=settings.dtype, numerics=settings.numerics)
    elif resume_from is not None:
        model = load_model(resume_from, device=device, dtype=settings.dtype, numerics=settings.numerics)
    else:
        config = model_config(recipe, data)
        model = create_model(config, dtype=settings.dtype, device=device, numerics=settings.numerics)
        initialise(model, recipe.model, recipe.seed)
    if model.config.vocab_size < data.tokenizer.vocab_size:
        raise CheckpointError(
            f"the model's vocabulary of {model.config.vocab_size} is smaller than the tokenizer's "
            f"{data.tokenizer.vocab_size}; they do not belong together"
        )
    return model.train()


def model_config(recipe: Recipe, data: PreparedData) -> ModelConfig:
    """The Hugging Face configuration of a recipe's new model."""
    model = recipe.model
    table: dict[str, Any] = {
        "architectures": [model.architecture],
        "model_type": model.architecture.removesuffix("ForCausalLM").lower(),
        "vocab_size": data.tokenizer.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.intermediate_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.num_kv_heads or model.num_heads,
        "head_dim": model.head_dim or model.hidden_size // model.num_heads,
        "max_position_embeddings": model.max_position_embeddings or recipe.training.sequence_length,
        "rope_theta": model.rope_theta,
        "rms_norm_eps": model.rms_norm_eps,
        "tie_word_embeddings": model.tie_word_embeddings,
        "bos_token_id": data.tokenizer.end_of_text,
        "eos_token_id": data.tokenizer.end_of_text,
        "dtype": recipe.training.dtype,
    }
    return ModelConfig.from_dict(table)
