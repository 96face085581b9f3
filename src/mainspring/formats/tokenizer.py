"""Text to token ids and back, on Hugging Face's `tokenizers`; and the decoder for text that comes token by token."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import tokenizers

from mainspring.errors import ChatTemplateError, TokenizerError
from mainspring.formats._token_bytes import TokenBytes
from mainspring.formats.chat_template import DEFAULT_SECONDS, ChatTemplate
from mainspring.formats.files import write_file, write_json

TOKENIZER_NAME = "tokenizer.json"
CONFIG_NAME = "tokenizer_config.json"
TEMPLATE_NAME = "chat_template.jinja"
_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class Tokenizer:
    """A tokenizer with its special tokens and chat templates. It is not changed after construction.

    `vocab_size` counts the ids that it knows, added tokens included; a model may have more (padded) ones.
    `eos_token_ids` are all ids that end a generation, the tokenizer's own first.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        config: Mapping[str, Any] | None = None,
        eos_token_ids: Sequence[int] = (),
        *,
        template_seconds: float = DEFAULT_SECONDS,
    ) -> None:
        """`config` holds the contents of a `tokenizer_config.json`; `eos_token_ids` come on top of its eos_token.

        `template_seconds` bounds one rendering of a chat template.

        Raises TokenizerError if the decoder of `backend` is of an unknown kind.
        """
        self.config: Mapping[str, Any] = dict(config or {})
        self._backend = backend
        self._token_bytes = TokenBytes(backend)
        self.vocab_size: int = backend.get_vocab_size(with_added_tokens=True)
        self.named_tokens = _named_tokens(self.config)
        self.bos_token_id = self._named_id("bos_token")
        self.pad_token_id = self._named_id("pad_token")
        eos = self._named_id("eos_token")
        ids = [*([] if eos is None else [eos]), *eos_token_ids]
        self.eos_token_ids: tuple[int, ...] = tuple(dict.fromkeys(ids))
        added = backend.get_added_tokens_decoder()
        self.special_token_ids = frozenset(i for i, token in added.items() if token.special)
        self._templates = _templates(self.config)
        self._template_seconds = template_seconds
        self._compiled: dict[str, ChatTemplate] = {}

    @classmethod
    def from_directory(
        cls,
        path: str | Path,
        *,
        chat_template: str | None = None,
        template_seconds: float = DEFAULT_SECONDS,
    ) -> Self:
        """Reads `tokenizer.json` and, where they exist, the files beside it that name special tokens and templates.

        `chat_template`: Jinja source that takes the place of the model's own; `template_seconds`: see `__init__`.

        Raises TokenizerError if `tokenizer.json` is missing or any of the files is not what it should be.
        """
        directory = Path(path)
        file = directory / TOKENIZER_NAME
        if not file.is_file():
            raise TokenizerError(
                f"{directory} has no {TOKENIZER_NAME}: save the model's fast tokenizer there (other files are not read)"
            )
        try:
            backend = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # tokenizers raises bare exceptions
            raise TokenizerError(f"the tokenizer {file} cannot be read: {error}") from error
        config = _read_object(directory / CONFIG_NAME)
        template = directory / TEMPLATE_NAME
        if template.is_file():
            config["chat_template"] = template.read_text(encoding="utf-8")
        if chat_template is not None:
            config["chat_template"] = chat_template
        ends = _read_object(directory / "generation_config.json").get("eos_token_id")
        if ends is None:
            ends = _read_object(directory / "config.json").get("eos_token_id")
        return cls(backend, config, _ids(ends), template_seconds=template_seconds)

    def save(self, directory: str | Path) -> None:
        """Writes `tokenizer.json` and `tokenizer_config.json` (with the chat template), each whole or not at all."""
        target = Path(directory)
        target.mkdir(parents=True, exist_ok=True)
        write_file(target / TOKENIZER_NAME, self._backend.to_str(pretty=True).encode())
        write_json(target / CONFIG_NAME, dict(self.config))
        # The template stands in the configuration now; a file of an older save would go before it.
        (target / TEMPLATE_NAME).unlink(missing_ok=True)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """The ids of `text`; with `add_special_tokens`, what the model expects around it (such as a first bos).

        Raises TokenizerError for text that is not valid Unicode (lone surrogates).
        """
        try:
            ids: list[int] = self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        except (TypeError, UnicodeError) as error:
            shown = repr(text)[:80]
            raise TokenizerError(
                f"cannot encode {shown}: it must be a string without lone surrogates"
            ) from error
        return ids

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """The text of `ids`. Bytes that form no UTF-8 character become U+FFFD; ids outside the vocabulary, nothing.

        Raises TokenizerError for a negative id.
        """
        decoder = IncrementalDecoder(self, skip_special_tokens)
        return decoder.push_many(ids) + decoder.flush()

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token adds to a text; empty for an id outside the vocabulary."""
        return self._token_bytes[token_id]

    @property
    def strips_first_space(self) -> bool:
        """Whether a decoded text loses the space that encoding put before it (sentencepiece's way)."""
        return self._token_bytes.strips_first_space

    def id_to_token(self, token_id: int) -> str | None:
        """The token as the vocabulary spells it, or None."""
        if not 0 <= token_id < 1 << 32:
            return None
        token: str | None = self._backend.id_to_token(token_id)
        return token

    def token_to_id(self, token: str) -> int | None:
        """The id of a token of the vocabulary, special ones included, or None."""
        token_id: int | None = self._backend.token_to_id(token)
        return token_id

    @property
    def chat_template(self) -> str | None:
        """The Jinja source of the default chat template."""
        return self._templates.get("default")

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        template_variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt of a conversation: messages with `role` and `content` (a string or a list of text parts).

        Encode it with `add_special_tokens=False`: templates write those themselves. `template_variables` are
        handed to the template as they are (such as `enable_thinking`). Raises ChatTemplateError if the model
        has no template, or it fails or exceeds its limits.
        """
        name = "tool_use" if tools and "tool_use" in self._templates else "default"
        source = self._templates.get(name)
        if source is None:
            raise ChatTemplateError("this model has no chat template: give a text prompt instead of messages")
        template = self._compiled.get(name)
        if template is None:
            template = self._compiled[name] = ChatTemplate(source, max_seconds=self._template_seconds)
        variables = {**self.named_tokens, **(template_variables or {})}
        return template.render(
            messages, tools=tools, add_generation_prompt=add_generation_prompt, variables=variables
        )

    def _named_id(self, name: str) -> int | None:
        token = self.named_tokens.get(name)
        if token is None:
            return None
        token_id = self.token_to_id(token)
        if token_id is None:
            raise TokenizerError(f"the {name} {token!r} of {CONFIG_NAME} is not in the vocabulary")
        return token_id


class IncrementalDecoder:
    """Turns a stream of token ids into text, a piece per token, never splitting a UTF-8 character.

    The pieces and the flush, put together, are `Tokenizer.decode` of all ids. Each push takes constant time.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_token_ids if skip_special_tokens else frozenset()
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._strip = tokenizer.strips_first_space

    def push(self, token_id: int) -> str:
        """The text that is complete with this token; empty while a character is not."""
        if token_id in self._skipped:
            return ""
        return self._stripped(self._utf8.decode(self._tokenizer.token_bytes(token_id)))

    def push_many(self, ids: Iterable[int]) -> str:
        """The text that is complete with these tokens."""
        return "".join([self.push(token_id) for token_id in ids])

    def flush(self) -> str:
        """What is left at the end: U+FFFD for a character that was never completed. The decoder is then as new."""
        rest = self._stripped(self._utf8.decode(b"", final=True))
        self._strip = self._tokenizer.strips_first_space
        return rest

    def _stripped(self, text: str) -> str:
        if not self._strip or not text:
            return text
        self._strip = False
        return text.removeprefix(" ")


def _read_object(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise TokenizerError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise TokenizerError(f"{path} holds a {type(value).__name__}, not an object")
    return value


def _ids(value: object) -> list[int]:
    items = value if isinstance(value, list) else [value]
    return [item for item in items if isinstance(item, int) and not isinstance(item, bool)]


def _named_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """The special tokens by role; Hugging Face writes them as strings or as objects with `content`."""
    found: dict[str, str] = {}
    for name in _NAMED_TOKENS:
        value = config.get(name)
        value = value.get("content") if isinstance(value, dict) else value
        if isinstance(value, str):
            found[name] = value
    return found


def _templates(config: Mapping[str, Any]) -> dict[str, str]:
    """The chat templates by name: one string, or a list of named ones."""
    value = config.get("chat_template")
    if isinstance(value, str):
        return {"default": value}
    if isinstance(value, list):
        pairs = [(item.get("name"), item.get("template")) for item in value if isinstance(item, dict)]
        return {name: text for name, text in pairs if isinstance(name, str) and isinstance(text, str)}
    return {}
