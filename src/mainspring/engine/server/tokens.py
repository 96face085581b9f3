"""POST /tokenize and /detokenize: what the model's tokenizer makes of a text, and back. Shapes as in vLLM."""

from __future__ import annotations

from typing import Annotated, Any, Self

import msgspec
from fastapi import APIRouter, Request, Response
from pydantic import Field, model_validator

from mainspring.engine.server.chat_types import ChatMessage, Tool
from mainspring.engine.server.conversation import Conversation, functions_of, make_prompt, turn_of
from mainspring.engine.server.openai_types import Body, Tokens
from mainspring.engine.server.service import json_response, service_of
from mainspring.errors import InvalidRequestError

router = APIRouter()


class TokenizeRequest(Body):
    """A text, or a conversation that goes through the chat template first.

    `add_special_tokens`: what the model expects around a text, such as a first bos (default: for a text, not for a
    conversation, whose template writes them itself).
    """

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1)] | None = None
    tools: list[Tool] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: bool | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either a prompt or messages")
        return self


class DetokenizeRequest(Body):
    """Token ids."""

    model: str | None = None
    tokens: Tokens


class Tokenized(msgspec.Struct):
    """The ids of a text, and how the vocabulary spells them if that was asked for."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class Detokenized(msgspec.Struct):
    """The text of the ids."""

    prompt: str


@router.post("/tokenize")
async def tokenize(request: Request, body: TokenizeRequest) -> Response:
    """The token ids of a text or of a conversation."""
    service = service_of(request)
    service.check_model(body.model)
    llm = service.llm
    if body.messages is not None:
        chat = Conversation(
            turns=[turn_of(message) for message in body.messages],
            tools=functions_of(body.tools),
            variables=body.chat_template_kwargs or {},
            add_generation_prompt=body.add_generation_prompt is not False,
        )
        token_ids = (await make_prompt(service, chat)).token_ids
        if body.add_special_tokens:
            token_ids = [*await llm.encode(""), *token_ids]
    else:
        text = body.prompt or ""
        token_ids = await llm.encode(text, add_special_tokens=body.add_special_tokens is not False)
    spelled = [llm.tokenizer.id_to_token(i) or "" for i in token_ids] if body.return_token_strs else None
    return json_response(Tokenized(len(token_ids), llm.limits.max_model_len, token_ids, spelled))


@router.post("/detokenize")
async def detokenize(request: Request, body: DetokenizeRequest) -> Response:
    """The text of token ids, special tokens included."""
    service = service_of(request)
    service.check_model(body.model)
    vocab_size = service.llm.limits.vocab_size
    for token_id in body.tokens:
        if not 0 <= token_id < vocab_size:
            raise InvalidRequestError(
                f"tokens holds the id {token_id}, but ids lie between 0 and {vocab_size - 1}", "tokens"
            )
    text = service.llm.tokenizer.decode(body.tokens, skip_special_tokens=False)
    return json_response(Detokenized(text))
