"""The routes of administration: pausing, sleeping, and new weights. They have a key of their own (`keys`)."""

from __future__ import annotations

import asyncio

import msgspec
from fastapi import APIRouter, Request, Response

from mainspring.engine.server.disconnect import until_disconnect
from mainspring.engine.server.http_errors import error_response
from mainspring.engine.server.openai_types import Body
from mainspring.engine.server.protocol import ControlAction
from mainspring.engine.server.service import json_response, service_of

router = APIRouter()


class UpdateWeightsRequest(Body):
    """`path`: a directory of safetensors files on the server's machine, by Hugging Face names; any part of the model.

    `checksum`: what all weights must give afterwards, as whoever wrote the files has computed it.
    """

    path: str
    checksum: str | None = None


class EngineState(msgspec.Struct):
    """The engine's state after an action. `checksum`: of all weights, after an update."""

    paused: bool
    sleeping: bool
    checksum: str | None = None


@router.post("/pause")
async def pause(request: Request) -> Response:
    """No further step is made until /resume; requests keep their places, and more may come."""
    return await _act(request, "pause")


@router.post("/resume")
async def resume(request: Request) -> Response:
    """Goes on after /pause."""
    return await _act(request, "resume")


@router.post("/sleep")
async def sleep(request: Request) -> Response:
    """Gives the KV cache's memory back. What runs waits for /wake and is computed again."""
    return await _act(request, "sleep")


@router.post("/wake")
async def wake(request: Request) -> Response:
    """Takes the KV cache's memory again."""
    return await _act(request, "wake")


@router.post("/update_weights")
async def update_weights(request: Request, body: UpdateWeightsRequest) -> Response:
    """New weights from files. What runs is computed again, so that no text is of both."""
    # Not given up when its client leaves: it would happen all the same.
    answer = await asyncio.shield(service_of(request).llm.control("update_weights", body.path))
    if body.checksum is not None and body.checksum != answer.checksum:
        return error_response(
            409,
            f"The weights' checksum is {answer.checksum} now, not {body.checksum}: the files are other ones than "
            "were meant.",
            param="checksum",
            code="checksum_mismatch",
        )
    return json_response(EngineState(answer.paused, answer.sleeping, answer.checksum))


async def _act(request: Request, action: ControlAction) -> Response:
    answer = await until_disconnect(request.receive, service_of(request).llm.control(action))
    return json_response(EngineState(answer.paused, answer.sleeping))
