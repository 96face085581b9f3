"""Builds a tokenizer from the vocabulary in a GGUF file's metadata.

Byte-level BPE vocabularies (`gpt2`) name the way they split text before merging (`tokenizer.ggml.pre`);
sentencepiece-style ones (`llama`) give scores instead of merges. The splits are those of the models' own
tokenizers, which llama.cpp mirrors in src/llama-vocab.cpp.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from mainspring.errors import TokenizerError
from mainspring.formats.gguf_config import eos_ids

_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4  # of `tokenizer.ggml.token_type`
_SPACE = "▁"

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS: Final = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST: Final = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

# How each kind of byte-level BPE splits text: pieces that one regular expression finds, or None for GPT-2's own.
_SPLITS: Mapping[str, str | None] = {
    "gpt-2": None,
    "smollm": None,
    "llama-bpe": rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}",
    "qwen2": rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}|{_REST}",
}


def build_tokenizer(metadata: Mapping[str, Any]) -> tuple[Tokenizer, dict[str, Any]]:
    """The tokenizer and the contents of its `tokenizer_config.json`.

    Raises TokenizerError if the vocabulary is missing, contradicts itself, or is of an unknown kind.
    """
    kind = metadata.get("tokenizer.ggml.model")
    tokens = _strings(metadata, "tokenizer.ggml.tokens")
    types = metadata.get("tokenizer.ggml.token_type", [_NORMAL] * len(tokens))
    if not isinstance(types, list) or len(types) != len(tokens):
        raise TokenizerError(f"the GGUF vocabulary has {len(tokens)} tokens, but not as many token types")
    if len(set(tokens)) != len(tokens):
        raise TokenizerError(
            f"the GGUF vocabulary of {len(tokens)} tokens has {len(set(tokens))} different ones only"
        )
    if kind == "gpt2":
        tokenizer = _byte_level(metadata, tokens)
        add_bos = metadata.get("tokenizer.ggml.pre") == "llama-bpe"
    elif kind == "llama":
        tokenizer = _sentencepiece(metadata, tokens, types)
        add_bos = True
    else:
        raise TokenizerError(f"the GGUF tokenizer {kind!r} is not supported; the known ones are: gpt2, llama")
    _add_special_tokens(tokenizer, tokens, types)
    config = _token_names(metadata, tokens)
    config["add_bos_token"] = bool(metadata.get("tokenizer.ggml.add_bos_token", add_bos))
    config["add_eos_token"] = bool(metadata.get("tokenizer.ggml.add_eos_token", False))
    _add_template(tokenizer, config)
    if isinstance(metadata.get("tokenizer.chat_template"), str):
        config["chat_template"] = metadata["tokenizer.chat_template"]
    config["clean_up_tokenization_spaces"] = False
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    return tokenizer, config


def _strings(metadata: Mapping[str, Any], key: str) -> list[str]:
    value = metadata.get(key)
    if not isinstance(value, list) or not value or not all(isinstance(item, str) for item in value):
        raise TokenizerError(
            f"the GGUF file has no list of strings under {key!r}: it carries no usable tokenizer"
        )
    return value


def _byte_level(metadata: Mapping[str, Any], tokens: list[str]) -> Tokenizer:
    pre = metadata.get("tokenizer.ggml.pre")
    if not isinstance(pre, str) or pre not in _SPLITS:
        raise TokenizerError(
            f"the GGUF pre-tokenizer {pre!r} is not supported; the known ones are: {', '.join(_SPLITS)}"
        )
    merges: list[tuple[str, str]] = []
    for merge in _strings(metadata, "tokenizer.ggml.merges"):
        left, space, right = merge.partition(" ")
        if not space:
            raise TokenizerError(f"the GGUF merge {merge!r} is not a pair")
        merges.append((left, right))
    vocabulary = {token: i for i, token in enumerate(tokens)}
    try:
        # Llama 3 takes a whole piece that is a token before it merges (as llama.cpp does).
        model = models.BPE(vocab=vocabulary, merges=merges, ignore_merges=pre == "llama-bpe")
    except Exception as error:  # tokenizers raises bare exceptions
        raise TokenizerError(f"the GGUF vocabulary and its merges contradict each other: {error}") from error
    tokenizer = Tokenizer(model)
    pattern = _SPLITS[pre]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)
    first: list[Any] = [pre_tokenizers.Split(Regex(pattern), "isolated")] if pattern is not None else []
    if pre == "smollm":
        first = [pre_tokenizers.Digits(individual_digits=True)]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*first, byte_level])
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(metadata: Mapping[str, Any], tokens: list[str], types: list[int]) -> Tokenizer:
    scores = metadata.get("tokenizer.ggml.scores")
    if not isinstance(scores, list) or len(scores) != len(tokens):
        raise TokenizerError(f"the GGUF vocabulary has {len(tokens)} tokens, but not as many scores")
    vocabulary = {token: i for i, token in enumerate(tokens)}
    unknown = metadata.get("tokenizer.ggml.unknown_token_id", 0)
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=_merges_from_scores(tokens, types, scores),
            unk_token=tokens[unknown] if isinstance(unknown, int) and unknown < len(tokens) else None,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    prefix = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
    steps = [normalizers.Prepend(_SPACE)] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", _SPACE)])
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return tokenizer


def _merges_from_scores(tokens: list[str], types: list[int], scores: list[float]) -> list[tuple[str, str]]:
    """Every way to put a token together from two others, best score first: what sentencepiece's BPE would try."""
    ids = {token: i for i, token in enumerate(tokens) if types[i] == _NORMAL}
    ranked: list[tuple[float, int, int, int]] = []
    for token, i in ids.items():
        for cut in range(1, len(token)):
            left, right = ids.get(token[:cut]), ids.get(token[cut:])
            if left is not None and right is not None:
                ranked.append((-scores[i], i, left, right))
    ranked.sort()
    return [(tokens[left], tokens[right]) for _, _, left, right in ranked]


