"""What turns pictures and texts into comparable vectors: the protocol, the small encoder, loading by name."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image

from mainspring.errors import CheckpointError, ModelNotFoundError
from mainspring.rag.embedding.embedder import Embedder, Vectors
from mainspring.rag.embedding.models import load_embedder
from mainspring.rag.multimodal.dual_encoder import (
    KIND,
    DualEncoder,
    Thresholds,
    image_vectors,
    load_dual_encoder,
    text_vectors,
)
from mainspring.rag.multimodal.pictures import fit_square

PACKAGED = "small"
CLIP_THRESHOLDS = Thresholds(caption=0.25, picture=0.9)  # usual for CLIP; calibrate on pairs of your own


class PictureEncoder(Protocol):
    """Pictures and texts in, unit vectors of one space out.

    `name` identifies model and weights; `thresholds` are the cosines from which two belong together.
    """

    @property
    def name(self) -> str: ...

    @property
    def dimension(self) -> int: ...

    @property
    def thresholds(self) -> Thresholds: ...

    def embed_pictures(self, pictures: Sequence[Image.Image]) -> Vectors:
        """[N, dimension] float32."""
        ...

    def embed_texts(self, texts: Sequence[str]) -> Vectors:
        """[N, dimension] float32; of a text beyond the window the beginning counts."""
        ...


class SmallPictureEncoder:
    """The dual encoder of `dual_encoder.py` with its text model. Implements `PictureEncoder`.

    Small: trained on some 6,500 drawings and screenshots, it tells kinds of things apart and reads nothing.
    """

    def __init__(self, name: str, model: DualEncoder, thresholds: Thresholds, embedder: Embedder) -> None:
        """Raises CheckpointError if the text model is not of the size that the encoder was trained with."""
        if embedder.dimension != model.config.text_dimension:
            raise CheckpointError(
                f"{name} was trained with text vectors of {model.config.text_dimension} numbers, {embedder.name} gives "
                f"{embedder.dimension}: it needs {model.config.text_model!r}"
            )
        self.name = name
        self.thresholds = thresholds
        self._model = model
        self._embedder = embedder

    @property
    def dimension(self) -> int:
        return self._model.config.dimension

    def embed_pictures(self, pictures: Sequence[Image.Image]) -> Vectors:
        size = self._model.config.image_size
        fitted = [fit_square(picture, size) for picture in pictures]
        return image_vectors(
            self._model, np.stack(fitted) if fitted else np.empty((0, size, size, 3), np.uint8)
        )

    def embed_texts(self, texts: Sequence[str]) -> Vectors:
        return text_vectors(self._model, self._embedder.embed_queries(texts))


def packaged_directory() -> Path:
    """Where the small encoder's weights lie in this package."""
    return Path(__file__).parent / "weights"


def load_picture_encoder(name: str = PACKAGED) -> PictureEncoder:
    """ "small", a directory that `save_dual_encoder` wrote, or a Hugging Face directory of a CLIP model.

    Raises ModelNotFoundError if there is no such directory, CheckpointError, UnsupportedModelError.
    """
    directory = packaged_directory() if name == PACKAGED else Path(name).expanduser()
    try:
        kind = json.loads((directory / "config.json").read_bytes()).get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise ModelNotFoundError(
            f"there is no picture encoder {name!r} ({error}): give a directory with a CLIP model in Hugging Face's "
            "format, or one that benchmarks/rag_pictures.py has trained"
        ) from error
    if kind == KIND:
        model, thresholds = load_dual_encoder(directory)
        label = PACKAGED if name == PACKAGED else directory.resolve().name
        return SmallPictureEncoder(label, model, thresholds, load_embedder(model.config.text_model))
    from mainspring.rag.multimodal.clip import ClipEncoder

    return ClipEncoder(directory.resolve().name, directory, CLIP_THRESHOLDS)
