"""Answers with pictures: the stored picture for a text, a caption for a picture, and questions about a picture."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import openai
from PIL import Image

from mainspring.errors import RetrievalError
from mainspring.rag.chunking.chunk import Chunk
from mainspring.rag.documents.document import Place
from mainspring.rag.multimodal.captions import CaptionedPicture
from mainspring.rag.multimodal.gallery import Gallery, Match
from mainspring.rag.pipeline import Event, Passage, Pipeline
from mainspring.rag.stores.store import Condition

_ABOUT = 3  # similar pictures that ground a question
_MOST_TOKENS = 128


class VisionModel(Protocol):
    """Writes text about a picture."""

    def look(self, picture: Image.Image, prompt: str) -> str:
        """The answer. Raises RetrievalError if the model fails."""
        ...


@dataclass(frozen=True)
class Description:
    """A caption: that of the stored picture in `source`, or a generated one, or none at all (`caption` is None)."""

    caption: str | None
    source: CaptionedPicture | None


def illustrate(gallery: Gallery, text: str) -> Match | None:
    """The stored picture that shows what a text says; None where none is similar enough."""
    first = gallery.search_text(text, 1)[0]
    return first if first.enough else None


def describe(gallery: Gallery, picture: Image.Image, model: VisionModel | None = None) -> Description:
    """The caption of a stored picture that is similar enough; else the model's, where there is one; else none."""
    first = gallery.search_picture(picture, 1)[0]
    if first.enough:
        return Description(first.picture.caption, first.picture)
    if model is None:
        return Description(None, None)
    return Description(model.look(picture, "Describe this picture in one sentence.").strip() or None, None)


def ask_about(
    pipeline: Pipeline,
    gallery: Gallery,
    picture: Image.Image,
    question: str,
    model: VisionModel | None = None,
) -> Iterator[Event]:
    """Streams the answer to a question about a picture, as `Pipeline.ask` does.

    Similar pictures' captions are passages that can be cited, and so is what the page that shows the most similar one
    says to the question; the captions are also searched for, beside the question. A vision model's own description
    joins them as words to search for. Raises what `Pipeline.ask` raises.
    """
    matches = [m for m in gallery.search_picture(picture, _ABOUT) if m.enough]
    seen = [match.picture.caption for match in matches]
    if model is not None:
        seen.append(
            model.look(picture, f"Describe what in this picture matters for the question: {question}")
        )
    given = _passages(matches, question, pipeline)
    if matches and question.strip():
        nearest = matches[0].picture
        given += pipeline.search(f"{question}\n{nearest.caption}", 1, (Condition("file", nearest.page),))
    yield from pipeline.ask(question, seen=seen, given=given)


def _passages(matches: Sequence[Match], question: str, pipeline: Pipeline) -> list[Passage]:
    """Captions as passages of the pages that show the pictures, scored as the abstention scores others."""
    chunks = [_chunk(match.picture) for match in matches]
    attributor = pipeline.parts.attributor
    scores = attributor.scores(question, [c.text for c in chunks]).tolist() if attributor and chunks else []
    return [
        Passage(chunk, match.margin, float(scores[n]) if scores else None)
        for n, (chunk, match) in enumerate(zip(chunks, matches, strict=True))
    ]


def _chunk(picture: CaptionedPicture) -> Chunk:
    text = f"Picture {picture.file}: {picture.caption}"
    places = ((0, Place("line", picture.line)),)
    return Chunk(f"picture:{picture.file}", picture.page, "", "", 0, len(text), text, "", text, 0, places, 0)


def vision_model(address: str | None) -> VisionModel | None:
    """The model at `http://host/v1` or `URL#model`; None for none."""
    if address is None:
        return None
    url, _, model = address.partition("#")
    return EndpointVision(url, model)


class EndpointVision:
    """A vision-language model behind an OpenAI-compatible API. Implements `VisionModel`."""

    def __init__(self, url: str, model: str = "", api_key: str = "none") -> None:
        """`url` ends in /v1; without `model` the endpoint's first one."""
        self._client = openai.OpenAI(base_url=url, api_key=api_key)
        self._model = model

    def look(self, picture: Image.Image, prompt: str) -> str:
        buffer = io.BytesIO()
        picture.save(buffer, "PNG")
        address = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
        try:
            if not self._model:
                self._model = next(iter(self._client.models.list())).id
            reply = self._client.chat.completions.create(
                model=self._model,
                max_tokens=_MOST_TOKENS,
                temperature=0,
                messages=[
                    {
                        "role": "user",
                        "content": [
                            {"type": "text", "text": prompt},
                            {"type": "image_url", "image_url": {"url": address}},
                        ],
                    }
                ],
            )
        except (openai.OpenAIError, StopIteration) as error:
            raise RetrievalError(f"the vision model failed: {error}") from error
        return reply.choices[0].message.content or ""
