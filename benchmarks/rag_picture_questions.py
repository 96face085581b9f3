"""Does a picture help to answer? Questions about pictures of a manual, with the picture and without it.

    mainspring rag index /usr/share/gimp/2.0/help/en --index gimp          # Debian's gimp-help-en
    python benchmarks/rag_picture_questions.py --index gimp --manual /usr/share/gimp/2.0/help/en --pairs pairs.npz

The pictures are those that the small encoder was tested on (`rag_pictures.py prepare` wrote the pairs): no page that
shows one was in its training. The same questions are asked with nothing, with a picture that is not in the gallery (the
other pictures of its page are), with a changed copy of a stored one (moved, turned, recoloured, partly covered), and
with a stored one. Found: the page that shows the picture among the passages that the generator gets. Answered: F1 of
the words of the sentence that the cross-encoder puts first against the picture's caption. 95% bootstraps, paired by
question.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from mainspring.rag.assembly import open_pipeline
from mainspring.rag.evaluation.bootstrap import bootstrap, paired_difference
from mainspring.rag.evaluation.measures import token_f1
from mainspring.rag.generation.language_model import Message
from mainspring.rag.generation.reading import ExtractiveReader
from mainspring.rag.multimodal.answering import ask_about
from mainspring.rag.multimodal.gallery import Gallery
from mainspring.rag.multimodal.picture_encoder import load_picture_encoder
from mainspring.rag.multimodal.pictures import open_picture
from mainspring.rag.multimodal.training import augmented
from mainspring.rag.pipeline import Answer, Passage, Pipeline
from mainspring.rag.ranking.cross_encoder import CrossEncoder
from mainspring.rag.strategy import AnswerStep, ContextStep, RerankStep, RetrieveStep, Strategy
from rag_pictures import Pair, manual

SEED = 20261126
QUESTIONS = (
    "What does this picture show?",
    "What is the tool, dialog or effect in this picture for?",
    "Where is what this picture shows explained?",
)
STRATEGY = Strategy(
    retrieve=RetrieveStep(candidates=20),
    rerank=RerankStep("none"),
    context=ContextStep(passages=5),
    answer=AnswerStep(abstain_below=-100.0),
)
_SIDE = 240  # of the changed copies


class _Mute:
    """Answers nothing: only what it would have read is looked at. Implements `LanguageModel`."""

    name = "mute"

    def stream(self, messages: Sequence[Message], max_tokens: int) -> Iterator[str]:
        yield "."


def test_pairs(pairs: Path, root: Path) -> list[Pair]:
    """The manual's pictures that the encoder was tested on."""
    with np.load(pairs, allow_pickle=False) as stored:
        captions = json.loads(stored["captions"].tobytes())
        rows = (stored["split"] == 1) & stored["domain"]
    wanted = {caption for caption, row in zip(captions, rows, strict=True) if row}
    return [pair for pair in manual(root) if pair.caption in wanted]


def changed(picture: Image.Image, seed: int) -> Image.Image:
    """Moved, turned, recoloured, partly covered."""
    small = picture.copy()
    small.thumbnail((_SIDE, _SIDE))
    square = Image.new("RGB", (_SIDE, _SIDE), "white")
    square.paste(small, ((_SIDE - small.width) // 2, (_SIDE - small.height) // 2))
    pixels = torch.from_numpy(np.array(square)).permute(2, 0, 1)[None].float() / 127.5 - 1
    moved = augmented(pixels, torch.Generator().manual_seed(seed))[0]
    return Image.fromarray(((moved.permute(1, 2, 0) + 1) * 127.5).round().clamp(0, 255).byte().numpy())


def passages(
    pipeline: Pipeline, gallery: Gallery, picture: Image.Image | None, question: str
) -> list[Passage]:
    """What the generator would read."""
    events = pipeline.ask(question) if picture is None else ask_about(pipeline, gallery, picture, question)
    *_, last = events
    assert isinstance(last, Answer)
    return list(last.passages)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--index", type=Path, required=True)
    parser.add_argument("--manual", type=Path, required=True)
    parser.add_argument("--pairs", type=Path, required=True)
    parser.add_argument("--questions", type=int, default=200)
    parser.add_argument("--answers", type=int, default=60, help="of them are also answered")
    options = parser.parse_args()
    torch.set_num_threads(2)
    pairs = test_pairs(options.pairs, options.manual)
    random.Random(SEED).shuffle(pairs)
    pairs = pairs[: options.questions]
    gallery = Gallery.load(options.index / "pictures.npz", load_picture_encoder())
    pipeline = open_pipeline(options.index, STRATEGY, model=_Mute(), citations=False)
    pipeline = dataclasses.replace(pipeline, parts=dataclasses.replace(pipeline.parts, attributor=None))
    reader = ExtractiveReader(CrossEncoder(threads=1))
    stored = {picture.file: picture for picture in gallery.pictures}
    found: dict[str, list[float]] = {}
    f1: dict[str, list[float]] = {}
    for number, pair in enumerate(pairs):
        file = pair.path.relative_to(options.manual.resolve()).as_posix()
        if file not in stored:
            continue
        picture = open_picture(pair.path.read_bytes(), file)
        question = QUESTIONS[number % len(QUESTIONS)]
        ways: dict[str, tuple[Gallery, Image.Image | None]] = {
            "the question alone": (gallery, None),
            "a picture that is not in the gallery": (gallery.without([file]), picture),
            "a changed copy of a stored picture": (gallery, changed(picture, number)),
            "a stored picture": (gallery, picture),
        }
        for name, (shelf, shown) in ways.items():
            read = passages(pipeline, shelf, shown, question)
            pages = [passage.chunk.file for passage in read]
            found.setdefault(name, []).append(float(pair.group in pages))
            if number < options.answers:
                texts = [passage.chunk.context for passage in read]
                answer = reader.read(question, texts, [], 48)
                f1.setdefault(name, []).append(token_f1(answer, [stored[file].caption]))
        if number % 20 == 19:
            print({name: round(float(np.mean(values)), 3) for name, values in found.items()}, flush=True)
    base = "the question alone"
    print(
        f"{len(found[base])} questions, {len(f1[base])} of them answered; {len(gallery)} pictures in the gallery"
    )
    print("| asked with | page found | minus without | answer's F1 | minus without |")
    print("|---|---|---|---|---|")
    for name in found:
        gains = ["", ""]
        if name != base:
            gains = [str(paired_difference(a[name], a[base])) for a in (found, f1)]
        print(f"| {name} | {bootstrap(found[name])} | {gains[0]} | {bootstrap(f1[name])} | {gains[1]} |")


if __name__ == "__main__":
    main()
