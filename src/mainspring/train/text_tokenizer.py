"""The tokenizer of a run: newly trained or read from a directory, with the files that a checkpoint carries."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from mainspring.errors import TokenizerError
from mainspring.formats.files import write_file
from mainspring.train.tokenizer_training import END_OF_TEXT, train_tokenizer

_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
)


@dataclass(frozen=True)
class TextTokenizer:
    """Encodes texts into documents. `end_of_text` stands before every document and after every complete one."""

    tokenizer: Tokenizer
    end_of_text: int
    files: Mapping[str, bytes]
    """Hugging Face's tokenizer files by name."""

    @staticmethod
    def train(texts: Iterable[str], vocab_size: int) -> TextTokenizer:
        """A new byte-level BPE."""
        tokenizer = train_tokenizer(texts, vocab_size)
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": END_OF_TEXT,
            "eos_token": END_OF_TEXT,
            "clean_up_tokenization_spaces": False,
        }
        files = {
            "tokenizer.json": tokenizer.to_str(pretty=True).encode(),
            "tokenizer_config.json": (json.dumps(config, indent=2) + "\n").encode(),
        }
        end = tokenizer.token_to_id(END_OF_TEXT)
        assert end is not None  # train_tokenizer puts it in
        return TextTokenizer(tokenizer, end, files)

    @staticmethod
    def read(directory: Path) -> TextTokenizer:
        """The tokenizer of a Hugging Face directory. Raises TokenizerError if it is missing or names no end of text."""
        try:
            files = {name: (directory / name).read_bytes() for name in _FILES if (directory / name).is_file()}
            tokenizer = Tokenizer.from_str(files["tokenizer.json"].decode())
        except KeyError:
            raise TokenizerError(
                f"{directory} has no tokenizer.json; name a directory with a tokenizer"
            ) from None
        except Exception as error:  # the tokenizers library raises bare Exception
            raise TokenizerError(f"cannot read the tokenizer in {directory}: {error}") from error
        end = _end_of_text(directory, json.loads(files.get("tokenizer_config.json", b"{}")))
        token = tokenizer.token_to_id(end)
        if token is None:
            raise TokenizerError(f"{directory}: the end-of-text token {end!r} is not in tokenizer.json")
        return TextTokenizer(tokenizer, token, files)

    @property
    def vocab_size(self) -> int:
        return int(self.tokenizer.get_vocab_size(with_added_tokens=True))

    def encode(self, texts: list[str]) -> list[NDArray[np.int64]]:
        """Token ids of each text, without any special token."""
        encodings = self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [np.asarray(encoding.ids, dtype=np.int64) for encoding in encodings]

    def decode(self, tokens: list[int]) -> str:
        text: str = self.tokenizer.decode(tokens, skip_special_tokens=True)
        return text

    def save(self, directory: Path) -> None:
        """Writes the tokenizer's files into a directory."""
        for name, content in self.files.items():
            write_file(directory / name, content)


def _end_of_text(directory: Path, config: Mapping[str, Any]) -> str:
    token = config.get("eos_token")
    if isinstance(token, Mapping):  # older files wrap it: {"content": "</s>", ...}
        token = token.get("content")
    if not isinstance(token, str):
        raise TokenizerError(
            f"{directory}/tokenizer_config.json names no eos_token; documents need one at their boundaries"
        )
    return token
