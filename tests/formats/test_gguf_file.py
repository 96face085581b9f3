"""GGUF models come out as the Hugging Face models that they were made from, and damaged files are refused."""

from __future__ import annotations

import contextlib
import json
import re
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from formats.samples import byte_level_metadata, needs_smollm2, smollm2_path, write_gguf
from mainspring.errors import CheckpointError, MainspringError, UnsupportedModelError
from mainspring.formats.gguf_file import GGUFFile, convert_to_directory, to_stored
from mainspring.formats.gguf_header import GGUFHeader
from mainspring.formats.safetensors_file import CheckpointReader
from mainspring.formats.tokenizer import Tokenizer

SIZES = {
    "vocab_size": 400,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("llama", "Llama", {}),
    "llama-tied-biased": ("llama", "Llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    "llama-head-dim": ("llama", "Llama", {"head_dim": 16}),
    "llama-linear": ("llama", "Llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}),
    "llama-llama3": ("llama", "Llama", {"rope_parameters": LLAMA3, "head_dim": 32, "max_position_embeddings": 131072}),
    "mistral": ("llama", "Mistral", {"sliding_window": 8}),
    "mixtral": ("llama", "Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2": ("qwen2", "Qwen2", {"rope_parameters": YARN}),
    "qwen3": ("qwen3", "Qwen3", {"head_dim": 16}),
    "qwen3moe": (
        "qwen3moe",
        "Qwen3Moe",
        {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
         "norm_topk_prob": True},
    ),
}  # fmt: skip
PARTS = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
    "block_sparse_moe.gate": "ffn_gate_inp",
}
EXPERT_PARTS = {
    "w1": "gate",
    "w2": "down",
    "w3": "up",
    "gate_proj": "gate",
    "up_proj": "up",
    "down_proj": "down",
}


def permuted(weight: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """What llama.cpp's convert_hf_to_gguf.py does to q and k of Llama models."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(weight.shape))


def gguf_tensors(
    directory: Path, architecture: str, config: Any, split_experts: bool
) -> list[tuple[str, np.ndarray[Any, Any], str]]:
    """The tensors of a Hugging Face directory as llama.cpp's converter would store them, in F32."""
    out: dict[str, np.ndarray[Any, Any]] = {}
    experts: dict[str, dict[int, np.ndarray[Any, Any]]] = {}
    whole = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    for name, value in load_file(directory / "model.safetensors").items():
        stem, _, kind = name.rpartition(".")
        if stem in whole:
            out[f"{whole[stem]}.{kind}"] = value
            continue
        layer, part = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", stem).groups()
        expert = re.fullmatch(r".+\.experts\.(\d+)\.(\w+)", part)
        if expert is not None:
            key = f"blk.{layer}.ffn_{EXPERT_PARTS[expert[2]]}"
            experts.setdefault(key, {})[int(expert[1])] = value
            continue
        heads = {
            "self_attn.q_proj": config.num_attention_heads,
            "self_attn.k_proj": config.num_key_value_heads,
        }
        if architecture == "llama" and part in heads:
            value = permuted(value, heads[part])
        out[f"blk.{layer}.{PARTS[part]}.{kind}"] = value
    for key, by_number in experts.items():
        if split_experts:
            out |= {f"{key}.{i}.weight": value for i, value in by_number.items()}
        else:
            out[f"{key}_exps.weight"] = np.stack([by_number[i] for i in sorted(by_number)])
    return [(name, value, "F32") for name, value in out.items()]


def gguf_metadata(architecture: str, config: Any) -> dict[str, Any]:
    values: dict[str, Any] = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.freq_base": float(config.rope_parameters["rope_theta"]),
    }
    if getattr(config, "head_dim", None):
        values |= {"attention.key_length": config.head_dim, "rope.dimension_count": config.head_dim}
    if getattr(config, "num_experts_per_tok", None):
        values |= {"expert_count": config.num_local_experts, "expert_used_count": config.num_experts_per_tok}
    if architecture == "qwen3moe":
        values["expert_feed_forward_length"] = config.moe_intermediate_size
    if config.model_type == "mistral":
        values["attention.sliding_window"] = config.sliding_window
    rope = config.rope_parameters
    if rope["rope_type"] in ("linear", "yarn"):
        values |= {"rope.scaling.type": rope["rope_type"], "rope.scaling.factor": rope["factor"]}
    if rope["rope_type"] == "yarn":
        values["rope.scaling.original_context_length"] = rope["original_max_position_embeddings"]
    return {f"{architecture}.{key}": value for key, value in values.items()} | byte_level_metadata("smollm")


def make(directory: Path, model: str, split_experts: bool = False) -> tuple[Path, Any]:
    """A tiny random transformers model, saved in `directory`/hf and as a GGUF file."""
    architecture, family, extra = MODELS[model]
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config").from_dict(json.loads(json.dumps({**SIZES, **extra})))
    peer = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in peer.parameters():
            parameter.normal_(std=0.3)
    peer.save_pretrained(directory / "hf")
    tensors = gguf_tensors(directory / "hf", architecture, config, split_experts)
    if config.rope_parameters["rope_type"] == "llama3":
        plain = 500000.0 ** -(np.arange(0, config.head_dim, 2) / config.head_dim)
        divisors = (plain / peer.model.rotary_emb.inv_freq.numpy()).astype(np.float32)
        tensors.append(("rope_freqs.weight", divisors, "F32"))
    return write_gguf(
        directory / f"{model}.gguf", architecture, gguf_metadata(architecture, config), tensors
    ), peer


@pytest.mark.parametrize("model", MODELS)
def test_a_converted_model_is_the_one_that_it_was_made_from(model: str, tmp_path: Path) -> None:
    path, peer = make(tmp_path, model)
    convert_to_directory(path, tmp_path / "out", "float32")
    ours, theirs = CheckpointReader(tmp_path / "out"), CheckpointReader(tmp_path / "hf")
    assert set(ours.names()) == set(theirs.names())
    for name in theirs.names():
        assert np.array_equal(ours.entry(name).numpy(), theirs.entry(name).numpy()), name
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(again) is type(peer)
    tokens = torch.arange(40)[None]
    with torch.no_grad():
        assert torch.allclose(again(tokens).logits, peer(tokens).logits, rtol=1e-5, atol=1e-5)
    assert Tokenizer.from_directory(tmp_path / "out").eos_token_ids == (2,)


def test_experts_in_tensors_of_their_own_are_read_too(tmp_path: Path) -> None:
    path, _ = make(tmp_path, "mixtral", split_experts=True)
    file, theirs = GGUFFile(path), CheckpointReader(tmp_path / "hf")
    assert set(file.tensor_names()) == set(theirs.names())
    for name in theirs.names():
        assert np.array_equal(file.dequantise(name), theirs.entry(name).numpy())
        assert np.array_equal(file.entry(name).numpy(), theirs.entry(name).numpy())


def random_blocks(rng: np.random.Generator, kind: str, shape: tuple[int, int]) -> np.ndarray[Any, Any]:
    """Random stored rows of `kind`; made of random bytes where the gguf package cannot quantise."""
    if kind in ("Q4_K", "Q5_K", "Q6_K"):
        size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][1]
        blocks = rng.integers(0, 256, (shape[0] * shape[1] // 256, size), dtype=np.uint8)
        scales = rng.normal(size=(len(blocks), 2)).astype("<f2").view(np.uint8).reshape(len(blocks), 4)
        where = slice(208, 210) if kind == "Q6_K" else slice(0, 4)  # random bytes there could spell infinity
        blocks[:, where] = scales[:, : where.stop - where.start]
        return blocks.reshape(shape[0], -1)
    values = rng.normal(size=shape).astype(np.float32)
    stored = gguf.quants.quantize(values, gguf.GGMLQuantizationType[kind])
    return np.ascontiguousarray(stored)


@pytest.mark.parametrize(
    "kind", ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K"]
)
def test_every_type_is_read(kind: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    config = transformers.LlamaConfig(
        **SIZES
        | {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 1, "tie_word_embeddings": True}
    )
    quant = gguf.GGMLQuantizationType[kind]
    shapes = {
        "blk.0.attn_q.weight": (256, 256),
        "blk.0.attn_k.weight": (128, 256),
        "blk.0.attn_v.weight": (128, 256),
        "blk.0.attn_output.weight": (256, 256),
        "blk.0.ffn_gate.weight": (512, 256),
        "blk.0.ffn_up.weight": (512, 256),
        "blk.0.ffn_down.weight": (256, 512),
        "token_embd.weight": (400, 256),
    }
    stored = {name: random_blocks(rng, kind, shape) for name, shape in shapes.items()}
    norms = ("blk.0.attn_norm.weight", "blk.0.ffn_norm.weight", "output_norm.weight")
    # Rows are permuted whole, so that stored blocks can be.
    heads = {"blk.0.attn_q.weight": 4, "blk.0.attn_k.weight": 2}
    tensors = [(n, permuted(rows, heads[n]) if n in heads else rows, kind) for n, rows in stored.items()]
    tensors += [(name, np.full(256, 2, np.float32), "F32") for name in norms]
    path = write_gguf(tmp_path / "model.gguf", "llama", gguf_metadata("llama", config), tensors)
    file = GGUFFile(path)
    names = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.layers.0.mlp.down_proj.weight": "blk.0.ffn_down.weight",
    }
    names |= {f"model.layers.0.self_attn.{p}_proj.weight": f"blk.0.attn_{p}.weight" for p in "qkv"}
    for name, source in names.items():
        expected = gguf.quants.dequantize(stored[source], quant).reshape(shapes[source])
        assert np.isfinite(expected).all()
        assert np.array_equal(file.dequantise(name), expected), name
        if kind in ("F32", "F16", "BF16"):
            assert file.entry(name).dtype == kind
            assert bytes(file.entry(name).data) == stored[source].tobytes()
        else:
            with pytest.raises(CheckpointError, match=f"quantised as {kind}"):
                file.entry(name)
    reference = gguf.GGUFReader(path)
    assert {tensor.name for tensor in reference.tensors} == set(file.header.tensors)


def test_metadata_is_read_as_the_gguf_package_reads_it(tmp_path: Path) -> None:
    path, _ = make(tmp_path, "llama")
    fields = {k: f for k, f in gguf.GGUFReader(path).fields.items() if not k.startswith("GGUF.")}
    metadata = GGUFHeader(path).metadata
    assert {key: field.contents() for key, field in fields.items()} == metadata


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=20))
def test_bfloat16_rounds_as_torch_does(bits: list[int]) -> None:
    edges = [
        0x7F800000,
        0xFF800000,
        0x7F800001,
        0xFFFFFFFF,
        0x3F808000,
        0x3F818000,
        0x3F807FFF,
        0x7F7FFFFF,
        1,
        0x80008000,
    ]
    values = np.array(bits + edges, np.uint32).view(np.float32)
    expected = torch.from_numpy(values.copy()).to(torch.bfloat16)
    ours = torch.from_numpy(to_stored(values, "bfloat16").view(np.int16)).view(torch.bfloat16)
    assert torch.equal(ours.isnan(), expected.isnan())
    numbers = ~expected.isnan()
    assert torch.equal(ours[numbers].view(torch.int16), expected[numbers].view(torch.int16))


def test_conversion_reports_its_progress_and_is_whole(tmp_path: Path) -> None:
    path, _ = make(tmp_path, "llama-tied-biased")
    calls: list[tuple[int, int]] = []
    convert_to_directory(path, tmp_path / "out", "bfloat16", lambda done, total: calls.append((done, total)))
    total = CheckpointReader(tmp_path / "out").total_bytes
    assert calls[-1] == (total, total)
    assert [done for done, _ in calls] == sorted({done for done, _ in calls})
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    with pytest.raises(CheckpointError, match="exists already"):
        convert_to_directory(path, tmp_path / "out")


def test_an_interrupted_conversion_leaves_nothing(tmp_path: Path) -> None:
    path, _ = make(tmp_path, "llama")
    before = sorted(tmp_path.iterdir())

    def interrupt(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert_to_directory(path, tmp_path / "out", progress=interrupt)
    assert sorted(tmp_path.iterdir()) == before


@pytest.fixture(scope="module")
def small_file(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path, _ = make(tmp_path_factory.mktemp("gguf"), "mixtral")
    return path.read_bytes()


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_a_file_cut_anywhere_is_refused(
    tmp_path_factory: pytest.TempPathFactory, small_file: bytes, data: st.DataObject
) -> None:
    path = tmp_path_factory.getbasetemp() / "cut.gguf"
    size = data.draw(st.integers(0, len(small_file) - 1) | st.integers(0, 20_000))
    path.write_bytes(small_file[:size])
    with pytest.raises(CheckpointError):
        GGUFFile(path)


@settings(max_examples=250, deadline=None)
@given(data=st.data())
def test_a_damaged_file_never_fails_in_an_untyped_way(
    tmp_path_factory: pytest.TempPathFactory, small_file: bytes, data: st.DataObject
) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged.gguf"
    damaged = bytearray(small_file)
    for _ in range(data.draw(st.integers(1, 4))):
        # Mostly among the numbers at the beginning, where damage means most.
        place = data.draw(st.integers(0, 900) | st.integers(0, 25_000))
        damaged[place] = data.draw(st.sampled_from([0, 1, 0x7F, 0xFF]) | st.integers(0, 255))
    path.write_bytes(damaged)
    # Damage may go unnoticed (in a weight); what is noticed must be said as an error of ours.
    with contextlib.suppress(MainspringError):
        GGUFFile(path).tokenizer()


def test_files_that_are_no_gguf_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    with pytest.raises(CheckpointError, match="No such file"):
        GGUFFile(path)
    path.write_bytes(b"PK\x03\x04" + bytes(100))
    with pytest.raises(CheckpointError, match="not a GGUF file"):
        GGUFFile(path)
    path.write_bytes(b"GGUF" + struct.pack(">I", 3) + bytes(100))
    with pytest.raises(UnsupportedModelError, match="big-endian"):
        GGUFFile(path)
    path.write_bytes(b"GGUF" + struct.pack("<I", 1) + bytes(100))
    with pytest.raises(UnsupportedModelError, match="version 1"):
        GGUFFile(path)


def rewritten(
    tmp_path: Path, metadata: dict[str, Any], tensors: list[Any] | None = None, skip: str = ""
) -> Path:
    """The tiny Llama file with other metadata, additional tensors, or a tensor left out."""
    make(tmp_path, "llama")
    config = transformers.AutoConfig.from_pretrained(tmp_path / "hf")
    old = [t for t in gguf_tensors(tmp_path / "hf", "llama", config, False) if t[0] != skip]
    merged = {
        key: value
        for key, value in {**gguf_metadata("llama", config), **metadata}.items()
        if value is not None
    }
    return write_gguf(tmp_path / "other.gguf", "llama", merged, old + (tensors or []))


@pytest.mark.parametrize(
    ("metadata", "tensors", "skip", "error", "words"),
    [
        ({}, [("blk.0.mystery.weight", np.ones(4, np.float32), "F32")], "", UnsupportedModelError, "mystery"),
        ({}, [("rope_factors_long.weight", np.ones(4, np.float32), "F32")], "", UnsupportedModelError, "rope_factors"),
        ({}, [("rope_freqs.weight", np.full(4, 3, np.float32), "F32")], "", UnsupportedModelError, "Llama 3.1"),
        ({}, [], "blk.1.ffn_up.weight", CheckpointError, r"lacks the tensor 'model\.layers\.1\.mlp\.up_proj"),
        ({}, [], "token_embd.weight", CheckpointError, "token_embd"),
        ({"llama.feed_forward_length": 48}, [], "", CheckpointError, r"\(64, 32\): expected \(48, 32\)"),
        ({"llama.block_count": 1}, [], "", UnsupportedModelError, "does not know"),
        ({"llama.block_count": 10**9}, [], "", CheckpointError, "1000000000 layers"),
        ({"llama.attention.head_count": None}, [], "", CheckpointError, "head_count = None"),
        ({"llama.embedding_length": "many"}, [], "", CheckpointError, "'many'"),
        ({"llama.rope.dimension_count": 4, "llama.attention.key_length": 8}, [], "", UnsupportedModelError, "part"),
        ({"llama.rope.scaling.type": "longrope", "llama.rope.scaling.factor": 2.0}, [], "", UnsupportedModelError,
         "yarn"),
    ],
)  # fmt: skip
def test_files_that_contradict_themselves_are_refused(
    tmp_path: Path,
    metadata: dict[str, Any],
    tensors: list[Any],
    skip: str,
    error: type[MainspringError],
    words: str,
) -> None:
    path = rewritten(tmp_path, metadata, tensors, skip)
    with pytest.raises(error, match=words):
        GGUFFile(path)


def test_unknown_architectures_and_types_are_refused_with_the_known_ones(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "a.gguf", "gemma3", {}, [])
    with pytest.raises(UnsupportedModelError, match=r"'gemma3'.*llama, qwen2, qwen3, qwen3moe"):
        GGUFFile(path)
    raw = np.zeros((1, 84), np.uint8)
    path = write_gguf(tmp_path / "b.gguf", "llama", {}, [("token_embd.weight", raw, "Q2_K")])
    with pytest.raises(UnsupportedModelError, match=r"Q2_K.*Q4_K, Q5_K, Q6_K"):
        GGUFFile(path)


@needs_smollm2
def test_smollm2_has_the_weights_that_transformers_reads() -> None:
    path = smollm2_path() or Path()
    peer = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    )
    theirs = peer.state_dict()
    file = GGUFFile(path)
    assert set(theirs) - set(file.tensor_names()) == {"lm_head.weight"}
    for name in file.tensor_names():
        assert np.array_equal(file.dequantise(name), theirs[name].numpy()), name
    settings_of = (
        "hidden_size",
        "num_attention_heads",
        "max_position_embeddings",
        "rope_parameters",
        "eos_token_id",
    )
    ours = file.config.to_dict()
    assert {key: ours[key] for key in settings_of} == {key: getattr(peer.config, key) for key in settings_of}
    assert file.chat_template is not None
