"""A tokenizer of one token a byte: a character of several bytes comes in pieces."""

from __future__ import annotations

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from mainspring.formats.tokenizer import Tokenizer

END = 256  # the special token <end>


def byte_tokenizer(chat_template: str | None = None) -> Tokenizer:
    """Ids 0 to 255 are the bytes, 256 is <end>."""
    # Byte-level spelling: printable bytes are themselves, the others follow from code point 256 on.
    alphabet = set(pre_tokenizers.ByteLevel.alphabet())
    others = iter(range(256, 512))
    vocab = {chr(byte) if chr(byte) in alphabet else chr(next(others)): byte for byte in range(256)}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<end>"])
    return Tokenizer(backend, {} if chat_template is None else {"chat_template": chat_template})
