"""Rules about a request's next token that need the tokens before it: a grammar, bad words, or both."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mainspring.engine.grammar import Grammar
from mainspring.engine.sampling_params import SamplingParams
from mainspring.engine.structured_output import GrammarCompiler
from mainspring.errors import InvalidRequestError
from mainspring.formats.tokenizer import Tokenizer

if TYPE_CHECKING:
    from torch import Tensor


def bad_word_tokens(words: Sequence[str], tokenizer: Tokenizer) -> list[tuple[int, ...]]:
    """How the tokenizer spells each word, within a word and (as after a space) at the start of one."""
    spelled: dict[tuple[int, ...], None] = {}
    for word in words:
        for text in (word, " " + word.lstrip()):
            tokens = tuple(tokenizer.encode(text, add_special_tokens=False))
            if tokens:
                spelled[tokens] = None
    return list(spelled)


class BadWords:
    """Implements `Grammar`: forbids the last token of a sequence whose others have just been generated.

    With a grammar both must allow a token.
    """

    def __init__(self, sequences: Sequence[Sequence[int]], grammar: Grammar | None = None) -> None:
        self._grammar = grammar
        self._always = sorted({sequence[0] for sequence in sequences if len(sequence) == 1})
        self._after = [tuple(sequence) for sequence in sequences if len(sequence) > 1]
        self._longest = max((len(sequence) - 1 for sequence in self._after), default=0)
        self._recent: tuple[int, ...] = ()

    @property
    def terminated(self) -> bool:
        """See `Grammar`."""
        return self._grammar is not None and self._grammar.terminated

    def accept(self, token_id: int) -> bool:
        """See `Grammar`."""
        if token_id in self._forbidden():
            return False
        if self._longest:
            self._recent = (*self._recent, token_id)[-self._longest :]
        return self._grammar is None or self._grammar.accept(token_id)

    def fill_bitmask(self, bitmask: Tensor, row: int) -> None:
        """See `Grammar`."""
        words = bitmask[row]
        if self._grammar is not None:
            self._grammar.fill_bitmask(bitmask, row)
        else:
            words.fill_(-1)
        values = words.numpy()
        for token in self._forbidden():
            if token // 32 < len(values):
                values[token // 32] &= ~_bit(token)

    def _forbidden(self) -> list[int]:
        ends = [s[-1] for s in self._after if self._recent[-(len(s) - 1) :] == s[:-1]]
        return [*self._always, *ends]


def _bit(token: int) -> int:
    """The token's bit of an int32, as a signed number."""
    place = token % 32
    return 1 << place if place < 31 else -(1 << 31)


class TokenRules:
    """Makes the rules of requests; a model without a tokenizer can have none."""

    def __init__(self, tokenizer: Tokenizer | None, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._eos_token_ids = eos_token_ids
        self._compiler: GrammarCompiler | None = None

    def of(self, params: SamplingParams) -> Grammar | None:
        """The rules of a new request, at their beginning; None if it has none.

        Raises:
            InvalidRequestError: there is no tokenizer, or the structure cannot be followed.
        """
        grammar: Grammar | None = None
        if params.structured_outputs is not None:
            tokenizer = self._require_tokenizer("structured_outputs")
            if self._compiler is None:
                self._compiler = GrammarCompiler(tokenizer, self._vocab_size, self._eos_token_ids)
            grammar = self._compiler.grammar(params.structured_outputs)
        if params.bad_words:
            sequences = bad_word_tokens(params.bad_words, self._require_tokenizer("bad_words"))
            grammar = BadWords(sequences, grammar)
        return grammar

    def _require_tokenizer(self, name: str) -> Tokenizer:
        if self._tokenizer is None:
            raise InvalidRequestError(f"{name} needs a tokenizer, and this engine has none", name)
        return self._tokenizer