def _add_special_tokens(tokenizer: Tokenizer, tokens: list[str], types: list[int]) -> None:
    for wanted, special in ((_CONTROL, True), (_USER_DEFINED, False)):
        added = [
            AddedToken(t, normalized=False, special=special)
            for t, k in zip(tokens, types, strict=True)
            if k == wanted
        ]
        if special:
            tokenizer.add_special_tokens(added)
        else:
            tokenizer.add_tokens(added)


def _token_names(metadata: Mapping[str, Any], tokens: list[str]) -> dict[str, Any]:
    """The names of the special tokens, and all ids that end a generation."""
    config: dict[str, Any] = {}
    for role, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        token_id = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if token_id is None:
            continue
        if not isinstance(token_id, int) or not 0 <= token_id < len(tokens):
            raise TokenizerError(
                f"the GGUF {key} token id {token_id!r} lies outside its {len(tokens)} tokens"
            )
        config[f"{role}_token"] = tokens[token_id]
    extra = [token_id for token_id in eos_ids(metadata) if 0 <= token_id < len(tokens)]
    if len(extra) > 1:
        config["extra_special_tokens"] = {"eot_token": tokens[extra[1]]}
    return config


def _add_template(tokenizer: Tokenizer, config: Mapping[str, Any]) -> None:
    begin = config.get("bos_token") if config["add_bos_token"] else None
    end = config.get("eos_token") if config["add_eos_token"] else None
    if begin is None and end is None:
        return
    single = " ".join([*([begin] if begin else []), "$A", *([end] if end else [])])
    pair = " ".join([single, *([f"{begin}:1"] if begin else []), "$B:1", *([f"{end}:1"] if end else [])])
    specials = [(token, tokenizer.token_to_id(token)) for token in (begin, end) if token]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=single, pair=pair, special_tokens=specials
    )
