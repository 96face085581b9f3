"""LoRA adapters: what the merged weights give, several in one batch, each request as if it were alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from mainspring.engine.llm import LLM
from mainspring.engine.sampling_params import SamplingParams
from mainspring.errors import CheckpointError, InvalidRequestError
from mainspring.formats.lora_adapter import read_lora_adapter
from mainspring.model.decoder import Decoder
from mainspring.model.initialise import create_model
from support.families import FAMILIES, model_config

VOCAB = 97
PREFIX = "base_model.model."
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def tiny_model(name: str = "llama", dtype: torch.dtype = torch.float32) -> Decoder:
    family = next(family for family in FAMILIES if family.name == name)
    return create_model(model_config(family), dtype=dtype, seed=3)


def write_adapter(
    directory: Path, model: Decoder, targets: list[str], rank: int, seed: int, **config: Any
) -> dict[str, Tensor]:
    """A random adapter as PEFT writes one; returns its change of the weights by Hugging Face name."""
    generator = torch.Generator().manual_seed(seed)
    settings = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": 24,
        "bias": "none",
        "target_modules": targets,
        **config,
    }
    tensors, changes = {}, {}
    for name, weight in model.hf_tensors().items():
        module = name.removesuffix(".weight")
        if module.rpartition(".")[2] not in targets or weight.dim() != 2:
            continue
        r = next((v for k, v in config.get("rank_pattern", {}).items() if k in module), rank)
        alpha = next((v for k, v in config.get("alpha_pattern", {}).items() if k in module), 24)
        a = torch.randn(r, weight.shape[1], generator=generator) * 0.1
        b = torch.randn(weight.shape[0], r, generator=generator) * 0.1
        tensors[f"{PREFIX}{module}.lora_A.weight"], tensors[f"{PREFIX}{module}.lora_B.weight"] = a, b
        changes[name] = (alpha / (r**0.5 if config.get("use_rslora") else r)) * (b @ a)
    directory.mkdir()
    (directory / "adapter_config.json").write_text(json.dumps(settings))
    save_file(tensors, directory / "adapter_model.safetensors")
    return changes


def merged(model: Decoder, changes: dict[str, Tensor]) -> Decoder:
    """A copy with the adapter in its weights."""
    copy = tiny_model()
    copy.load_state_dict(model.state_dict())
    with torch.no_grad():
        for name, change in changes.items():
            copy.hf_tensors()[name].add_(change)
    return copy


@pytest.mark.parametrize(
    ("targets", "rank", "config"),
    [
        (ALL, 4, {}),
        (["q_proj", "v_proj"], 20, {}),
        (["k_proj", "down_proj"], 3, {"use_rslora": True}),
        (ALL, 4, {"rank_pattern": {"q_proj": 7}, "alpha_pattern": {"layers.1.mlp.up_proj": 3}}),
    ],
)
def test_an_adapter_gives_what_the_merged_weights_give(
    tmp_path: Path, targets: list[str], rank: int, config: dict[str, Any]
) -> None:
    model = tiny_model()
    changes = write_adapter(tmp_path / "a", model, targets, rank, 1, **config)
    llm = LLM(model, lora={"a": tmp_path / "a"}, num_blocks=20)
    params = SamplingParams(seed=1, max_tokens=12, logprobs=0, prompt_logprobs=0)
    [output] = llm.generate([[3, 1, 4, 1, 5]], params, lora="a")
    [plain] = llm.generate([[3, 1, 4, 1, 5]], params)
    sequence = output.prompt_token_ids + output.outputs[0].token_ids
    entries = [*(output.prompt_logprobs or [])[1:], *(output.outputs[0].logprobs or [])]
    got = torch.tensor([entry[t].logprob for entry, t in zip(entries, sequence[1:], strict=True) if entry])
    [expected] = merged(model, changes).log_probs([sequence])
    torch.testing.assert_close(got, expected, rtol=2e-5, atol=2e-5)
    [base] = model.log_probs([sequence])
    assert (got - base).abs().max() > 0.01
    assert plain.prompt_logprobs != output.prompt_logprobs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_requests_of_several_adapters_are_bitwise_those_alone(tmp_path: Path, dtype: torch.dtype) -> None:
    model = tiny_model(dtype=dtype)
    for number, (targets, rank) in enumerate([(ALL, 4), (["q_proj", "o_proj"], 17), (["down_proj"], 1)]):
        write_adapter(tmp_path / str(number), model, targets, rank, number)
    lora = {str(number): tmp_path / str(number) for number in range(3)}
    prompts = [[1, 2, 3], [1, 2, 3], [4] * 9, [1, 2, 3], [5, 6], [7]]
    names = ["0", None, "1", "2", "0", None]
    params = [SamplingParams(seed=i, max_tokens=8 + i, logprobs=2) for i in range(6)]
    crowded = LLM(model, lora=lora, num_blocks=9, block_size=4, max_num_batched_tokens=7, max_num_seqs=4)
    together = crowded.generate(prompts, params, lora=names)
    assert crowded.engine.stats().preemptions_total > 0
    roomy = LLM(model, lora=lora, num_blocks=40)
    for prompt, param, name, output in zip(prompts, params, names, together, strict=True):
        [alone] = roomy.generate([prompt], param, lora=name)
        assert alone.outputs == output.outputs
    bare = LLM(model, num_blocks=40)
    assert bare.generate([prompts[1]], params[1])[0].outputs == together[1].outputs
    assert together[0].outputs[0].token_ids != together[3].outputs[0].token_ids


def test_an_unknown_adapter_is_refused(tmp_path: Path) -> None:
    model = tiny_model()
    write_adapter(tmp_path / "a", model, ALL, 2, 0)
    llm = LLM(model, lora={"style": tmp_path / "a"}, num_blocks=9)
    with pytest.raises(InvalidRequestError, match="no adapter 'tone'; this engine has: style"):
        llm.generate([[1]], lora="tone")
    with pytest.raises(InvalidRequestError, match="1 prompts, but 2 lora names"):
        llm.generate([[1]], lora=["style", None])
    with pytest.raises(InvalidRequestError, match="this engine has: none"):
        LLM(model, num_blocks=9).generate([[1]], lora="style")


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"peft_type": "LOHA"}, "'LOHA'"),
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"r": 0}, "r = 0"),
        ({"r": 5}, "says rank 5"),
        ({"lora_alpha": "x"}, "no number"),
    ],
)
def test_an_adapter_that_is_no_plain_lora_is_refused(
    tmp_path: Path, config: dict[str, Any], words: str
) -> None:
    write_adapter(tmp_path / "a", tiny_model(), ["q_proj"], 2, 0)
    path = tmp_path / "a" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    with pytest.raises(CheckpointError, match=words):
        read_lora_adapter(tmp_path / "a")


def test_an_adapter_without_a_file_or_half_of_a_pair_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"adapter_config\.json"):
        read_lora_adapter(tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2}')
    with pytest.raises(CheckpointError, match=r"no adapter_model\.safetensors"):
        read_lora_adapter(tmp_path)
    save_file({f"{PREFIX}x.lora_A.weight": torch.zeros(2, 3)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="only lora_A of 'x'"):
        read_lora_adapter(tmp_path)
    save_file({f"{PREFIX}x.lora_embedding_A": torch.zeros(2, 3)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="no lora_A or lora_B"):
        read_lora_adapter(tmp_path)


@pytest.mark.parametrize(
    ("module", "shape", "words"),
    [
        (
            "model.layers.0.self_attn.q_proj",
            (48, 40),
            r"made for another model.*\[48, 40\], the model's \[48, 48\]",
        ),
        ("model.layers.7.self_attn.q_proj", (48, 48), "no layer of this model that takes adapters"),
        ("lm_head", (97, 48), "those are: down_proj, gate_proj"),
        ("model.embed_tokens", (97, 48), "no layer of this model"),
    ],
)
def test_an_adapter_of_another_model_is_refused(
    tmp_path: Path, module: str, shape: tuple[int, int], words: str
) -> None:
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2}')
    a, b = torch.zeros(2, shape[1]), torch.zeros(shape[0], 2)
    tensors = {f"{PREFIX}{module}.lora_A.weight": a, f"{PREFIX}{module}.lora_B.weight": b}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=words):
        LLM(tiny_model(), lora={"other": tmp_path}, num_blocks=9)


def test_the_experts_of_a_mixture_take_no_adapters_but_its_attention_does(tmp_path: Path) -> None:
    model = tiny_model("mixtral")
    write_adapter(tmp_path / "a", model, ["q_proj"], 2, 0)
    LLM(model, lora={"a": tmp_path / "a"}, num_blocks=9).generate([[1]], lora="a")
    write_adapter(tmp_path / "b", model, ["w1"], 2, 0)
    with pytest.raises(CheckpointError, match=r"experts\.0\.w1"):
        LLM(model, lora={"b": tmp_path / "b"}, num_blocks=9)
