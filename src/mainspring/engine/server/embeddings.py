"""POST /v1/embeddings: the final hidden states of a text, pooled to one vector."""

from __future__ import annotations

import base64
import math
import struct
from typing import Annotated, Literal

import msgspec
from fastapi import APIRouter, Request, Response
from pydantic import BeforeValidator, Field

from mainspring.engine.messages import Pooling
from mainspring.engine.server.async_llm import Placement
from mainspring.engine.server.completion_types import prompts, split_prompts
from mainspring.engine.server.disconnect import until_disconnect
from mainspring.engine.server.openai_types import Body, Tokens, documented
from mainspring.engine.server.service import ServedModel, Service, json_response, service_of
from mainspring.errors import InvalidRequestError

router = APIRouter()


class EmbeddingRequest(Body):
    """The body of POST /v1/embeddings.

    Attributes:
        dimensions: keep that many of the first components; for models trained so (Matryoshka embeddings).
        pooling: the mean of all tokens' states, or the last token's; None: the server's own.
        normalize: scale each vector to length 1 (the default, as at OpenAI).
    """

    model: str | None = None
    input: Annotated[
        str | Tokens | list[str] | list[Tokens], BeforeValidator(prompts), documented(minLength=1, minItems=1)
    ]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Field(ge=1)] | None = None
    user: str | None = None
    # Ours.
    pooling: Literal["mean", "last"] | None = None
    normalize: bool | None = None
    priority: int | None = None
    cache_salt: str | None = None


class Embedding(msgspec.Struct):
    """One vector: numbers, or the base64 of its float32 values, little-endian."""

    index: int
    embedding: list[float] | str
    object: str = "embedding"


class EmbeddingUsage(msgspec.Struct):
    """Tokens read."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingList(msgspec.Struct):
    """The answer to POST /v1/embeddings."""

    data: list[Embedding]
    model: str
    usage: EmbeddingUsage
    object: str = "list"


@router.post("/v1/embeddings")
async def create_embeddings(request: Request, body: EmbeddingRequest) -> Response:
    """A vector for each text."""
    service = service_of(request)
    model = service.check_model(body.model)
    given = split_prompts(body.input)
    service.check_choices(len(given), None)
    token_ids = [await _token_ids(service, text) for text in given]
    return json_response(await until_disconnect(request.receive, _answer(service, model, body, token_ids)))


async def _token_ids(service: Service, text: str | list[int]) -> list[int]:
    if not text:
        raise InvalidRequestError("the input holds an empty text; give at least one token", "input")
    return text if isinstance(text, list) else await service.llm.encode(text)


async def _answer(
    service: Service, model: ServedModel, body: EmbeddingRequest, token_ids: list[list[int]]
) -> EmbeddingList:
    pooling: Pooling = body.pooling or service.pooling
    try:
        outputs = await service.llm.embed(
            token_ids, pooling, Placement(body.priority or 0, body.cache_salt, model.lora_id)
        )
    except InvalidRequestError as error:
        if error.param != "prompt":
            raise
        raise type(error)(str(error), "input") from error
    data = []
    for index, output in enumerate(outputs):
        vector = _vector(output.embedding or [], body)
        data.append(Embedding(index, vector))
    count = sum(map(len, token_ids))
    return EmbeddingList(data, model.name, EmbeddingUsage(count, count))


def _vector(values: list[float], body: EmbeddingRequest) -> list[float] | str:
    if body.dimensions is not None:
        if body.dimensions > len(values):
            raise InvalidRequestError(
                f"dimensions is {body.dimensions}, but this model's vectors have {len(values)}", "dimensions"
            )
        values = values[: body.dimensions]
    if body.normalize is not False:
        length = math.sqrt(math.fsum(value * value for value in values))
        values = [value / length for value in values] if length > 0 else values
    if body.encoding_format == "base64":
        return base64.b64encode(struct.pack(f"<{len(values)}f", *values)).decode()
    return values
