"""Pictures and captions: reading, the encoders, the gallery, and what is answered when nothing is similar enough."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from mainspring.errors import (
    CheckpointError,
    DocumentError,
    EmptyCorpusError,
    ModelNotFoundError,
    StoreError,
    UnsupportedModelError,
)
from mainspring.rag.embedding.embedder import Vectors
from mainspring.rag.multimodal.answering import ask_about, describe, illustrate
from mainspring.rag.multimodal.captions import find_captioned
from mainspring.rag.multimodal.clip import ClipEncoder
from mainspring.rag.multimodal.dual_encoder import (
    DualEncoder,
    DualEncoderConfig,
    Thresholds,
    image_vectors,
    load_dual_encoder,
    save_dual_encoder,
)
from mainspring.rag.multimodal.gallery import Gallery
from mainspring.rag.multimodal.picture_encoder import CLIP_THRESHOLDS, load_picture_encoder
from mainspring.rag.multimodal.pictures import MAX_PIXELS, fit_square, open_picture
from mainspring.rag.multimodal.training import Pairs, TrainingSettings, ranks, train
from mainspring.rag.pipeline import Answer, Parts, Pipeline
from mainspring.rag.retrieval.lexical import LexicalIndex
from mainspring.rag.strategy import AnswerStep, ContextStep, RerankStep, Strategy
from rag.fakes import OverlapReranker, ScriptedModel, WordEmbedder
from rag.test_index import open_index, write

COLOURS = {"red": (220, 20, 20), "green": (20, 180, 20), "blue": (20, 20, 220), "yellow": (230, 220, 30)}


def square(colour: str, size: int = 40) -> Image.Image:
    return Image.new("RGB", (size, size), COLOURS[colour])


def png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


class ColourEncoder:
    """A picture is its mean colour, a text the colour that it names. Implements `PictureEncoder`."""

    dimension = 3
    thresholds = Thresholds(caption=0.98, picture=0.995)

    def __init__(self, name: str = "colours") -> None:
        self.name = name
        self.embedded = 0

    def embed_pictures(self, pictures: Sequence[Image.Image]) -> Vectors:
        self.embedded += len(pictures)
        return self._unit([np.asarray(p, np.float32).mean((0, 1)) for p in pictures])

    def embed_texts(self, texts: Sequence[str]) -> Vectors:
        named = [[c for c in COLOURS if c in text] for text in texts]
        return self._unit([np.array(COLOURS[n[0]] if n else (1, 1, 1), np.float32) for n in named])

    def _unit(self, rows: Sequence[np.ndarray]) -> Vectors:
        matrix = np.array(rows, np.float32).reshape(-1, 3)
        return matrix / np.linalg.norm(matrix, axis=1, keepdims=True)


def test_a_damaged_unknown_or_huge_picture_is_refused_by_name() -> None:
    for data in (b"", b"no picture", png(square("red"))[:40]):
        with pytest.raises(DocumentError, match=r"a\.png is not a picture"):
            open_picture(data, "a.png")
    buffer = io.BytesIO()
    Image.new("1", (MAX_PIXELS // 1000 + 1, 1000)).save(buffer, "PNG")
    with pytest.raises(DocumentError, match=f"at most {MAX_PIXELS}"):
        open_picture(buffer.getvalue(), "large.png")


def test_what_is_transparent_is_white_and_a_fitted_picture_keeps_its_proportions() -> None:
    layered = Image.new("RGBA", (20, 10), (255, 0, 0, 0))
    assert np.asarray(open_picture(png(layered), "t.png")).min() == 255
    fitted = fit_square(Image.new("RGB", (100, 50), (0, 0, 0)), 40)
    assert fitted.shape == (40, 40, 3)
    assert (fitted[:9] == 255).all()
    assert (fitted[31:] == 255).all()
    assert (fitted[11:29, 1:39] == 0).all()


def test_captions_come_from_the_documents_that_show_a_picture_with_their_place(tmp_path: Path) -> None:
    for name in ("red", "green", "blue", "yellow"):
        (tmp_path / "img").mkdir(exist_ok=True)
        (tmp_path / "img" / f"{name}_square 01.png").write_bytes(png(square(name)))
    (tmp_path / "a.html").write_text(
        "<p>x</p>\n<figure><img src='img/red_square%2001.png' alt='no'><figcaption>A red\n square</figcaption></figure>"
    )
    (tmp_path / "b.md").write_text('text\n\n![a green one](<img/green_square 01.png>)\n![](img/none.png "x")')
    (tmp_path / "c.rst").write_text(
        ".. figure:: img/blue_square%2001.png\n   :alt: no\n\n   Blue,\n   at last.\n\n   Legend.\n"
    )
    (tmp_path / "broken.md").write_bytes(b"\xff\x00\xfe\x00\x00binary\x00\x01")
    found, failures = find_captioned(tmp_path)
    assert {(p.file, p.caption, p.page, p.line) for p in found} == {
        ("img/green_square 01.png", "a green one", "b.md", 3),
        ("img/red_square 01.png", "A red square", "a.html", 2),
        ("img/blue_square 01.png", "Blue, at last.", "c.rst", 1),
        ("img/yellow_square 01.png", "yellow square", "img/yellow_square 01.png", 1),
    }
    assert [name for name, _ in failures] == ["broken.md"]
    with pytest.raises(DocumentError, match="no folder"):
        find_captioned(tmp_path / "absent")


def gallery_of(folder: Path, encoder: ColourEncoder, previous: Gallery | None = None) -> Gallery:
    return Gallery.build(folder, encoder, previous)[0]


def coloured_folder(folder: Path, *colours: str) -> Path:
    folder.mkdir(exist_ok=True)
    for colour in colours:
        (folder / f"{colour}.png").write_bytes(png(square(colour)))
    page = "\n".join(f"![A {colour} square]({colour}.png)" for colour in colours)
    (folder / "page.md").write_text(page)
    return folder


def test_pictures_are_found_in_both_directions_and_what_is_not_similar_enough_is_not_given(
    tmp_path: Path,
) -> None:
    gallery = gallery_of(coloured_folder(tmp_path / "p", "red", "green"), ColourEncoder())
    assert [m.picture.file for m in gallery.search_text("a green thing", 2)] == ["green.png", "red.png"]
    shown = illustrate(gallery, "a green thing")
    assert shown is not None
    assert shown.picture.caption == "A green square"
    assert illustrate(gallery, "a blue thing") is None
    described = describe(gallery, square("red", 17))
    assert described.caption == "A red square"
    assert described.source is not None
    assert (described.source.page, described.source.line) == ("page.md", 1)
    assert describe(gallery, square("blue")).caption is None

    class Sees:
        def look(self, picture: Image.Image, prompt: str) -> str:
            return " a blue square "

    generated = describe(gallery, square("blue"), Sees())
    assert (generated.caption, generated.source) == ("a blue square", None)


def test_a_second_run_embeds_new_pictures_only_and_a_gallery_survives_its_file(tmp_path: Path) -> None:
    encoder = ColourEncoder()
    folder = coloured_folder(tmp_path / "p", "red", "green")
    (folder / "broken.png").write_bytes(b"nothing")
    first, report = Gallery.build(folder, encoder)
    assert [name for name, _ in report.failures] == ["broken.png"]
    first.save(tmp_path / "index" / "pictures.npz")
    loaded = Gallery.load(tmp_path / "index" / "pictures.npz", encoder)
    assert loaded.pictures == first.pictures
    before = encoder.embedded
    coloured_folder(folder, "red", "green", "blue")
    second, report = Gallery.build(folder, encoder, loaded)
    assert encoder.embedded - before == report.embedded == 1
    assert len(second) == 3
    assert illustrate(second, "a blue thing") is not None
    with pytest.raises(StoreError, match="'colours', not 'others'"):
        Gallery.load(tmp_path / "index" / "pictures.npz", ColourEncoder("others"))
    with pytest.raises(EmptyCorpusError, match="no pictures"):
        Gallery.load(tmp_path / "absent.npz", encoder)
    (tmp_path / "index" / "pictures.npz").write_bytes(b"damage")
    with pytest.raises(StoreError, match="damaged"):
        Gallery.load(tmp_path / "index" / "pictures.npz", encoder)


def test_a_question_about_a_picture_is_grounded_in_similar_pictures_and_documents(tmp_path: Path) -> None:
    gallery = gallery_of(coloured_folder(tmp_path / "p", "red", "green"), ColourEncoder())
    embedder = WordEmbedder()
    index = open_index(tmp_path / "index", embedder=embedder)
    index.update(write(tmp_path / "docs", a="A red square means stop.", b="A green square means go."))
    lexical = LexicalIndex.open(tmp_path / "index" / "bm25", index.store)
    model = ScriptedModel("A red square means stop. The picture is A red square.")
    parts = Parts(embedder, index.store, lexical, OverlapReranker(), OverlapReranker(), model=model)
    pipeline = Pipeline(Strategy(answer=AnswerStep(abstain_below=-1.0)), parts)
    *_, answer = ask_about(pipeline, gallery, square("red"), "What does this mean?")
    assert isinstance(answer, Answer)
    assert {p.chunk.file for p in answer.passages} >= {"a.md", "page.md"}
    prompt = model.asked[0][-1].content
    assert "Picture red.png: A red square" in prompt
    assert "green.png" not in prompt
    assert answer.citations


def test_the_page_that_shows_a_similar_picture_is_read_and_read_once(tmp_path: Path) -> None:
    folder = coloured_folder(tmp_path / "p", "red", "green")
    told = "The red one was found on the beach in the spring of a year that nobody knows."
    (folder / "page.md").write_text(f"![A red square](red.png)\n\n{told}\n")
    gallery = gallery_of(folder, ColourEncoder())
    write(folder, **{f"other{n}": f"What was found where is told of a square {n}." for n in range(9)})
    embedder = WordEmbedder()
    index = open_index(tmp_path / "index", embedder=embedder)
    index.update(folder)
    lexical = LexicalIndex.open(tmp_path / "index" / "bm25", index.store)
    model = ScriptedModel("On the beach.", "Nowhere.")
    parts = Parts(embedder, index.store, lexical, OverlapReranker(), OverlapReranker(), model=model)
    strategy = Strategy(
        context=ContextStep(passages=2), answer=AnswerStep(abstain_below=-1.0), rerank=RerankStep("none")
    )
    pipeline = Pipeline(strategy, parts)
    question = "Where was this found?"
    *_, answer = ask_about(pipeline, gallery, square("red"), question)
    assert isinstance(answer, Answer)
    assert told in model.asked[0][-1].content
    ids = [passage.chunk.id for passage in answer.passages]
    assert len(ids) == len(set(ids))
    *_, alone = pipeline.ask(question)
    assert isinstance(alone, Answer)
    assert "page.md" not in {passage.chunk.file for passage in alone.passages}


def test_the_dual_encoder_learns_which_colour_a_caption_names(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    names = list(COLOURS)
    texts = np.linalg.qr(generator.standard_normal((16, 16)))[0][:4].astype(np.float32)
    images, captions = [], []
    for n in range(32):
        picture = Image.new("RGB", (16, 16), "white")
        ImageDraw.Draw(picture).rectangle((2, 2, 13, 13), fill=COLOURS[names[n % 4]])
        images.append(np.asarray(picture))
        captions.append(texts[n % 4])
    pairs = Pairs(np.stack(images), np.stack(captions))
    config = DualEncoderConfig(16, (8, 16), 1, 16, "words", 16)
    model = train(
        pairs,
        config,
        TrainingSettings(epochs=30, batch_size=16, mean_decay=0.8, soft=0.5, soft_temperature=0.05),
    )
    one_each = Pairs(pairs.images[:4], pairs.texts[:4])
    assert [found.tolist() for found in ranks(model, one_each)] == [[1] * 4, [1] * 4]
    save_dual_encoder(model, tmp_path / "model", thresholds=Thresholds(0.2, 0.9), notes={})
    loaded, thresholds = load_dual_encoder(tmp_path / "model")
    assert thresholds == Thresholds(0.2, 0.9)
    np.testing.assert_allclose(
        image_vectors(loaded, pairs.images), image_vectors(model, pairs.images), atol=5e-3
    )
    (tmp_path / "model" / "model.safetensors").write_bytes(b"damage")
    with pytest.raises(CheckpointError, match="dual-encoder"):
        load_dual_encoder(tmp_path / "model")


def test_training_keeps_its_time_and_gives_a_model_that_can_be_used() -> None:
    pairs = Pairs(np.zeros((8, 16, 16, 3), np.uint8), np.eye(8, dtype=np.float32))
    model = train(
        pairs,
        DualEncoderConfig(16, (4,), 1, 4, "x", 8),
        TrainingSettings(epochs=10**6, seconds=0.3, batch_size=8),
    )
    assert not model.training
    assert isinstance(model, DualEncoder)


@pytest.fixture(scope="module")
def clip_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP of random weights with tokenizer and picture processor, all of it as transformers saves it."""
    from transformers import (
        CLIPConfig,
        CLIPImageProcessor,
        CLIPModel,
        CLIPTextConfig,
        CLIPTokenizer,
        CLIPVisionConfig,
    )

    directory = tmp_path_factory.mktemp("clip")
    alphabet = [*map(chr, range(33, 127)), *map(chr, range(161, 173)), *map(chr, range(174, 324))]
    merges = [("t", "h"), ("th", "e</w>"), ("c", "a"), ("ca", "t</w>")]
    words = [*alphabet, *(f"{c}</w>" for c in alphabet), *map("".join, merges)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: number for number, word in enumerate(words)}
    CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=16).save_pretrained(directory)
    CLIPImageProcessor(
        size={"shortest_edge": 40},
        crop_size={"height": 32, "width": 32},
        image_mean=[0.5, 0.4, 0.3],
        image_std=[0.2, 0.3, 0.4],
    ).save_pretrained(directory)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    start, end = len(words) - 2, len(words) - 1
    text = CLIPTextConfig(
        vocab_size=len(words),
        max_position_embeddings=16,
        bos_token_id=start,
        eos_token_id=end,
        pad_token_id=end,
        **sizes,
    )
    vision = CLIPVisionConfig(image_size=32, patch_size=8, **sizes)
    config = CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=24)
    CLIPModel(config).save_pretrained(directory)
    return directory


