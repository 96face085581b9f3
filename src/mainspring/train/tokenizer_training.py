"""Trains a byte-level BPE tokenizer."""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from mainspring.errors import RecipeError

END_OF_TEXT = "<|endoftext|>"
"""Stands before every document, and after every one that is complete."""

# How text is cut before merges: words with their leading space or sign, numbers by at most 3 digits,
# punctuation together with the line breaks after it, runs of line breaks. The pattern of cl100k (tiktoken),
# which makes 7 to 10 % fewer tokens of verse than GPT-2's.
_SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE whose vocabulary has at most `vocab_size` entries: END_OF_TEXT (id 0), the 256 bytes, merges.

    Every text can be encoded, and decodes to itself. Raises RecipeError if vocab_size has no room for the bytes.
    """
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size < len(alphabet) + 1:
        raise RecipeError(
            f"tokenizer.vocab_size = {vocab_size} is too small; 256 bytes and {END_OF_TEXT} need 257"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(alphabet),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer
