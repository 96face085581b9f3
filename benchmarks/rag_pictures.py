"""The small dual encoder of pictures and captions: its data, its training, and recall@10 on pairs it never saw.

    apt-get download openclipart-svg gimp-help-en        # Debian 12; public domain, and GNU FDL 1.2
    for deb in openclipart-svg*.deb gimp-help-en*.deb; do dpkg-deb -x $deb data; done
    pip install resvg-py                                  # draws SVG files; needed here only
    python benchmarks/rag_pictures.py prepare --data data --out pairs.npz
    python benchmarks/rag_pictures.py train --pairs pairs.npz --out model --seconds 200 --device cuda

Held out are whole titles of drawings (never two drawings of one title on both sides) and whole pages of the manual;
a training picture that looks like a held-out one is dropped. Chance is 10 / N for N held-out pairs.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import re
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from mainspring.rag.evaluation.bootstrap import bootstrap
from mainspring.rag.generation.abstention import calibrate, evaluate
from mainspring.rag.multimodal.dual_encoder import (
    DualEncoder,
    DualEncoderConfig,
    Thresholds,
    image_vectors,
    save_dual_encoder,
    text_vectors,
    to_pixels,
)
from mainspring.rag.multimodal.training import Pairs, TrainingSettings, augmented, ranks, train

SIZE = 80
SEED = 20261126
HELD = {"drawings": (500, 300), "manual": (200, 100)}  # pairs for testing, for choosing
SPLITS = ("train", "test", "choose")
_COLLECTION = 10  # a title that more drawings than this have says nothing of one of them
_GENERATED = ("gramastar", "svg gradient collection by alan horkan")  # drawn by programs, 1,500 of two kinds
_NO_KEYWORDS = {"hash", "unsorted", "theme", "icons", "icon", "clipart", "clip art", "clip-art", ""}


@dataclass(frozen=True)
class Pair:
    """A picture and its caption. Pairs of one `group` go to one split; `held` says whether it may be held out."""

    path: Path
    caption: str
    group: str
    domain: str
    held: bool


def drawings(root: Path) -> Iterator[Pair]:
    """Open Clip Art's files, captioned by title and keywords; by the file's name where the title names a collection."""
    found = []
    for path in sorted(root.rglob("*.svg")):
        tree = ET.parse(path)
        title, keywords = "", []
        for element in tree.iter():
            if element.tag.endswith("}title") and "/dc/" in element.tag and not title:
                title = "".join(element.itertext())
            elif element.tag.endswith("}subject"):
                keywords = [item.text or "" for item in element.iter() if item.tag.endswith("}li")]
        title = re.sub(r"^(clip ?art )?by nicu buculei\s*-?\s*", "", _plain(title), flags=re.IGNORECASE)
        found.append((path, title, [_plain(word).lower() for word in keywords]))
    shared = Counter(_stem(title) for _, title, _ in found)
    for path, title, keywords in found:
        stem = _stem(title)
        if stem in _GENERATED:
            continue
        collection = not stem or shared[stem] > _COLLECTION
        if collection:
            title = _plain(re.sub(r"[-+.]", " ", re.sub(r"(_\d+)?$", "", path.stem)))
        more = [
            word
            for word in dict.fromkeys(keywords)
            if word not in _NO_KEYWORDS and not word.startswith("hash(") and word not in title.lower()
        ]
        caption = title + (": " + ", ".join(more[:8]) if more else "")
        yield Pair(path, caption, stem, "drawings", not collection)


def manual(root: Path) -> Iterator[Pair]:
    """The GIMP manual's figures: the figure's title, the picture's own caption, the page's title."""
    from bs4 import BeautifulSoup

    seen = set()
    for page in sorted(root.glob("*.html")):
        soup = BeautifulSoup(page.read_text(encoding="utf-8"), "html.parser")
        name = re.sub(r"^[\d.\s]+", "", soup.title.get_text(" ", strip=True)) if soup.title else ""
        for figure in soup.select("div.figure"):
            head = figure.find("p", class_="title")
            if head is None:
                continue
            title = re.sub(r"^Figure\s+[\d.]+\s*", "", _plain(head.get_text(" ", strip=True)))
            for picture in figure.select("div.mediaobject"):
                image, below = picture.find("img"), picture.find("div", class_="caption")
                if image is None:
                    continue
                path = (root / str(image["src"])).resolve()
                if path.is_file() and path not in seen:
                    seen.add(path)
                    own = _plain(below.get_text(" ", strip=True)) if below is not None else ""
                    caption = f"{title}. {own}".strip(" .") + (f" ({name})" if name else "")
                    yield Pair(path, caption, page.name, "manual", True)


def _plain(text: str) -> str:
    return re.sub(r"[_\s]+", " ", text).strip()


def _stem(title: str) -> str:
    return re.sub(r"[\W\d_]+", " ", title.lower()).strip()


def fitted(path: Path) -> npt.NDArray[np.uint8]:
    """The picture within SIZE x SIZE on white: [SIZE, SIZE, 3]."""
    from mainspring.rag.multimodal.pictures import fit_square, open_picture

    if path.suffix == ".svg":
        import resvg_py

        drawn = bytes(resvg_py.svg_to_bytes(svg_path=str(path), width=256, background="white", dpi=96.0))
        return fit_square(open_picture(drawn, path.name), SIZE)
    return fit_square(open_picture(path.read_bytes(), path.name), SIZE)


def split(pairs: list[Pair], images: list[npt.NDArray[np.uint8]]) -> tuple[list[int], list[int]]:
    """(indices that are kept, the split of each as an index of SPLITS)."""
    generator = random.Random(SEED)
    where: dict[tuple[str, str], int] = {}
    for domain, (test, choose) in HELD.items():
        members: dict[str, list[int]] = {}
        for index, pair in enumerate(pairs):
            if pair.domain == domain and pair.held:
                members.setdefault(pair.group, []).append(index)
        groups = list(members)
        generator.shuffle(groups)
        one_each = domain == "drawings"
        for number, wanted in ((1, test), (2, choose)):
            taken = 0
            while taken < wanted:
                group = groups.pop()
                where[domain, group] = number
                taken += 1 if one_each else len(members[group])
    small = np.stack([image.reshape(20, 4, 20, 4, 3).mean((1, 3)) for image in images]).reshape(
        len(images), -1
    )
    chosen: dict[int, int] = {}
    done = set()
    for index, pair in enumerate(pairs):
        number = where.get((pair.domain, pair.group), 0) if pair.held else 0
        if number and pair.domain == "drawings" and pair.group in done:
            continue  # one drawing of a held-out title, so that there is one right answer
        if number:
            done.add(pair.group)
        chosen[index] = number
    held = small[[i for i, n in chosen.items() if n]].astype(np.float32)
    kept = [i for i, n in chosen.items() if n or np.abs(held - small[i]).mean(1).min() > 4]
    return kept, [chosen[i] for i in kept]


def prepare(data: Path, out: Path) -> None:
    """Packs pictures (WebP), captions and their vectors (8 bits) into one file."""
    from PIL import Image

    from mainspring.rag.embedding.models import load_embedder

    pairs, images = [], []
    sources = (
        drawings(data / "usr/share/openclipart/svg"),
        manual(data / "usr/share/gimp/2.0/help/en"),
    )
    for source in sources:
        for pair in source:
            pairs.append(pair)
            images.append(fitted(pair.path))
    kept, numbers = split(pairs, images)
    packed, ends = bytearray(), []
    for index in kept:
        buffer = io.BytesIO()
        Image.fromarray(images[index]).save(buffer, "WEBP", quality=60, method=4)
        packed += buffer.getvalue()
        ends.append(len(packed))
    captions = [pairs[i].caption for i in kept]
    embedder = load_embedder()
    vectors = embedder.embed_queries(captions)
    np.savez(
        out,
        webp=np.frombuffer(bytes(packed), np.uint8),
        ends=np.array(ends),
        texts=np.clip(np.round(vectors * 508), -127, 127).astype(np.int8),  # their largest is about 0.25
        split=np.array(numbers, np.uint8),
        domain=np.array([pairs[i].domain == "manual" for i in kept]),
        captions=np.frombuffer(json.dumps(captions).encode(), np.uint8),
    )
    for name, number in zip(SPLITS, range(3), strict=True):
        count = Counter(pairs[i].domain for i, n in zip(kept, numbers, strict=True) if n == number)
        print(name, dict(count))
    print(
        f"{out}: {out.stat().st_size / 1e6:.1f} MB; {len(pairs) - len(kept)} near copies of held-out ones left out"
    )


def load(path: Path) -> dict[str, Pairs]:
    """The pairs by "split" and "split/domain"."""
    from PIL import Image

    with np.load(path, allow_pickle=False) as stored:
        data = stored["webp"].tobytes()
        ends = stored["ends"].tolist()
        texts, numbers, domain = stored["texts"].astype(np.float32), stored["split"], stored["domain"]
    images = np.stack(
        [
            np.asarray(Image.open(io.BytesIO(data[start:end])).convert("RGB"))
            for start, end in zip([0, *ends], ends, strict=False)
        ]
    )
    texts /= np.linalg.norm(texts, axis=1, keepdims=True)
    found = {}
    for number, name in enumerate(SPLITS):
        rows = numbers == number
        found[name] = Pairs(images[rows], texts[rows])
        for label, wanted in (("drawings", False), ("manual", True)):
            these = rows & (domain == wanted)
            found[f"{name}/{label}"] = Pairs(images[these], texts[these])
    return found


def matches(model: DualEncoder, pairs: Pairs) -> tuple[list[float], list[float]]:
    """Each caption's best cosine among the pictures: with its own picture there, and with it taken out."""
    scores = text_vectors(model, pairs.texts) @ image_vectors(model, pairs.images).T
    with_own = scores.max(1)
    np.fill_diagonal(scores, -1)
    return with_own.tolist(), scores.max(1).tolist()


