"""What bytes each token stands for, under the two ways in which the supported vocabularies spell bytes."""

from __future__ import annotations

import json
import re
from typing import Any

import tokenizers

from mainspring.errors import TokenizerError

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_KNOWN = "ByteLevel, ByteFallback (with Replace, Fuse, Strip) and Metaspace"


class TokenBytes:
    """Maps a token id to its bytes, worked out on first use.

    Byte-level vocabularies (GPT-2's way) spell every byte as one printable character. Sentencepiece's spell a
    space as U+2581 and, for lack of a better token, a byte as `<0xNN>`.
    """

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        self._backend = backend
        self._known: dict[int, bytes] = {}
        steps = _decoder_steps(backend)
        kinds = [str(step.get("type")) for step in steps]
        self._byte_level = "ByteLevel" in kinds
        self._byte_fallback = "ByteFallback" in kinds
        self._space = "▁" if {"Replace", "Metaspace"} & set(kinds) else None
        self.strips_first_space = _strips_first_space(steps)
        # transformers puts sentencepiece's steps, which then change nothing, before ByteLevel in what it makes of
        # GGUF files.
        others = {"ByteLevel"} if self._byte_level else {"Strip", "Metaspace"}
        if (
            not kinds
            or not set(kinds) <= {"Replace", "ByteFallback", "Fuse"} | others
            or not all(map(_is_standard, steps))
        ):
            raise TokenizerError(
                f"the tokenizer's decoder {kinds or None} is not supported; the known ones are: {_KNOWN}"
            )

    def __getitem__(self, token_id: int) -> bytes:
        known = self._known.get(token_id)
        if known is None:
            known = self._known[token_id] = self._work_out(token_id)
        return known

    def _work_out(self, token_id: int) -> bytes:
        if token_id < 0:
            raise TokenizerError(f"token id {token_id} is negative")
        token = self._backend.id_to_token(token_id) if token_id < 1 << 32 else None
        if token is None:
            return b""
        if self._byte_level:
            # An added token may hold characters that spell no byte: it then stands for itself.
            spelled = [_BYTE_OF_CHARACTER.get(character) for character in token]
            whole = [byte for byte in spelled if byte is not None]
            return bytes(whole) if len(whole) == len(spelled) else str(token).encode()
        match = _BYTE_TOKEN.fullmatch(token) if self._byte_fallback else None
        if match is not None:
            return bytes([int(match[1], 16)])
        return str(token if self._space is None else token.replace(self._space, " ")).encode()


def _byte_characters() -> dict[str, int]:
    """GPT-2's table (bytes_to_unicode in its encoder.py): printable bytes as themselves, others from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(others)}


_BYTE_OF_CHARACTER = _byte_characters()


def _decoder_steps(backend: tokenizers.Tokenizer) -> list[dict[str, Any]]:
    if backend.decoder is None:
        return []
    state = json.loads(backend.decoder.__getstate__())  # plain JSON: the same as in tokenizer.json
    return list(state["decoders"]) if state.get("type") == "Sequence" else [state]


def _is_standard(step: dict[str, Any]) -> bool:
    """Whether a step does what its kind does in Llama's and Mistral's tokenizers, and nothing else."""
    if step["type"] == "Replace":
        return step.get("pattern") == {"String": "▁"} and step.get("content") == " "
    if step["type"] == "Strip":
        return step.get("content") == " " and step.get("start") in (0, 1) and step.get("stop") == 0
    if step["type"] == "Metaspace":
        return step.get("replacement") == "▁"
    return True


def _strips_first_space(steps: list[dict[str, Any]]) -> bool:
    return any(
        (step["type"] == "Strip" and step.get("start") == 1)
        or (step["type"] == "Metaspace" and step.get("prepend_scheme") != "never")
        for step in steps
    )
