"""`mainspring plan`: its formulas against what ranks really hold and send, and what it lists and refuses."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from mainspring.cli.main import app
from mainspring.cli.plan import parse_bytes
from mainspring.errors import ConfigError
from mainspring.formats.files import write_json
from mainspring.formats.model_config import ModelConfig
from mainspring.model.decoder import Decoder
from mainspring.parallel.layout import Layout
from mainspring.parallel.mesh import Mesh
from mainspring.parallel.parallelize import parallelize
from mainspring.train.memory import Batch, _rank_shapes, activation_bytes, estimate, rank_shapes
from mainspring.train.plan import Plan, communication, plans
from mainspring.train.verify import VerifySettings
from parallel.conftest import Reference
from parallel.models import tiny
from parallel.pool import Pool

SETTINGS = VerifySettings(steps=2)
GIANT = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 32000, "hidden_size": 2048,
    "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32, "num_key_value_heads": 4,
    "max_position_embeddings": 2048, "dtype": "bfloat16",
}  # fmt: skip


@pytest.mark.parametrize("kind", ["dense", "biased"])
def test_activations_are_what_autograd_keeps(kind: str) -> None:
    """Of one layer in the middle, in float32: distinct storages that the forward pass saves, parameters left out."""
    config = tiny(kind, hidden_size=64, intermediate_size=160, head_dim=16)
    layout = Layout()
    model = Decoder(config, policy=_fast()).train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.1)
    share = parallelize(model, layout, Mesh.single())
    tokens = 256
    known = {parameter.untyped_storage().data_ptr() for parameter in share.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if (
            storage.data_ptr() not in known and tensor.numel() >= tokens * 8
        ):  # not masks, statistics, positions
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    layer = share.layers["1"]
    update, residual = (torch.randn(tokens, 64, requires_grad=True) for _ in range(2))
    batch = share.batch([tokens])
    angles = share.rotary.angles(batch)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = layer(update, residual, batch, angles)
    measured = sum(kept.values())
    del out
    assert activation_bytes(config, layout, 1, 4) * tokens == pytest.approx(measured, rel=0.1)


def _fast() -> object:
    from mainspring.ops import FAST

    return FAST


@pytest.mark.parametrize(
    ("kind", "layout", "dimension"),
    [
        ("dense", "tp=2", "tp"),
        ("dense", "tp=2,sequence_parallel=false", "tp"),
        ("dense", "pp=2", "pp"),
        ("dense", "cp=2", "cp"),
        ("dense", "cp=2,context=ulysses", "cp"),
        ("dense", "dp=2", "data"),
        ("dense", "dp=2,zero=1", "data"),
        ("dense", "dp=2,zero=2", "data"),
        ("dense", "dp=2,zero=3", "data"),
        ("dense", "dp=4,zero=3,replicate=2", "data"),
        ("moe", "dp=2,ep=2", "ep"),
    ],
)
def test_communication_is_what_ranks_send(
    pool: Pool, reference: Callable[..., Reference], kind: str, layout: str, dimension: str
) -> None:
    parsed, directory = Layout.parse(layout), reference(kind, SETTINGS).directory
    config = ModelConfig.from_file(directory)
    expected = getattr(communication(config, parsed, Batch(4, 46.5, 4)), dimension)
    sent = max(
        _sent(counted, parsed)[dimension]
        for counted in pool.run("jobs:traffic", parsed.world, str(directory), layout, SETTINGS)
    )
    assert sent == pytest.approx(expected, rel=0.05)


def _sent(traffic: dict[str, int], layout: Layout) -> dict[str, float]:
    """From bytes put into collectives to bytes sent, as ring algorithms send them."""
    axes = layout.axes
    sizes = {
        "tp": axes.tp, "keys": 1, "cp": axes.cp, "ep": axes.ep, "data": axes.dp_replicate * axes.dp_shard * axes.cp,
        "shard": axes.dp_shard * axes.cp, "replicate": axes.dp_replicate, "expert_shard": axes.dp_shard // axes.ep,
        "expert_data": axes.dp_replicate * axes.dp_shard // axes.ep,
    }  # fmt: skip
    dimensions = {"shard": "data", "replicate": "data", "expert_shard": "data", "expert_data": "data"}
    sent: dict[str, float] = defaultdict(float)
    for key, count in traffic.items():
        collective, group = key.split("/")
        if group in ("world", "keys", "tied"):
            continue
        if "->" in group:
            sent["pp"] += count if collective == "send" else 0
            continue
        n = sizes[group]
        factor = {
            "all_gather": n - 1.0, "reduce_scatter": (n - 1) / n, "all_to_all": (n - 1) / n,
            "all_reduce": 2 * (n - 1) / n, "pass_on": 1.0,
        }[collective]  # fmt: skip
        sent[dimensions.get(group, group)] += factor * count
    return sent


def test_a_shape_of_a_billion_weights_takes_what_is_known() -> None:
    """16 bytes a weight (ZeRO's paper, section 3.1), 18 where gradients of ranks are summed in fp32; of 12 a quarter
    on 4."""
    config = ModelConfig.from_dict(GIANT)
    weights = 1.1e9
    one = estimate(config, Layout(), Batch(1, 2048))
    assert one.parameters == pytest.approx(2 * weights, rel=0.01)
    assert one.optimizer == pytest.approx(12 * weights, rel=0.01)
    assert one.gradients == pytest.approx(2 * weights, rel=0.01)
    assert one.carried == 0
    assert estimate(config, Layout(), Batch(2, 2048)).carried == pytest.approx(4 * weights, rel=0.01)
    assert estimate(config, Layout(dp=4), Batch(4, 2048)).gradients == pytest.approx(4 * weights, rel=0.05)
    narrow = Layout(dp=4, gradient_sums="narrow")
    assert estimate(config, narrow, Batch(4, 2048)).gradients == pytest.approx(2 * weights, rel=0.05)
    assert estimate(config, narrow, Batch(8, 2048)) == estimate(config, Layout(dp=4), Batch(8, 2048))
    assert communication(config, narrow, Batch(4, 2048)).data == pytest.approx(
        2 * 2 * weights * 3 / 4, rel=0.01
    )
    four = estimate(config, Layout(dp=4, zero=1), Batch(4, 2048))
    assert four.optimizer == pytest.approx(3 * weights, rel=0.01)
    third = estimate(config, Layout(dp=4, zero=3), Batch(4, 2048))
    assert third.parameters < four.parameters / 2
    again = estimate(config, Layout(recompute="full"), Batch(1, 2048)).activations
    assert 2 * 2 * 22 * 2048 * 2048 < again < one.activations / 3
    assert estimate(config, Layout(tp=4), Batch(4, 2048)).activations == pytest.approx(
        one.activations / 4, rel=0.01
    )


def test_what_shapes_no_parameter_is_left_out_of_what_is_kept() -> None:
    """`rank_shapes` answers for layouts that differ in dp, cp, replicate, ZeRO or recompute from one entry."""
    config = tiny("moe")
    for degrees in ("dp=4,ep=2", "dp=4,cp=2,ep=4,zero=2", "pp=2,dp=4,replicate=2,tp=2,zero=3,recompute=full"):
        layout = Layout.parse(degrees)
        for rank in range(layout.pp):
            assert rank_shapes(config, layout, rank) == _rank_shapes.__wrapped__(config, layout, rank)


def test_plans_fit_and_are_sorted() -> None:
    config = ModelConfig.from_dict(GIANT | {"num_hidden_layers": 8})
    found = plans(config, 4, 80 * 10**9, Batch(16, 8192), 2048)
    assert found
    assert all(plan.memory.total <= 80e9 and plan.layout.world == 4 for plan in found)
    assert [plan.seconds for plan in found] == sorted(plan.seconds for plan in found)
    tight = plans(config, 4, 6 * 10**9, Batch(16, 8192), 2048)
    assert len(tight) > 0

    def count(plans: list[Plan], recompute: str) -> int:
        return sum(plan.layout.recompute == recompute for plan in plans)

    assert count(tight, "full") > count(found, "full")
    assert count(tight, "selective") > 0
    for plan in found:  # nothing is computed again that could be kept
        if plan.layout.recompute == "selective":
            keeping = replace(plan.layout, recompute="none")
            assert estimate(config, keeping, Batch(16, 8192), 80 * 10**9).total > 80e9


def test_the_longer_the_sequence_the_more_a_schedule_without_waits_saves() -> None:
    """Attention's gradient is all of inputs: zb-h1 waits for it on the first ranks, at the price of less memory."""
    config = ModelConfig.from_dict(GIANT | {"num_hidden_layers": 8})

    def pipelines(length: int) -> tuple[Plan, Plan]:
        found = {p.layout: p for p in plans(config, 4, 400 * 10**9, Batch(16, 8192), length)}
        without, waiting = (Layout(pp=4, schedule=name) for name in ("zero_bubble_h2", "zero_bubble"))
        return found[without], found[waiting]

    (short, short_waits), (long, long_waits) = pipelines(16), pipelines(8192)
    assert short.bubble == pytest.approx(short_waits.bubble, rel=0.05)
    assert long.bubble < 0.9 * long_waits.bubble
    assert long.memory.total > long_waits.memory.total


def test_what_does_not_fit_names_the_nearest() -> None:
    config = ModelConfig.from_dict(GIANT)
    with pytest.raises(
        ConfigError, match=r"no layout of 2 GPUs fits 1\.0 GB: the smallest, .* needs [0-9.]+ GB a rank"
    ):
        plans(config, 2, 10**9, Batch(16, 8192), 2048)
    with pytest.raises(
        ConfigError, match="no layout of 7 GPUs divides 32 heads, 5 layers and 16 micro-batches"
    ):
        plans(ModelConfig.from_dict(GIANT | {"num_hidden_layers": 5}), 7, 80 * 10**9, Batch(16, 2048), 2048)


@pytest.mark.parametrize(
    ("text", "value"), [("80GB", 80 * 10**9), ("79.5GiB", int(79.5 * 2**30)), ("1000", 1000)]
)
def test_memory_is_read_with_its_unit(text: str, value: int) -> None:
    assert parse_bytes(text) == value


@pytest.mark.parametrize("text", ["80 apples", "GB", "-3GB"])
def test_memory_without_sense_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(text)):
        parse_bytes(text)


