"""What goes over the wire: passages, citations and answers as plain JSON values, the same for HTTP and MCP."""

from __future__ import annotations

from typing import Any

from mainspring.rag.generation.citations import Citation
from mainspring.rag.pipeline import Answer, Passage


def passage_value(number: int, passage: Passage) -> dict[str, Any]:
    """A passage as JSON; `number` is what citations call it."""
    chunk = passage.chunk
    return {
        "number": number,
        "file": chunk.file,
        "place": str(chunk.place),
        "title": chunk.title,
        "text": chunk.context,
        "score": passage.score,
    }


def citation_value(citation: Citation) -> dict[str, Any]:
    """A citation as JSON: `start` and `end` are characters of the answer, `quote_start` one of the document's text."""
    return {
        "number": citation.number,
        "start": citation.start,
        "end": citation.end,
        "file": citation.file,
        "place": str(citation.place),
        "quote": citation.quote,
        "quote_start": citation.quote_start,
        "score": citation.score,
    }


def answer_value(answer: Answer) -> dict[str, Any]:
    """An answer as JSON."""
    return {
        "text": answer.text,
        "abstained": answer.abstained,
        "citations": [citation_value(citation) for citation in answer.citations],
        "passages": [passage_value(n, passage) for n, passage in enumerate(answer.passages, 1)],
    }
