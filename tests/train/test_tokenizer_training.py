"""Trained tokenizers are lossless and load elsewhere."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from mainspring.errors import RecipeError, TokenizerError
from mainspring.formats.tokenizer import Tokenizer
from mainspring.train.text_tokenizer import TextTokenizer
from mainspring.train.tokenizer_training import END_OF_TEXT, train_tokenizer

_TEXT = (
    "To be, or not to be,--that is the question:--\n\n  Whether 'tis nobler in the mind 1234 to suffer\r\n"
    * 9
)


@pytest.mark.parametrize("text", [_TEXT, "naïve 🎻\t\x00 漢字\r\r\n", "", "   ", "\n\n"])
def test_every_text_decodes_to_itself(text: str) -> None:
    tokenizer = TextTokenizer.train([_TEXT], 300)
    (ids,) = tokenizer.encode([text])
    assert tokenizer.decode(ids.tolist()) == text
    assert tokenizer.end_of_text not in ids


def test_merges_are_learnt_up_to_the_vocabulary() -> None:
    tokenizer = TextTokenizer.train([_TEXT], 300)
    assert tokenizer.vocab_size == 300
    assert len(tokenizer.encode([_TEXT])[0]) < len(_TEXT.encode()) / 2
    with pytest.raises(RecipeError, match="256 is too small"):
        train_tokenizer([_TEXT], 256)


def test_the_files_load_in_transformers_and_in_formats(tmp_path: Path) -> None:
    tokenizer = TextTokenizer.train([_TEXT], 300)
    tokenizer.save(tmp_path)
    expected = tokenizer.encode([_TEXT])[0].tolist()
    theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert theirs(_TEXT, add_special_tokens=False)["input_ids"] == expected
    assert theirs.eos_token == END_OF_TEXT
    ours = Tokenizer.from_directory(tmp_path)
    assert ours.encode(_TEXT, add_special_tokens=False) == expected
    assert ours.eos_token_ids == (tokenizer.end_of_text,)
    again = TextTokenizer.read(tmp_path)
    assert again.end_of_text == tokenizer.end_of_text
    assert again.files == tokenizer.files


def test_directories_without_a_usable_tokenizer_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"no tokenizer\.json"):
        TextTokenizer.read(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(TokenizerError, match="cannot read the tokenizer"):
        TextTokenizer.read(tmp_path)
    TextTokenizer.train([_TEXT], 300).save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(TokenizerError, match="no eos_token"):
        TextTokenizer.read(tmp_path)