def test_the_command_draws_a_schedule(tmp_path: Path) -> None:
    write_json(tmp_path / "config.json", GIANT)
    picture = tmp_path / "timeline.svg"
    arguments = ["--timeline", "pp=2,schedule=zero_bubble", "--micro-batches", "3", "--svg", str(picture)]
    done = CliRunner().invoke(app, ["plan", str(tmp_path), *arguments])
    assert done.exit_code == 0, done.output
    assert done.output.splitlines() == [
        "rank 0  F0 F1 .. I0 W0 F2 I1 W1 I2 W2",
        "rank 1  .. F0 I0 F1 I1 W0 F2 I2 W1 W2",
        "bubble 10.0% of 10",
    ]
    assert picture.read_text().startswith("<svg")
    refused = CliRunner().invoke(app, ["plan", str(tmp_path), "--timeline", "dp=2", "--micro-batches", "3"])
    assert isinstance(refused.exception, ConfigError)


def test_the_command_lists_layouts(tmp_path: Path) -> None:
    write_json(tmp_path / "config.json", GIANT)
    done = CliRunner().invoke(app, ["plan", str(tmp_path), "--gpus", "2", "--memory", "80GB"])
    assert done.exit_code == 0, done.output
    lines = done.output.splitlines()
    assert re.match(r"\d+ layouts of 2 ranks fit 80GB", lines[0])
    assert lines[1].split()[:3] == ["layout", "params", "grads"]
    assert any(line.startswith("dp=2,zero=3 ") for line in lines)
