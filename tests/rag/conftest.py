"""Models of the room's tests, loaded once a session."""

from __future__ import annotations

import pytest

from mainspring.rag.embedding.embedder import Embedder
from mainspring.rag.embedding.models import load_embedder


@pytest.fixture(scope="session")
def minilm() -> Embedder:
    """all-MiniLM-L6-v2 on our own encoder."""
    return load_embedder("all-minilm-l6-v2")
