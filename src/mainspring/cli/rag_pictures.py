"""`mainspring rag pictures`: a folder's captioned pictures, found by texts and by pictures, and asked about."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mainspring.cli.rag_options import INDEX_NAME, Index, write_answer

if TYPE_CHECKING:
    from PIL.Image import Image

    from mainspring.rag.multimodal.gallery import Gallery, Match

pictures = typer.Typer(
    name="pictures",
    help="Pictures with captions: find them, caption others, ask about one.",
    no_args_is_help=True,
)

Encoder = Annotated[
    str, typer.Option(help='"small" (drawings and screenshots), or a Hugging Face directory of a CLIP model.')
]
_Vision = Annotated[
    str | None,
    typer.Option(help="A vision-language endpoint: http://host/v1, #model to name one of several."),
]


@pictures.command("index")
def index_pictures(
    folder: Annotated[
        Path, typer.Argument(help="The folder with pictures and the documents that show them.")
    ],
    directory: Index = Path(INDEX_NAME),
    encoder: Encoder = "small",
) -> None:
    """Index a folder's pictures with the captions that its HTML, Markdown and reStructuredText give them.

    Run it again after changes: pictures that are known keep their vectors.
    """
    update_gallery(folder, directory, encoder, Console(stderr=True))


def update_gallery(
    folder: Path, directory: Path, encoder: str, console: Console, documents: bool = True
) -> None:
    """Brings the index's pictures up to date with the folder and says what was done.

    `documents`: whether documents that cannot be read are named too. Raises what the encoder and the gallery raise.
    """
    from mainspring.errors import EmptyCorpusError
    from mainspring.rag.multimodal.gallery import Gallery
    from mainspring.rag.multimodal.picture_encoder import load_picture_encoder
    from mainspring.rag.multimodal.pictures import SUFFIXES

    loaded = load_picture_encoder(encoder)
    try:
        previous = Gallery.load(_file(directory), loaded)
    except EmptyCorpusError:
        previous = None
    columns = (TextColumn("Pictures"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=None)
        gallery, report = Gallery.build(
            folder, loaded, previous, lambda done, total: bar.update(task, completed=done, total=total)
        )
    gallery.save(_file(directory))
    failures = [f for f in report.failures if documents or Path(f[0]).suffix.lower() in SUFFIXES]
    for name, reason in failures:
        console.print(
            f"[yellow]left out[/] {escape(name)}: {escape(reason)}", highlight=False, soft_wrap=True
        )
    typer.echo(
        f"{report.pictures} pictures, {report.embedded} of them new, {len(failures)} left out, in {directory}"
    )


def has_pictures(folder: Path, directory: Path) -> bool:
    """Whether the folder holds pictures to index, or the index some that may have to go."""
    from mainspring.rag.documents.reading import walk
    from mainspring.rag.multimodal.pictures import SUFFIXES

    return _file(directory).is_file() or any(True for _ in walk(folder, SUFFIXES, [directory]))


@pictures.command()
def find(
    text: Annotated[str, typer.Argument(help="What the picture shows.")],
    directory: Index = Path(INDEX_NAME),
    encoder: Encoder = "small",
    k: Annotated[int, typer.Option("-k", min=1, max=100, help="How many pictures.")] = 5,
) -> None:
    """Print the stored pictures that show what a text says; those that are not similar enough are marked."""
    for match in _gallery(directory, encoder).search_text(text, k):
        _print(match)


@pictures.command()
def caption(
    picture: Annotated[Path, typer.Argument(help="A picture file.")],
    directory: Index = Path(INDEX_NAME),
    encoder: Encoder = "small",
    vision: _Vision = None,
) -> None:
    """Caption a picture: by a stored one that is similar enough, else by the vision model, else not at all."""
    from mainspring.rag.multimodal.answering import describe, vision_model

    found = describe(_gallery(directory, encoder), _opened(picture), vision_model(vision))
    if found.caption is None:
        typer.echo(
            "No stored picture is similar enough, and there is no vision model (--vision) to describe it."
        )
        raise typer.Exit(1)
    source = f"  ({found.source.page}, line {found.source.line})" if found.source else "  (generated)"
    typer.echo(found.caption + source)


@pictures.command("ask")
def ask_picture(
    picture: Annotated[Path, typer.Argument(help="A picture file.")],
    question: Annotated[str, typer.Argument(help="What to answer about it.")],
    directory: Index = Path(INDEX_NAME),
    encoder: Encoder = "small",
    model: Annotated[str, typer.Option(help="Who answers, as for `rag ask`.")] = "smollm2",
    strategy: Annotated[str, typer.Option(help="As for `rag ask`.")] = "default",
    vision: _Vision = None,
) -> None:
    """Answer a question about a picture from similar pictures' captions and the indexed documents, with citations."""
    from mainspring.rag.assembly import open_model, open_pipeline
    from mainspring.rag.multimodal.answering import ask_about, vision_model
    from mainspring.rag.strategy import load_strategy

    shown = _opened(picture)
    gallery = _gallery(directory, encoder)
    pipeline = open_pipeline(directory, load_strategy(strategy), model=open_model(model))
    write_answer(ask_about(pipeline, gallery, shown, question, vision_model(vision)))


def _file(directory: Path) -> Path:
    return directory / "pictures.npz"


def _gallery(directory: Path, encoder: str) -> Gallery:
    from mainspring.rag.multimodal.gallery import Gallery
    from mainspring.rag.multimodal.picture_encoder import load_picture_encoder

    return Gallery.load(_file(directory), load_picture_encoder(encoder))


def _opened(path: Path) -> Image:
    from mainspring.errors import DocumentError
    from mainspring.rag.multimodal.pictures import open_picture

    try:
        data = path.read_bytes()
    except OSError as error:
        raise DocumentError(f"{path} cannot be read: {error.strerror}") from error
    return open_picture(data, str(path))


def _print(match: Match) -> None:
    mark = "" if match.enough else "  (not similar enough)"
    typer.echo(f"{match.picture.file}  by its {match.by}, {match.margin:+.3f}{mark}")
    typer.echo(f"    {match.picture.caption}  ({match.picture.page}, line {match.picture.line})")
