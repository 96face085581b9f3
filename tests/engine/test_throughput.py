"""The throughput benchmark: its mix, its shapes, its result."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from mainspring.cli.main import app
from mainspring.engine.llm import LLM
from mainspring.engine.ranks.lead import LeadModel
from mainspring.engine.throughput import SHAPES, Workload, mix, random_model, run_workload, shape_config
from mainspring.errors import ConfigError
from mainspring.formats.model_config import ModelConfig
from mainspring.model.decoder import Decoder

SMALL = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
}


def test_the_mix_is_nano_vllms_lengths_in_their_order() -> None:
    workload = mix(256)
    assert workload.prompt_lengths[:3] == [964, 494, 876]
    assert (sum(workload.prompt_lengths), sum(workload.output_lengths)) == (144_831, 144_160)
    assert workload.counted == 144_160
    assert {min(workload.prompt_lengths) >= 100, max(workload.output_lengths) <= 1024} == {True}


@pytest.mark.parametrize(("name", "millions"), [("qwen3-0.6b", 596), ("llama-3.1-8b", 8030)])
def test_built_in_shapes_have_the_models_number_of_parameters(name: str, millions: int) -> None:
    model = Decoder(shape_config(name), device="meta", dtype=torch.bfloat16)
    assert sum(parameter.numel() for parameter in model.parameters()) // 1_000_000 == millions


def test_a_shape_that_is_neither_a_name_nor_a_file_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"'gpt-9'.*qwen3-0\.6b"):
        shape_config("gpt-9")
    assert set(SHAPES) == {"qwen3-0.6b", "llama-3.1-8b"}


def test_a_workload_gets_all_its_tokens_and_finds_no_prefix(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(SMALL))
    llm = LLM(random_model(shape_config(str(path)), "cpu", torch.float32, "lockstep"))
    result = run_workload(llm, Workload("some", [40, 3, 70], [5, 9, 1]), repetitions=2)
    assert (result.tokens, result.unit, len(result.tokens_per_second)) == (15, "output tokens/s", 2)
    assert run_workload(llm, Workload("in", [20], [1], counts_prompts=True), 1, seed=1).tokens == 20
    assert llm.engine.stats().prefix_cache_hits_total == 0
    with pytest.raises(ConfigError, match="does not fit"):
        run_workload(llm, Workload("long", [500], [50]), 1)


@pytest.mark.parametrize(
    ("options", "layout"),
    [
        (("--tp-invariant",), "tp_invariant=true"),
        pytest.param(("--tp", "2"), "tp=2", marks=pytest.mark.slow),
        pytest.param(("--pp", "2"), "pp=2", marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_the_command_measures_a_model_over_several_ranks(
    tmp_path: Path, options: tuple[str, ...], layout: str
) -> None:
    config, result = tmp_path / "config.json", tmp_path / "result.json"
    config.write_text(json.dumps(SMALL))
    command = [
        "bench", "throughput", str(config), "--cases", "one-stream", "--repetitions", "1", "--device", "cpu",
        "--dtype", "float32", "--max-model-len", "400", "--json", str(result), *options,
    ]  # fmt: skip
    outcome = CliRunner().invoke(app, command)
    assert outcome.exit_code == 0, outcome.output
    report = json.loads(result.read_text())
    assert layout in report["layout"].split(",")
    assert report["measurements"][0]["tokens"] == 256


def test_what_torchruns_ranks_cannot_measure_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    for options, words in ((("--tp", "2"), "first-token"), (("--cases", "mix"), "how they share the model")):
        error = CliRunner().invoke(app, ["bench", "throughput", "--device", "cpu", *options]).exception
        assert isinstance(error, ConfigError)
        assert words in str(error)


def test_a_rank_draws_its_part_the_same_each_time() -> None:
    sums = set()
    for _ in range(2):
        config = ModelConfig.from_dict(SMALL)
        model = random_model(config, "cpu", torch.float32, "lockstep", "tp_invariant=true")
        assert isinstance(model, LeadModel)
        sums.add(model.checksum())
        drawn = {name: parameter.detach() for name, parameter in model.named_parameters()}
        assert {float(p.mean()) for p in drawn.values() if p.dim() == 1} == {1.0}
        matrices = torch.cat([p.flatten() for p in drawn.values() if p.dim() > 1])
        assert float(matrices.std()) == pytest.approx(0.02, rel=0.02)
        model.close()
    assert len(sums) == 1


def test_the_command_writes_what_is_needed_to_read_its_figures_again(tmp_path: Path) -> None:
    config, result = tmp_path / "config.json", tmp_path / "result.json"
    config.write_text(json.dumps(SMALL))
    command = [
        "bench", "throughput", str(config), "--cases", "one-stream", "--repetitions", "1", "--device", "cpu",
        "--dtype", "float32", "--max-model-len", "400", "--json", str(result),
    ]  # fmt: skip
    outcome = CliRunner().invoke(app, command)
    assert outcome.exit_code == 0, outcome.output
    report = json.loads(result.read_text())
    assert report["numerics"] == "lockstep"
    assert report["first_token_seconds"] is None
    [measurement] = report["measurements"]
    assert (measurement["name"], measurement["tokens"]) == ("one-stream", 256)
    assert measurement["output_lengths"] == [256]
    assert measurement["tokens_per_second"][0] > 0
    assert CliRunner().invoke(app, [*command[:4], "nonsense"]).exit_code != 0
