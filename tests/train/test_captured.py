"""Passes replayed from CUDA graphs: filled micro-batches train as those that are not."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mainspring.errors import ConfigError
from mainspring.model.decoder import Decoder
from mainspring.train.captured import CapturedPass
from mainspring.train.packing import MicroBatch
from mainspring.train.recipe import OptimizerSection
from mainspring.train.runner import SingleDevice, usable_device
from train.models import tiny_model

_MOE = {
    "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 8,
}  # fmt: skip


def _micro(seed: int, vocabulary: int, *lengths: int) -> MicroBatch:
    random = np.random.default_rng(seed)
    tokens = random.integers(0, vocabulary, sum(lengths) + 1)
    targets = tokens[1:].copy()
    targets[random.random(len(targets)) < 0.2] = -100
    return MicroBatch(tokens[:-1].copy(), targets, lengths)


def _steps(model: Decoder) -> list[list[MicroBatch]]:
    words = model.config.vocab_size
    return [
        [_micro(0, words, 10, 14)],  # full
        [
            _micro(1, words, 3),
            _micro(2, words, 7, 1, 1, 2, 5, 1, 1, 1, 1, 1),
        ],  # gaps, more documents than slots
        [_micro(3, words, 12, 11)],
    ]


@pytest.mark.parametrize("changes", [{}, _MOE], ids=["dense", "experts"])
def test_filled_passes_train_as_plain_ones(changes: dict[str, object]) -> None:
    plain, filled = tiny_model(**changes), tiny_model(**changes)
    settings = OptimizerSection(lr=1e-2)
    one = SingleDevice(plain, settings)
    two = SingleDevice(filled, settings, CapturedPass(filled, 24, 14))
    for batches in _steps(plain):
        assert two.train_step(batches, 1.0, 0.5) == pytest.approx(one.train_step(batches, 1.0, 0.5), rel=1e-5)
    for a, b in zip(plain.parameters(), filled.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_micro_batch_that_does_not_fit_is_refused() -> None:
    model = tiny_model()
    captured = CapturedPass(model, 24, 14)
    for lengths in ((15,), (14, 11)):
        with pytest.raises(ConfigError, match=f"{sum(lengths)} tokens .* {max(lengths)} does not fit"):
            captured.run(_micro(0, model.config.vocab_size, *lengths), 1.0)


def test_rope_that_counts_on_the_host_is_refused() -> None:
    scaling = {"rope_type": "dynamic", "factor": 2.0}
    with pytest.raises(ConfigError, match="dynamic"):
        CapturedPass(tiny_model(rope_scaling=scaling), 24, 14)


@pytest.mark.gpu
@pytest.mark.parametrize("changes", [{}, _MOE], ids=["dense", "experts"])
def test_graphs_replay_what_is_run_anew(changes: dict[str, object]) -> None:
    """In bfloat16, with gaps and several micro-batches; a graph made of one batch serves the next ones."""
    device = usable_device("cuda")
    shape = {"head_dim": 64, "hidden_size": 128, **changes}
    runners = []
    for captured in (False, True):
        tiny = tiny_model(torch.bfloat16, **shape)
        model = Decoder(tiny.config, policy=tiny.policy, device=device, dtype=torch.bfloat16)
        model.load_state_dict(tiny.state_dict())
        passes = CapturedPass(model, 24, 14) if captured else None
        runners.append(SingleDevice(model, OptimizerSection(lr=1e-3), passes))
    for batches in 2 * _steps(runners[0].model):
        expected, got = (runner.train_step(batches, 1.0, 0.5) for runner in runners)
        assert got == pytest.approx(expected, rel=2e-2)
    with pytest.raises(ConfigError, match="bfloat16"):
        CapturedPass(Decoder(runners[0].config, policy=runners[0].model.policy, device=device), 24, 14)
