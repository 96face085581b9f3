"""Grammars of structured output, by llguidance: what the next token may be so that the text follows a schema.

llguidance compiles a grammar in a millisecond, has no dependencies, and walks the vocabulary's trie for each mask; this
file gives it our tokenizers (a Hugging Face one or that of a GGUF file: it asks for each token's bytes only) and keeps
what has been compiled.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from mainspring.engine.sampling_params import StructuredOutputsParams
from mainspring.errors import InvalidRequestError
from mainspring.formats.tokenizer import Tokenizer

if TYPE_CHECKING:
    from torch import Tensor

MAX_CACHED = 256  # compiled grammars that are kept

# Between the parts of a JSON text a model may lay out as it likes, but not for ever.
_WHITESPACE = r"[\x20\x0A\x0D\x09]{1,32}"


class TextGrammar:
    """Implements `grammar.Grammar` for one request."""

    def __init__(self, matcher: Any) -> None:
        self._matcher = matcher

    @property
    def terminated(self) -> bool:
        """The text is complete and nothing can follow it, or the end of the text was accepted."""
        stopped: bool = self._matcher.is_stopped()
        return stopped

    def accept(self, token_id: int) -> bool:
        """Go on by a sampled token; False if the grammar does not allow it."""
        taken: int = self._matcher.try_consume_tokens([token_id])
        return taken == 1

    def fill_bitmask(self, bitmask: Tensor, row: int) -> None:
        """Set row `row` of bitmask [R, ceil(V / 32)] int32, on the CPU, to what may come."""
        words = bitmask[row]
        self._matcher.unsafe_compute_mask_ptr(words.data_ptr(), words.numel() * words.itemsize)


class GrammarCompiler:
    """Makes grammars for one tokenizer. Not thread-safe."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        """vocab_size: of the model, which may have more tokens than the tokenizer knows."""
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._eos_token_ids = [token for token in eos_token_ids if token < vocab_size]
        self._vocabulary: Any = None
        self._compiled: OrderedDict[bytes, Any] = OrderedDict()

    def grammar(self, params: StructuredOutputsParams) -> TextGrammar:
        """A grammar at its beginning.

        Raises:
            InvalidRequestError: llguidance cannot follow it, or the model has no end-of-text token.
        """
        key = msgspec.json.encode(params)
        template = self._compiled.get(key)
        if template is None:
            template = self._compiled[key] = self._compile(params)
            if len(self._compiled) > MAX_CACHED:
                self._compiled.popitem(last=False)
        self._compiled.move_to_end(key)
        return TextGrammar(template.deep_copy())

    def _compile(self, params: StructuredOutputsParams) -> Any:
        import llguidance  # not needed by an engine that is asked for no structured output

        if self._vocabulary is None:
            self._vocabulary = self._build_vocabulary(llguidance)
        try:
            source = _source(llguidance, params)
            matcher = llguidance.LLMatcher(self._vocabulary, source, log_level=0)
        except (ValueError, TypeError) as error:
            raise _refused(error) from error
        if matcher.is_error():
            raise _refused(matcher.get_error())
        return matcher

    def _build_vocabulary(self, llguidance: Any) -> Any:
        if not self._eos_token_ids:
            raise InvalidRequestError(
                "structured outputs need a model with an end-of-text token, and this one names none",
                "structured_outputs",
            )
        wrapper = llguidance.TokenizerWrapper(
            _Vocabulary(self._tokenizer, self._vocab_size, self._eos_token_ids[0])
        )
        return llguidance.LLTokenizer(wrapper, eos_token=self._eos_token_ids)


class _Vocabulary:
    """Our tokenizer as llguidance.TokenizerWrapper wants one."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_id: int) -> None:
        self._tokenizer = tokenizer
        self.eos_token_id = eos_token_id
        self.bos_token_id = tokenizer.bos_token_id
        self.tokens = [tokenizer.token_bytes(token) for token in range(vocab_size)]
        # What the text does not show must not be taken for it; ids without bytes never come.
        self.special_token_ids = sorted(token for token in tokenizer.special_token_ids if token < vocab_size)

    def __call__(self, text: str | bytes) -> list[int]:
        if isinstance(text, bytes):
            text = text.decode(errors="replace")
        return self._tokenizer.encode(text, add_special_tokens=False)


def _source(llguidance: Any, params: StructuredOutputsParams) -> str:
    """The grammar in llguidance's own form."""
    matcher = llguidance.LLMatcher
    if params.json is not None or params.json_object:
        schema = {"type": "object"} if params.json is None else params.json
        schema = json.loads(schema) if isinstance(schema, str) else schema
        schema = {} if schema is True else schema
        options = {"whitespace_pattern": _WHITESPACE}
        source: str = matcher.grammar_from_json_schema(schema, defaults=options)
    elif params.regex is not None:
        source = matcher.grammar_from_regex(params.regex)
    elif params.choice is not None:
        # Lark's string literals are JSON's.
        alternatives = (json.dumps(choice, ensure_ascii=False) for choice in params.choice)
        source = matcher.grammar_from_lark("start: " + " | ".join(alternatives))
    else:
        source = llguidance.grammar_from("grammar", params.grammar)
    return source


def _refused(problem: object) -> InvalidRequestError:
    return InvalidRequestError(
        f"structured_outputs cannot be followed: {' '.join(str(problem).split())[:600]}", "structured_outputs"
    )