def copies(model: DualEncoder, pairs: Pairs) -> tuple[list[float], list[float]]:
    """A changed copy's best cosine among the pictures: with its original there, and with it taken out."""
    pixels = to_pixels(pairs.images).to(model.image_map.weight.device)
    changed = augmented(pixels, torch.Generator(device=pixels.device).manual_seed(SEED))
    back = ((changed.permute(0, 2, 3, 1) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).cpu().numpy()
    scores = image_vectors(model, back) @ image_vectors(model, pairs.images).T
    with_own = scores.max(1)
    np.fill_diagonal(scores, -1)
    return with_own.tolist(), scores.max(1).tolist()


def table(model: DualEncoder, parts: dict[str, Pairs]) -> None:
    """Recall@10 in both directions on held-out pairs, with intervals and chance; the threshold and what it does."""
    print(
        "| held-out pairs | N | chance | text to picture: recall@10 | x chance | picture to text | x chance |"
    )
    print("|---|---|---|---|---|---|---|")
    for name in ("test/drawings", "test/manual", "test"):
        pairs = parts[name]
        chance = 10 / len(pairs)
        cells = []
        for found in ranks(model, pairs):
            recall = bootstrap([float(rank <= 10) for rank in found])
            cells += [str(recall), f"{np.mean(found <= 10) / chance:.1f}"]
        print(f"| {name} | {len(pairs)} | {chance:.3f} | {' | '.join(cells)} |", flush=True)
    chosen = calibrate(*matches(model, parts["choose"]))
    held = evaluate(chosen.threshold, *matches(model, parts["test"]))
    same = calibrate(*copies(model, parts["choose"]))
    held_same = evaluate(same.threshold, *copies(model, parts["test"]))
    print(
        f"pictures: threshold {same.threshold:.3f}; on test pictures {held_same.answered:.3f} of changed copies are "
        f"recognised where their original is there, {held_same.abstained:.3f} are not where it is not"
    )
    print(
        f"threshold {chosen.threshold:.3f} (balanced accuracy {chosen.balanced_accuracy:.3f} on the pairs that chose "
        f"it); on test pairs: {held.answered:.3f} of captions with their picture there get one, "
        f"{held.abstained:.3f} without it get none"
    )


def quality(model: DualEncoder, pairs: Pairs) -> float:
    return float(np.mean([(found <= 10).mean() for found in ranks(model, pairs)]))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("prepare", "train"))
    parser.add_argument("--data", type=Path, default=Path("data"), help="where the packages were unpacked")
    parser.add_argument("--pairs", type=Path, default=Path("pairs.npz"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=200, help="of training, shared by the widths")
    parser.add_argument("--epochs", type=int, default=300)
    parser.add_argument(
        "--widths", type=int, nargs="+", default=[32], help="of the first stage, one model each"
    )
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    if options.what == "prepare":
        prepare(options.data, options.out)
        return
    parts = load(options.pairs)
    print({name: len(pairs) for name, pairs in parts.items()}, flush=True)
    best: tuple[float, DualEncoder] | None = None
    for width in options.widths:
        config = DualEncoderConfig(SIZE, (width, 2 * width, 4 * width, 8 * width))
        settings = TrainingSettings(options.epochs, options.seconds / len(options.widths))
        epochs: list[tuple[int, float]] = []
        model = train(
            parts["train"], config, settings, options.device, lambda *heard, to=epochs: to.append(heard)
        )
        reached = quality(model, parts["choose"])
        size = sum(p.numel() for p in model.parameters()) / 1e6
        print(
            f"width {width}: {size:.1f} M parameters, {epochs[-1] if epochs else 'no'} epochs; recall@10 on the"
        )
        print(f"  choosing pairs {reached:.3f}", flush=True)
        if best is None or reached > best[0]:
            best = (reached, model)
    assert best is not None
    model = best[1]
    table(model, parts)
    thresholds = Thresholds(
        calibrate(*matches(model, parts["choose"])).threshold,
        calibrate(*copies(model, parts["choose"])).threshold,
    )
    notes = {
        "trained on": "openclipart-svg 0.18 and gimp-help-en 2.10.34 (Debian 12)",
        "pairs": len(parts["train"]),
    }
    save_dual_encoder(model.cpu(), options.out, thresholds=thresholds, notes=notes)


if __name__ == "__main__":
    main()