def test_a_clip_directory_gives_the_vectors_of_transformers(clip_directory: Path) -> None:
    from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer

    encoder = load_picture_encoder(str(clip_directory))
    assert isinstance(encoder, ClipEncoder)
    assert (encoder.dimension, encoder.thresholds) == (24, CLIP_THRESHOLDS)
    reference = CLIPModel.from_pretrained(clip_directory).eval()
    process = CLIPImageProcessor.from_pretrained(clip_directory)
    tokenize = CLIPTokenizer.from_pretrained(clip_directory)
    generator = np.random.default_rng(0)
    sizes = [(40, 40), (64, 48), (31, 90), (32, 32), (123, 57)]  # heights and widths
    pictures = [Image.fromarray(generator.integers(0, 255, (*s, 3), dtype=np.uint8)) for s in sizes]
    texts = ["the cat", "The CAT,  it's 2 o'clock!", "a" * 30, "x", "the " * 30, "Ünïcödé — ß", ""]
    with torch.no_grad():
        pixels = process(pictures, return_tensors="pt")["pixel_values"]
        shown = reference.visual_projection(reference.vision_model(pixel_values=pixels).pooler_output)
        written = []
        for text in texts:
            ids = tokenize(text, truncation=True, max_length=16, return_tensors="pt")["input_ids"]
            pooled = reference.text_model(input_ids=ids).pooler_output
            written.append(reference.text_projection(pooled)[0])
    expected = torch.nn.functional.normalize(shown, dim=-1).numpy()
    np.testing.assert_allclose(encoder.embed_pictures(pictures), expected, atol=2e-6)
    expected = torch.nn.functional.normalize(torch.stack(written), dim=-1).numpy()
    np.testing.assert_allclose(encoder.embed_texts(texts), expected, atol=2e-6)
    assert encoder.embed_pictures([]).shape == encoder.embed_texts([]).shape == (0, 24)


