"""Adapters: only they move, in lockstep; saved, an engine serves them; merged, they are a model; resumed to the bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mainspring.engine.llm import LLM
from mainspring.engine.sampling_params import SamplingParams
from mainspring.errors import CheckpointError, ConfigError
from mainspring.model.decoder import Decoder
from mainspring.rl.grpo import GrpoSettings, grpo
from mainspring.rl.lora import LoraDecoder, LoraSettings
from mainspring.rl.rollout_settings import RolloutSettings
from mainspring.rl.rollouts import Rollouts
from mainspring.rl.samples import Sample, written_log_probs
from mainspring.rl.sft import SftSettings, sft
from mainspring.train.optimizer import Optimizer
from mainspring.train.recipe import OptimizerSection, ScheduleSection
from rl import sorting

STEADY = ScheduleSection(kind="constant", warmup_fraction=0.0)
FAST = OptimizerSection(lr=1e-2, weight_decay=0.0)
SAMPLES = [pair.chosen for pair in sorting.pairs(24, 1)]


def tuned(dtype: torch.dtype = torch.float32, **settings: object) -> tuple[Decoder, LoraDecoder]:
    """(the base as it was, the model with adapters that have learnt something)."""
    base = sorting.model("lockstep").to(dtype)
    untouched = sorting.model("lockstep").to(dtype)
    model = LoraDecoder(base, LoraSettings(rank=4, **settings))
    assert torch.equal(_log_probs(model), _log_probs(untouched)), "B is 0 at the start"
    steps = SftSettings(12, max_steps=4, schedule=STEADY)
    losses = [m.loss for m in sft(model, Optimizer(model.lora, FAST), SAMPLES, steps)]
    assert losses[-1] < losses[0]
    return untouched, model


@torch.no_grad()
def _log_probs(model: Decoder, samples: list[Sample] = SAMPLES) -> torch.Tensor:
    return written_log_probs(model, samples)[0]


@pytest.mark.parametrize("targets", [{}, {"targets": ("k_proj", "down_proj")}])
def test_only_the_adapters_move(targets: dict[str, object]) -> None:
    base, model = tuned(**targets)
    assert all(torch.equal(a, b) for a, b in zip(base.parameters(), model.parameters(), strict=True))
    assert all(p.grad is None for p in model.parameters())
    assert all(p.abs().sum() > 0 for _, p in model.lora.named_parameters())
    if targets:
        names = {name.split(".")[-3] for name, _ in model.lora.named_parameters()}
        assert names == set(targets["targets"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rollouts_with_adapters_are_in_lockstep(dtype: torch.dtype) -> None:
    _, model = tuned(dtype)
    settings = RolloutSettings(prompts_per_step=3, group_size=4, max_tokens=8)
    rollouts = Rollouts(model, sorting.prompts(20, 3), sorting.TEXTS, sorting.Graded(), settings)
    optimizer = Optimizer(model.lora, FAST)
    before = _log_probs(model)
    metrics = list(
        grpo(model, optimizer, rollouts, GrpoSettings(max_steps=3, schedule=STEADY, lockstep_check="all"))
    )
    assert all(m.max_delta == 0 and m.compared > 0 for m in metrics)
    assert not torch.equal(before, _log_probs(model))


def test_a_saved_adapter_is_served_and_loaded_again(tmp_path: Path) -> None:
    base, model = tuned()
    model.lora.save(tmp_path / "adapter")
    llm = LLM(base, lora={"sorter": tmp_path / "adapter"})
    sample = SAMPLES[0]
    params = SamplingParams(max_tokens=1, prompt_logprobs=0)
    served = llm.generate([list(sample.tokens)], params, lora="sorter")[0].prompt_logprobs
    assert served is not None
    expected = model.log_probs([sample.tokens])[0].detach()
    found = [
        entry[token].logprob for entry, token in zip(served[1:], sample.tokens[1:], strict=True) if entry
    ]
    torch.testing.assert_close(torch.tensor(found), expected, rtol=1e-4, atol=1e-5)

    again = LoraDecoder(sorting.model("lockstep"), LoraSettings(rank=4, seed=5))
    again.lora.load(tmp_path / "adapter")
    assert torch.equal(_log_probs(again), _log_probs(model))
    with pytest.raises(CheckpointError, match=r"rank 4 and scale 8\.0, the run rank 2"):
        LoraDecoder(sorting.model(), LoraSettings(rank=2)).lora.load(tmp_path / "adapter")


def test_merged_weights_are_the_model_with_its_adapters() -> None:
    base, model = tuned()
    merged = model.merged()
    assert type(merged) is Decoder
    torch.testing.assert_close(_log_probs(merged), _log_probs(model), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(_log_probs(merged), _log_probs(base), atol=1e-3)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ConfigError, match="rank = 0"):
        LoraDecoder(sorting.model(), LoraSettings(rank=0))
    with pytest.raises(ConfigError, match="no layer 'c_attn'"):
        LoraDecoder(sorting.model(), LoraSettings(rank=2, targets=("c_attn", "q_proj")))
