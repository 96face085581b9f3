"""The pictures of a folder, found by texts and by pictures: retrieval in the place of generation.

Asked for a picture, the stored one is returned that is similar enough; asked for a caption, the stored caption of a
picture that is similar enough (arXiv 2407.01219, section 6). What "enough" is comes with the encoder, calibrated on
held-out pairs. One file holds everything, written whole or not at all.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

from mainspring.errors import DocumentError, EmptyCorpusError, StoreError
from mainspring.formats.files import write_file
from mainspring.rag.documents.reading import FoundFile, read_bytes
from mainspring.rag.embedding.embedder import Vectors
from mainspring.rag.multimodal.captions import CaptionedPicture, find_captioned
from mainspring.rag.multimodal.picture_encoder import PictureEncoder
from mainspring.rag.multimodal.pictures import open_picture
from mainspring.rag.retrieval.hits import best

FORMAT = 1
_AT_ONCE = 32
SAME_CAPTION = (
    0.75  # cosine from which two captions say the same (chosen by hand on the small encoder's texts)
)


@dataclass(frozen=True)
class Match:
    """A stored picture. `margin`: how far its best cosine lies above that cosine's threshold; 0 is similar enough.

    `by`: whether the picture or its caption was the more similar.
    """

    picture: CaptionedPicture
    margin: float
    by: Literal["picture", "caption"]

    @property
    def enough(self) -> bool:
        """Whether it may stand for what was asked for."""
        return self.margin >= 0


@dataclass(frozen=True)
class GalleryReport:
    """What a run did. `failures` holds (file, reason) of pictures and documents that could not be read."""

    pictures: int
    embedded: int
    failures: tuple[tuple[str, str], ...]


class Gallery:
    """Captioned pictures [N] with vectors of both, row by row. Searches may come from several threads."""

    def __init__(
        self,
        encoder: PictureEncoder,
        pictures: Sequence[CaptionedPicture],
        hashes: Sequence[str],
        image_vectors: Vectors,
        caption_vectors: Vectors,
    ) -> None:
        self.encoder = encoder
        self.pictures = tuple(pictures)
        self.hashes = tuple(hashes)
        self._images = image_vectors
        self._captions = caption_vectors

    def __len__(self) -> int:
        return len(self.pictures)

    def without(self, files: Collection[str]) -> Gallery:
        """The gallery as it would be if these files had never been in it: to test on them."""
        kept = [row for row, picture in enumerate(self.pictures) if picture.file not in files]
        return Gallery(
            self.encoder,
            [self.pictures[row] for row in kept],
            [self.hashes[row] for row in kept],
            self._images[kept],
            self._captions[kept],
        )

    def search_text(self, text: str, k: int = 5) -> list[Match]:
        """The pictures nearest to a text, by what they show or by what their captions say.

        Raises EmptyCorpusError if there are none.
        """
        vector = self.encoder.embed_texts([text])[0]
        limits = self.encoder.thresholds
        return self._matches(
            self._images @ vector - limits.caption, self._captions @ vector - SAME_CAPTION, k
        )

    def search_picture(self, picture: Image.Image, k: int = 5) -> list[Match]:
        """The pictures nearest to a picture, by what both show or by what a caption says of it.

        Raises EmptyCorpusError if there are none.
        """
        vector = self.encoder.embed_pictures([picture])[0]
        limits = self.encoder.thresholds
        return self._matches(
            self._images @ vector - limits.picture, self._captions @ vector - limits.caption, k
        )

    def _matches(
        self, by_picture: npt.NDArray[np.float32], by_caption: npt.NDArray[np.float32], k: int
    ) -> list[Match]:
        if not self.pictures:
            raise EmptyCorpusError("there are no pictures: run `mainspring rag index FOLDER` first")
        found = best(np.maximum(by_picture, by_caption), k)
        return [
            Match(self.pictures[p], float(score), "picture" if by_picture[p] >= by_caption[p] else "caption")
            for p, score in zip(found.positions.tolist(), found.scores.tolist(), strict=True)
        ]

    def save(self, path: Path) -> None:
        """Writes the file, whole or not at all."""
        head = {
            "format": FORMAT,
            "encoder": self.encoder.name,
            "pictures": [asdict(picture) for picture in self.pictures],
            "hashes": list(self.hashes),
        }
        buffer = io.BytesIO()
        np.savez(
            buffer,
            head=np.frombuffer(json.dumps(head).encode(), np.uint8),
            images=self._images,
            captions=self._captions,
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, buffer.getvalue())

    @staticmethod
    def load(path: Path, encoder: PictureEncoder) -> Gallery:
        """The gallery of a file. Raises EmptyCorpusError if there is none, StoreError for another encoder or damage."""
        if not path.is_file():
            raise EmptyCorpusError("there are no pictures: run `mainspring rag index FOLDER` first")
        try:
            with np.load(path, allow_pickle=False) as stored:
                head = json.loads(stored["head"].tobytes())
                images, captions = stored["images"], stored["captions"]
            pictures = [CaptionedPicture(**fields) for fields in head["pictures"]]
            if head["format"] != FORMAT or not len(pictures) == len(images) == len(captions):
                raise ValueError("its parts do not fit together")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise StoreError(f"{path} is damaged ({error}): delete it and index the pictures anew") from error
        if head["encoder"] != encoder.name or images.shape[1] != encoder.dimension:
            raise StoreError(
                f"{path} was made with the picture encoder {head['encoder']!r}, not {encoder.name!r}: their vectors "
                "cannot be compared; use that one, or delete the file and index anew"
            )
        return Gallery(encoder, pictures, head["hashes"], images, captions)

    @staticmethod
    def build(
        folder: Path,
        encoder: PictureEncoder,
        previous: Gallery | None = None,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> tuple[Gallery, GalleryReport]:
        """The gallery of a folder; pictures that `previous` holds with the same bytes keep their vectors.

        `progress` hears (pictures done, of how many). Raises DocumentError if there is no such folder.
        """
        shown, failures = find_captioned(folder)
        kept = {} if previous is None else dict(zip(previous.hashes, previous._images, strict=True))
        pictures: list[CaptionedPicture] = []
        hashes: list[str] = []
        rows: list[npt.NDArray[np.float32]] = []
        waiting: list[tuple[int, Image.Image]] = []
        embedded = 0

        def flush() -> None:
            nonlocal embedded
            vectors = encoder.embed_pictures([picture for _, picture in waiting])
            for (row, _), vector in zip(waiting, vectors, strict=True):
                rows[row] = vector
            embedded += len(waiting)
            waiting.clear()

        for number, item in enumerate(shown):
            path = folder / item.file
            try:
                data = read_bytes(FoundFile(path, item.file, path.stat().st_size))
                content = hashlib.sha256(data).hexdigest()
                if content not in kept:
                    waiting.append((len(rows), open_picture(data, item.file)))
            except DocumentError as error:
                failures.append((item.file, str(error)))
                continue
            pictures.append(item)
            hashes.append(content)
            rows.append(kept.get(content, np.empty(0, np.float32)))
            if len(waiting) == _AT_ONCE:
                flush()
            progress(number + 1, len(shown))
        flush()
        images = np.stack(rows) if rows else np.empty((0, encoder.dimension), np.float32)
        captions = encoder.embed_texts([picture.caption for picture in pictures])
        gallery = Gallery(encoder, pictures, hashes, images, captions)
        return gallery, GalleryReport(len(pictures), embedded, tuple(failures))