def test_the_packaged_encoder_knows_a_picture_again_when_it_is_moved() -> None:
    encoder = load_picture_encoder()
    assert encoder.name == "small"
    shapes = []
    for n, colour in enumerate(COLOURS.values()):
        picture = Image.new("RGB", (120, 90), "white")
        draw = ImageDraw.Draw(picture)
        points = [(20, 75), (60, 10), (100, 75)] if n % 2 else [(25, 20), (95, 20), (95, 70), (25, 70)]
        draw.polygon(points, fill=colour, outline="black")
        draw.ellipse((40 + 4 * n, 30, 60 + 6 * n, 50), fill="black" if n < 2 else "white")
        shapes.append(picture)
    moved = [picture.rotate(5, fillcolor="white", translate=(4, 3)) for picture in shapes]
    vectors = encoder.embed_pictures([*shapes, *moved])
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    cosines = vectors[:4] @ vectors[4:].T
    assert cosines.argmax(1).tolist() == [0, 1, 2, 3]
    assert (np.diag(cosines) >= encoder.thresholds.picture).all()
    captions = encoder.embed_texts(["a red square", "a dialog with buttons"])
    assert captions.shape == (2, encoder.dimension)


def test_what_is_no_picture_encoder_is_refused_with_what_it_is(clip_directory: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="CLIP"):
        load_picture_encoder(str(tmp_path / "absent"))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(UnsupportedModelError, match="'bert'"):
        load_picture_encoder(str(tmp_path))
    fields = json.loads((clip_directory / "config.json").read_text())
    fields["vision_config"]["hidden_act"] = "relu"
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(UnsupportedModelError, match="relu"):
        load_picture_encoder(str(tmp_path))
    fields["vision_config"]["hidden_act"] = "gelu"
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(CheckpointError, match="preprocessor_config"):
        load_picture_encoder(str(tmp_path))
