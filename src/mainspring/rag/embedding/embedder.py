"""What turns texts into vectors: the protocol, and how texts are batched for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt
import tokenizers

from mainspring.errors import PassageTooLongError

Vectors = npt.NDArray[np.float32]
Progress = Callable[[int], None]  # hears how many more texts are done


class Embedder(Protocol):
    """Texts in, unit vectors out: the inner product of two is their cosine.

    `name` identifies model and weights; vectors of different names are not comparable. `window` is the most tokens
    of a text, special ones included.
    """

    @property
    def name(self) -> str: ...

    @property
    def dimension(self) -> int: ...

    @property
    def window(self) -> int: ...

    def count(self, text: str) -> int: ...

    def spans(self, text: str) -> Sequence[tuple[int, int]]: ...

    def embed_passages(self, texts: Sequence[str], progress: Progress | None = None) -> Vectors:
        """[N, dimension] float32. Raises PassageTooLongError for a text beyond the window."""
        ...

    def embed_queries(self, texts: Sequence[str]) -> Vectors:
        """[N, dimension] float32; a query beyond the window keeps its first tokens."""
        ...


class BertTokens:
    """A WordPiece tokenizer as the models here use it: no padding, no truncation, characters of each token known."""

    def __init__(self, path: str) -> None:
        self._tokenizer = tokenizers.Tokenizer.from_file(path)
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()

    def count(self, text: str) -> int:
        """Tokens of a text, [CLS] and [SEP] included."""
        return len(self._tokenizer.encode(text).ids)

    def spans(self, text: str) -> list[tuple[int, int]]:
        """(start, end) in characters of each token, without special ones."""
        offsets: list[tuple[int, int]] = self._tokenizer.encode(text, add_special_tokens=False).offsets
        return offsets

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, [CLS] and [SEP] included."""
        return [encoding.ids for encoding in self._tokenizer.encode_batch_fast(list(texts))]

    def encode_pairs(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[list[int], list[int]]]:
        """(ids, token types) of [CLS] first [SEP] second [SEP]."""
        return [(e.ids, e.type_ids) for e in self._tokenizer.encode_batch_fast(list(pairs))]

    def encode_with_spans(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """(ids, characters of each) with special tokens, whose characters are (0, 0)."""
        encoding = self._tokenizer.encode(text)
        return encoding.ids, encoding.offsets

    def id_of(self, token: str) -> int:
        """The id of a token of the vocabulary."""
        found: int | None = self._tokenizer.token_to_id(token)
        assert found is not None, token  # asked only for BERT's own special tokens
        return found


def refuse_long(lengths: Sequence[int], texts: Sequence[str], window: int, model: str) -> None:
    """Raises PassageTooLongError if a text has more tokens than the model's window."""
    for length, text in zip(lengths, texts, strict=True):
        if length > window:
            raise PassageTooLongError(
                f"a passage has {length} tokens, {model} takes {window}; nothing is cut silently: split it into "
                f"smaller chunks (it begins {text[:60]!r})"
            )


def cut(ids: list[int], window: int) -> list[int]:
    """The first tokens of a query and its last one ([SEP]), at most `window` together."""
    return ids if len(ids) <= window else [*ids[: window - 1], ids[-1]]


def batches_by_length(lengths: Sequence[int], max_tokens: int) -> Iterator[list[int]]:
    """Indices of sequences, neighbours in length together, the shortest first; at most `max_tokens` tokens a batch.

    A sequence longer than that is a batch of its own.
    """
    batch: list[int] = []
    total = 0
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batch and total + lengths[index] > max_tokens:
            yield batch
            batch, total = [], 0
        batch.append(index)
        total += lengths[index]
    if batch:
        yield batch
