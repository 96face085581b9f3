"""Expert capacity: who is dropped, that the rest is untouched, and that no layout drops others."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mainspring.errors import ConfigError
from mainspring.model.decoder import Decoder
from mainspring.ops import FAST, LOCKSTEP
from mainspring.parallel.balance import Load, statistics
from mainspring.parallel.experts import Balance, ParallelExperts
from mainspring.parallel.layout import Layout
from mainspring.parallel.mesh import Mesh
from mainspring.parallel.parallelize import parallelize
from mainspring.train.verify import VerifySettings
from parallel.conftest import Reference
from parallel.models import tiny
from parallel.pool import Pool

SETTINGS = VerifySettings(steps=2, dtype="float64")


def _block(capacity: float) -> ParallelExperts:
    model = Decoder(tiny("moe"), policy=FAST, dtype=torch.float64).train()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    share = parallelize(model, Layout(), Mesh.single(), balance=Balance(capacity=capacity))
    block = share.layers["2"].mlp
    assert isinstance(block, ParallelExperts)
    return block


def _by_hand(block: ParallelExperts, x: Tensor, limit: int) -> tuple[Tensor, int]:
    """Token by token, in their order."""
    given = [0] * block.num_experts
    dropped = 0
    rows = []
    for token in x:
        logits = block.router.weight @ token
        chosen = logits.topk(block.top_k)
        total = torch.zeros_like(token)
        for weight, expert in zip(torch.softmax(chosen.values, 0), chosen.indices.tolist(), strict=True):
            given[expert] += 1
            if given[expert] > limit:
                dropped += 1
                continue
            gate, up = (block.gate_up[expert] @ token).chunk(2)
            total = total + weight * (block.down[expert] @ (torch.nn.functional.silu(gate) * up))
        rows.append(total)
    return torch.stack(rows), dropped


@pytest.mark.parametrize("capacity", [0.25, 0.6, 0.9])
def test_the_first_tokens_are_served_and_the_rest_adds_nothing(capacity: float) -> None:
    block = _block(capacity)
    x = torch.randn(31, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).requires_grad_()
    block.balance.pieces = (31,)
    limit = -int(-31 * block.top_k * capacity // block.num_experts)
    expected, dropped = _by_hand(block, x, limit)
    out = block(x)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-14)
    assert int(block.dropped) == dropped > 0
    assert float(block.load.sum()) == 31 * block.top_k
    for got, wanted in zip(
        torch.autograd.grad(out.square().sum(), [x, block.down, block.router.weight]),
        torch.autograd.grad(expected.square().sum(), [x, block.down, block.router.weight]),
        strict=True,
    ):
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-12)


def test_a_capacity_for_all_is_no_capacity_and_evaluation_drops_nothing() -> None:
    x = torch.randn(40, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    enough, none, little = _block(4.0), _block(0.0), _block(0.1)
    enough.balance.pieces = little.balance.pieces = (40,)
    assert torch.equal(enough(x), none(x))
    assert not torch.equal(little(x), none(x))
    assert int(enough.dropped) == 0
    assert torch.equal(little.eval()(x), none.eval()(x))


LAYOUTS = ["dp=2,ep=2", "cp=2,ep=2,zero=3", "tp=2,recompute=full", "tp=2,cp=2,ep=2,recompute=selective"]


def test_every_layout_drops_the_same_slots(
    pool: Pool, reference: Callable[..., Reference], tmp_path: Path
) -> None:
    directory, file = str(reference("moe", SETTINGS).directory), str(tmp_path / "model.safetensors")

    def run(layout: str) -> list[dict[str, Any]]:
        return pool.run("jobs:capped", Layout.parse(layout).world, directory, layout, 0.8, SETTINGS, file)

    alone = run("one")[0]
    assert sum(alone["dropped"].values()) > 0
    for layout in LAYOUTS:
        for found in run(layout):
            assert found["loads"] == alone["loads"], layout
            assert found["dropped"] == alone["dropped"], layout
            assert found["error"] < 1e-10, layout
            assert found["loss"] == pytest.approx(alone["loss"], rel=1e-12)


def test_lockstep_refuses_what_depends_on_the_batch() -> None:
    model = Decoder(tiny("moe"), policy=LOCKSTEP)
    with pytest.raises(ConfigError, match=r"expert capacity of 1\.5 drops tokens.*numerics fast"):
        parallelize(model, Layout(), Mesh.single(), balance=Balance(capacity=1.5))


def test_metrics_say_what_the_experts_were_given(pool: Pool, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("".join(f"line {i} of {i * i % 89}\n" for i in range(100)))
    text = f"""
data.sources = ["{tmp_path / "a.txt"}"]
output = "{tmp_path / "out"}"
tokenizer.vocab_size = 270
training = {{ sequence_length = 24, tokens_per_micro_batch = 48, accumulation_steps = 2, max_steps = 2, log_every = 1 }}
experts = {{ capacity_factor = 0.5, auxiliary_loss = 0.01 }}
[model]
architecture = "Qwen3MoeForCausalLM"
hidden_size = 16
intermediate_size = 24
num_heads = 4
num_experts = 4
"""

    def steps_of(name: str, ranks: int, *overrides: str) -> list[dict[str, float]]:
        output = tmp_path / name
        pool.run("jobs:train", ranks, text, [f"output='{output}'", *overrides])
        lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
        return [line for line in lines if line["event"] == "step"]

    steps = steps_of("capped", 2, "parallel.ep=2")
    whole = steps_of("whole", 2, "parallel.ep=2", "experts.capacity_factor=0")
    plain = steps_of(
        "plain", 1, "experts.capacity_factor=0", "experts.auxiliary_loss=0"
    )  # by another trainer
    assert len(steps) == 2
    for name in ("expert_imbalance", "experts_idle", "slots_dropped"):
        assert plain[0][name] == whole[0][name]
    assert plain[0]["slots_dropped"] == 0.0
    for line in steps:
        assert line["expert_imbalance"] >= 1.0
        assert 0.0 <= line["experts_idle"] < 1.0
        assert 0.3 < line["slots_dropped"] < 0.9  # at most half of all slots are taken


def test_statistics_are_of_the_worst_layer() -> None:
    loads = {
        1: Load(torch.tensor([2.0, 2.0, 0.0, 0.0]), 1.0),
        3: Load(torch.tensor([1.0, 1.0, 1.0, 1.0]), 0.0),
    }
    found = statistics(loads)
    assert found is not None
    assert (found.imbalance, found.idle, found.dropped) == (2.0, 0.5, 1 / 8)
    assert statistics({}) is None
