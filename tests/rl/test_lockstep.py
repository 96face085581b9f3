"""The lockstep check: silent while the engine is right; else the run stops and the operation is named."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

from mainspring.errors import LockstepError
from mainspring.model.decoder import Decoder
from mainspring.rl.lockstep import LockstepCheck, first_difference
from mainspring.rl.rollout_settings import RolloutSettings
from mainspring.rl.rollouts import Rollouts
from mainspring.rl.trajectories import Trajectory
from rl import sorting

SETTINGS = RolloutSettings(prompts_per_step=2, group_size=2, max_tokens=6, seed=1)
EXPERTS = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "norm_topk_prob": True,
}


def _collect(model: Decoder, **more: bool) -> tuple[Rollouts, list[Trajectory]]:
    source = Rollouts(model, sorting.prompts(5, 2), sorting.TEXTS, sorting.Graded(), SETTINGS, **more)
    return source, [t for group in source.collect() for t in group]


@pytest.mark.parametrize("changes", [{}, EXPERTS, {"tie_word_embeddings": False}])
def test_an_honest_engine_has_a_delta_of_zero(changes: dict[str, int]) -> None:
    model = sorting.model("lockstep", **changes)
    source, trajectories = _collect(model)
    check = LockstepCheck(model, source)
    check.score(trajectories, tokens_per_microbatch=30)
    assert (check.max_delta, check.num_compared) == (0.0, sum(t.num_written for t in trajectories))
    tokens = trajectories[0].tokens
    found = first_difference(model, source.engine_model, tokens, len(tokens) - 1)
    assert (found.operation, found.weights) == (None, ())


PERTURBED = [
    ("embedding", "embedding"),
    ("layers.0.input_norm.weight", "layers.0.input_norm"),
    ("layers.0.attention.qkv.weight", "layers.0.attention.qkv"),
    ("layers.1.attention.q_norm.weight", "layers.1.attention.q_norm or rope"),
    ("layers.1.attention.k_norm.weight", "layers.1.attention.k_norm or rope"),
    ("layers.0.attention.output.weight", "layers.0.attention.output"),
    ("layers.1.post_attention_norm.weight", "layers.1.post_attention_norm"),
    ("layers.1.mlp.gate_up.weight", "layers.1.mlp.gate_up"),
    ("layers.0.mlp.down.weight", "layers.0.mlp.down"),
    ("norm.weight", "norm"),
]
PERTURBED_EXPERTS = [
    ("layers.1.mlp.router.weight", "layers.1.mlp.router"),
    ("layers.0.mlp.gate_up", "layers.0.mlp.experts"),
]
PERTURBED_HEAD = [("output_embedding", "logits (output embedding)")]


@pytest.mark.parametrize(
    ("parameter", "operation", "changes"),
    [
        *((*case, {}) for case in PERTURBED),
        *((*case, EXPERTS) for case in PERTURBED_EXPERTS),
        *((*case, {"tie_word_embeddings": False}) for case in PERTURBED_HEAD),
    ],
)
def test_one_changed_weight_of_the_engine_stops_the_run_and_names_the_operation(
    parameter: str, operation: str, changes: dict[str, int]
) -> None:
    model = sorting.model("lockstep", **changes)
    source = Rollouts(model, sorting.prompts(5, 2), sorting.TEXTS, sorting.Graded(), SETTINGS, snapshot=True)
    with torch.no_grad():
        weight = dict(source.engine_model.named_parameters())[parameter]
        weight.mul_(1.01)
    trajectories = [t for group in source.collect() for t in group]
    message = re.escape(f"The first operation to differ is {operation}, at token ")
    with pytest.raises(LockstepError, match=message) as caught:
        LockstepCheck(model, source).score(trajectories, tokens_per_microbatch=1000)
    said = str(caught.value)
    assert f"The engine's weights are not the trainer's: {parameter}." in said
    assert re.search(r"token \d+ of sequence 0 \(id \d+, version 0\)", said)
    assert re.search(r"max \|delta\| = \d", said)


def test_keys_of_old_weights_are_found_although_every_operation_agrees() -> None:
    model = sorting.model("lockstep")
    source, trajectories = _collect(model)
    with torch.no_grad():  # behind the rollouts' back: no take_weights
        model.layers[0].attention.qkv.weight.add_(0.5)
    with pytest.raises(LockstepError, match="Computed anew, both agree"):
        LockstepCheck(model, source).score(trajectories, tokens_per_microbatch=1000)


def test_tokens_of_other_versions_are_passed_over() -> None:
    model = sorting.model("lockstep")
    source, trajectories = _collect(model)
    with torch.no_grad():
        model.embedding.mul_(1.1)
    source.take_weights(1)
    check = LockstepCheck(model, source)
    check.score(trajectories, tokens_per_microbatch=1000)
    assert (check.max_delta, check.num_compared) == (0.0, 0)


def test_a_log_probability_that_is_no_number_does_not_pass() -> None:
    model = sorting.model("lockstep")
    source, trajectories = _collect(model)
    broken = [replace(t, log_probs=(float("nan"), *t.log_probs[1:])) for t in trajectories]
    with pytest.raises(LockstepError, match="max \\|delta\\| = inf"):
        LockstepCheck(model, source).score(broken, tokens_per_microbatch=1000)


def test_fast_numerics_are_measured_and_do_not_stop() -> None:
    model = sorting.model("fast")
    source, trajectories = _collect(model)
    off = [replace(t, log_probs=tuple(p - 0.25 for p in t.log_probs)) for t in trajectories]
    check = LockstepCheck(model, source)
    check.score(off, tokens_per_microbatch=1000)
    assert check.max_delta == pytest.approx(0.25, abs=1e-3)
