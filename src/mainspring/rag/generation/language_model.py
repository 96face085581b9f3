"""What writes: the protocol of a language model, one in this process, and any OpenAI-compatible endpoint."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import openai

from mainspring.errors import CheckpointError, ModelNotFoundError, RetrievalError
from mainspring.formats.named_models import resolve

if TYPE_CHECKING:
    from mainspring.engine.llm import LLM
    from mainspring.engine.sampling_params import SamplingParams


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str


# Small models fall into loops when they take the likeliest token every time. Only what an answer itself has written
# counts: a penalty on the tokens of its prompt (a repetition penalty) holds a model from quoting the passages.
FREQUENCY_PENALTY = 0.2


class LanguageModel(Protocol):
    """Completes a conversation, piece by piece, always in the likeliest way (temperature 0)."""

    @property
    def name(self) -> str: ...

    def stream(self, messages: Sequence[Message], max_tokens: int) -> Iterator[str]:
        """Pieces of the answer. Raises RetrievalError if the model fails or cannot be reached."""
        ...


@dataclass(frozen=True)
class TokenSurprise:
    """A token's characters [start, end) of a text and how little it was expected: -log p, in nats."""

    start: int
    end: int
    nats: float


class TokenScorer(Protocol):
    """Knows how expected each token of a text is."""

    def surprises(self, text: str, context: str = "") -> list[TokenSurprise]:
        """One for each token of `text` after `context`, in order."""
        ...


def complete(model: LanguageModel, messages: Sequence[Message], max_tokens: int) -> str:
    """The whole answer, without white space around it."""
    return "".join(model.stream(messages, max_tokens)).strip()


def complete_each(
    model: LanguageModel,
    conversations: Sequence[Sequence[Message]],
    max_tokens: int,
    *,
    may_repeat: bool = False,
) -> list[str]:
    """`complete` of every conversation, several at once where the model is one in this process.

    `may_repeat`: as `InProcessModel.complete_each` takes it; an endpoint penalises nothing.
    """
    if isinstance(model, InProcessModel):
        return model.complete_each(conversations, max_tokens, may_repeat=may_repeat)
    return [complete(model, messages, max_tokens) for messages in conversations]


class InProcessModel:
    """A model on our engine. Implements `LanguageModel` and `TokenScorer`; callers take turns."""

    def __init__(
        self,
        model: str | LLM,
        *,
        at_once: int = 1,
        device: str = "cpu",
        repetition_penalty: float | None = None,
        kv_cache_bytes: int | None = None,
    ) -> None:
        """`at_once`: answers that `complete_each` writes side by side; a loaded `LLM` has its own number and device.

        `repetition_penalty`: 1 for none; None for that of the model's generation_config.json, and if it names none, for
        FREQUENCY_PENALTY instead.
        Raises ModelNotFoundError, CheckpointError, RetrievalError if it has no chat template.
        """
        from mainspring.engine.llm import LLM  # searching needs no engine

        if repetition_penalty is None and isinstance(model, str):
            repetition_penalty = _repetition_penalty(resolve(model).path)
        self._penalty = repetition_penalty
        self._llm = (
            LLM(model, max_num_seqs=at_once, device=device, kv_cache_bytes=kv_cache_bytes)
            if isinstance(model, str)
            else model
        )
        self.at_once = at_once
        self._name = model if isinstance(model, str) else "in-process model"
        self._lock = threading.Lock()
        tokenizer = self._llm.tokenizer
        if tokenizer is None or tokenizer.chat_template is None:
            raise RetrievalError(
                f"{self._name} has no chat template; answers need an instruction-tuned model"
            )
        self._tokenizer = tokenizer

    @property
    def name(self) -> str:
        return self._name

    def stream(self, messages: Sequence[Message], max_tokens: int) -> Iterator[str]:
        params = self._params(max_tokens, self._penalty)
        with self._lock:
            for output in self._llm.stream_chat(_turns(messages), params):
                yield output.outputs[0].text

    def complete_each(
        self, conversations: Sequence[Sequence[Message]], max_tokens: int, *, may_repeat: bool = False
    ) -> list[str]:
        """The whole answer to every conversation, without white space around it: those that `complete` gives.

        With `may_repeat` what it read may be said again without a penalty, whatever the model's own is.
        """
        params = self._params(max_tokens, None if may_repeat else self._penalty)
        with self._lock:
            outputs = self._llm.chat([_turns(messages) for messages in conversations], params)
        return [output.outputs[0].text.strip() for output in outputs]

    def _params(self, max_tokens: int, repetition_penalty: float | None) -> SamplingParams:
        from mainspring.engine.sampling_params import SamplingParams

        if repetition_penalty is None:
            return SamplingParams(temperature=0, frequency_penalty=FREQUENCY_PENALTY, max_tokens=max_tokens)
        return SamplingParams(temperature=0, repetition_penalty=repetition_penalty, max_tokens=max_tokens)

    def surprises(self, text: str, context: str = "") -> list[TokenSurprise]:
        """One forward pass; the first token of an empty context follows the model's first special token."""
        start = self._tokenizer.bos_token_id
        before = self._tokenizer.encode(context, add_special_tokens=False) if context else []
        if not before:
            before = [start if start is not None else self._tokenizer.eos_token_ids[0]]
        ids = self._tokenizer.encode(text, add_special_tokens=False)
        if not ids:
            return []
        with self._lock:
            log_probs = self._llm.model.log_probs([[*before, *ids]])[0][len(before) - 1 :].tolist()
        result = []
        done = b""
        for token, log_prob in zip(ids, log_probs, strict=True):
            first = len(done.decode(errors="ignore"))
            done += self._tokenizer.token_bytes(token)
            result.append(TokenSurprise(first, len(done.decode(errors="ignore")), -log_prob))
        return result


def _turns(messages: Sequence[Message]) -> list[dict[str, str]]:
    return [{"role": m.role, "content": m.content} for m in messages]


def _repetition_penalty(directory: Path) -> float | None:
    """The model's own, if its generation_config.json names one."""
    path = directory / "generation_config.json"
    try:
        named = json.loads(path.read_bytes()).get("repetition_penalty")
        return None if named is None else float(named)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error


class EndpointModel:
    """A model behind an OpenAI-compatible API. Implements `LanguageModel`; many callers at once."""

    def __init__(self, base_url: str, model: str = "", api_key: str = "none", timeout: float = 120.0) -> None:
        """`model` is the first that the endpoint lists, if empty. Raises ModelNotFoundError if it lists none."""
        self._client = openai.OpenAI(base_url=base_url, api_key=api_key, timeout=timeout, max_retries=1)
        self._url = base_url
        try:
            self._name = model or next((item.id for item in self._client.models.list()), "")
        except openai.OpenAIError as error:
            raise RetrievalError(f"the model at {base_url} cannot be reached: {error}") from error
        if not self._name:
            raise ModelNotFoundError(f"{base_url} lists no model: name one")

    @property
    def name(self) -> str:
        return self._name

    def stream(self, messages: Sequence[Message], max_tokens: int) -> Iterator[str]:
        try:
            chunks: Any = self._client.chat.completions.create(
                model=self._name,
                messages=_turns(messages),  # type: ignore[arg-type]  # a TypedDict for each role there
                max_tokens=max_tokens,
                temperature=0,
                stream=True,
            )
            for chunk in chunks:
                if chunk.choices and chunk.choices[0].delta.content:
                    yield chunk.choices[0].delta.content
        except openai.OpenAIError as error:
            raise RetrievalError(f"the model at {self._url} failed: {error}") from error
