"""Models with the weights of their GGUF file kept quantised: batch-invariant, never trained or saved."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from formats.samples import write_gguf
from formats.test_gguf_file import SIZES, gguf_metadata, make, permuted, random_blocks
from mainspring.engine.llm import LLM
from mainspring.engine.sampling_params import SamplingParams
from mainspring.errors import ConfigError, ModelNotFoundError, UnsupportedModelError
from mainspring.formats.named_models import gguf_source, resolve
from mainspring.model.checkpoint import load_model
from mainspring.model.decoder import Decoder
from mainspring.ops.quantised_linear import QuantisedWeight
from support.cpu_kernels import requires_kernels

pytestmark = requires_kernels

PROMPTS = [[1, 504, 3575, 282, 4649, 314], [1, 253, 2012, 28, 359, 536, 253, 1131, 30], [9, 8, 7]]


@pytest.fixture(scope="module")
def model() -> Decoder:
    return load_model("smollm2", quantized=True)


def test_blocks_of_the_file_are_the_weights(model: Decoder) -> None:
    weights = model.quantised_weights()
    assert len(weights) == 4 * model.config.num_layers + 1
    # Q4_1: 20 bytes for 32 weights, Q8_0 (the embedding): 34.
    assert weights["layers.3.attention.qkv.weight"].nbytes == 960 * 576 // 32 * 20
    assert weights["embedding"].nbytes == 49152 * 576 // 32 * 34
    assert model.num_parameters == 134_515_008
    assert sum(p.numel() for p in model.parameters()) < 50_000  # norms


def test_computes_what_the_expanded_weights_do(model: Decoder) -> None:
    exact = load_model("smollm2", dtype="float32")
    name = "layers.0.attention.qkv.weight"
    expanded = dict(exact.named_parameters())[name]
    blocks = QuantisedWeight(model.quantised_weights()[name].parts, torch.float32)
    assert torch.equal(blocks.expanded(), expanded)  # rows of q and k in Hugging Face's order
    with torch.inference_mode():
        got, want = model.log_probs(PROMPTS), exact.log_probs(PROMPTS)
        plain = load_model("smollm2").log_probs(PROMPTS)
    ours = torch.cat([g - w for g, w in zip(got, want, strict=True)]).abs().mean()
    bf16 = torch.cat([p - w for p, w in zip(plain, want, strict=True)]).abs().mean()
    assert ours < 2 * bf16 + 0.05


def test_the_engine_reports_the_models_own_log_probabilities_in_any_batch(model: Decoder) -> None:
    llm = LLM(model)
    params = SamplingParams(temperature=1.0, seed=3, max_tokens=6, logprobs=0, ignore_eos=True)
    together = llm.generate(PROMPTS, params)
    for prompt, output in zip(PROMPTS, together, strict=True):
        alone = llm.generate(prompt, params)[0].outputs[0]
        choice = output.outputs[0]
        assert alone.token_ids == choice.token_ids
        with torch.inference_mode():
            scored = model.log_probs([prompt + list(choice.token_ids)])[0][len(prompt) - 1 :]
        reported = [
            entry[token].logprob for token, entry in zip(choice.token_ids, choice.logprobs, strict=True)
        ]
        assert scored.tolist() == reported


def test_is_neither_saved_nor_trained(model: Decoder) -> None:
    for refused in (model.hf_tensors, model.state_dict, lambda: model.output_weight):
        with pytest.raises(UnsupportedModelError, match="quantised blocks"):
            refused()


def test_what_cannot_be_kept_quantised_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="read from a GGUF file"):
        load_model(resolve("smollm2").path, quantized=True)
    with pytest.raises(ConfigError, match="bfloat16 or float32"):
        load_model("smollm2", quantized=True, dtype="float16")
    assert gguf_source("SmolLM2").suffix == ".gguf"


def mixed_file(path: Path, kinds: dict[str, str]) -> Path:
    """A tiny Llama whose matrices have the given types ("" is that of all others)."""
    rng = np.random.default_rng(3)
    sizes = {
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 1,
        "tie_word_embeddings": True,
    }
    config = transformers.LlamaConfig(**SIZES | sizes)
    shapes = {"attn_q": (256, 256), "attn_k": (128, 256), "attn_v": (128, 256), "attn_output": (256, 256)}
    shapes |= {"ffn_gate": (512, 256), "ffn_up": (512, 256), "ffn_down": (256, 512)}
    tensors = []
    for name, shape in {**shapes, "token_embd": (400, 256)}.items():
        kind = kinds.get(name, kinds[""])
        rows = random_blocks(rng, kind, shape)
        rows = permuted(rows, {"attn_q": 4, "attn_k": 2}[name]) if name in ("attn_q", "attn_k") else rows
        full = f"blk.0.{name}.weight" if name in shapes else f"{name}.weight"
        tensors.append((full, rows, kind))
    norms = ("blk.0.attn_norm.weight", "blk.0.ffn_norm.weight", "output_norm.weight")
    tensors += [(name, np.full(256, 0.1, np.float32), "F32") for name in norms]
    return write_gguf(path, "llama", gguf_metadata("llama", config), tensors)


def test_types_may_mix_and_others_are_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAINSPRING_CACHE", str(tmp_path / "cache"))
    path = mixed_file(tmp_path / "mixed.gguf", {"": "Q4_0", "attn_v": "Q8_0", "ffn_down": "Q6_K"})
    model = load_model(path, quantized=True, dtype="float32")
    weights = model.quantised_weights()
    assert [part.kind for part in weights["layers.0.attention.qkv.weight"].parts] == ["Q4_0", "Q4_0", "Q8_0"]
    assert "layers.0.mlp.down.weight" not in weights
    parameters = dict(load_model(path, dtype="float32").named_parameters())
    assert torch.equal(
        dict(model.named_parameters())["layers.0.mlp.down.weight"], parameters["layers.0.mlp.down.weight"]
    )
    for name, weight in weights.items():
        assert torch.equal(weight.expanded(), parameters[name]), name
    reference = load_model(path, quantized=True, dtype="float32", backend="reference").log_probs([[1, 2, 3]])[
        0
    ]
    torch.testing.assert_close(
        reference, load_model(path, dtype="float32").log_probs([[1, 2, 3]])[0], rtol=1e-4, atol=1e-4
    )


def test_files_without_a_type_of_ours_and_mixtures_of_experts_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="stores F16, F32; kept quantised are Q4_0, Q4_1, Q8_0"):
        load_model(mixed_file(tmp_path / "plain.gguf", {"": "F16"}), quantized=True)
    with pytest.raises(UnsupportedModelError, match="mixture of experts"):
        load_model(make(tmp_path, "mixtral")[0], quantized=True)
