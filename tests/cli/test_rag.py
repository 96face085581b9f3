"""`mainspring rag` as a user runs it: real embeddings and reranker, a scripted endpoint for the answer."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from PIL import Image, ImageDraw

from mainspring.cli.main import main

Run = Callable[..., tuple[int, str, str]]
ANSWER = "Berlin is the capital of Germany. Bananas are blue."


class _Endpoint(BaseHTTPRequestHandler):
    """An OpenAI-compatible endpoint with one model and one answer."""

    def do_GET(self) -> None:
        self._send(
            "application/json", json.dumps({"object": "list", "data": [{"id": "script", "object": "model"}]})
        )

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert request["model"] == "script"
        assert "Berlin" in request["messages"][1]["content"]
        pieces = [ANSWER[i : i + 5] for i in range(0, len(ANSWER), 5)]
        choices = [{"index": 0, "delta": {"content": piece}} for piece in pieces]
        chunks = [{"id": "1", "object": "chat.completion.chunk", "choices": [choice]} for choice in choices]
        self._send(
            "text/event-stream", "".join(f"data: {json.dumps(c)}\n\n" for c in chunks) + "data: [DONE]\n\n"
        )

    def _send(self, kind: str, body: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, *_: object) -> None:
        """Silent."""


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Endpoint)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("documents")
    (path / "cities.md").write_text("# Cities\n\nBerlin is the capital and largest city of Germany.\n")
    (path / "rivers.txt").write_text("The Nile flows through Africa into the Mediterranean Sea.\n")
    (path / "broken.pdf").write_bytes(b"%PDF-1.4 nothing")
    return path


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs the command in this process, in an empty directory: (status, standard output, standard error)."""
    monkeypatch.chdir(tmp_path)

    def command(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["mainspring", "rag", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out, err

    return command


def test_index_search_and_ask_from_an_empty_machine(folder: Path, endpoint: str, run: Run) -> None:
    status, _, err = run("search", "capital of Germany")
    assert status == 1
    assert "no index in .mainspring-rag: run `mainspring rag index FOLDER` first" in err
    status, out, err = run("index", str(folder))
    assert status == 0, err
    assert "2 new, 0 changed, 0 removed, 0 unchanged, 1 left out; 2 passages" in out
    assert "left out broken.pdf" in err
    _, out, _ = run("search", "What is the capital of Germany?", "-k", "1")
    assert out.startswith("[1] cities.md, line 1")
    _, out, _ = run("ask", "What is the capital of Germany?", "--model", endpoint)
    number = out.split("Germany. [")[1][0]
    assert f"[{number}] cities.md, line 3: Berlin is the capital and largest city of Germany." in out
    assert "blue.\n" in out  # nothing supports that, so that nothing is cited
    _, out, _ = run("ask", "Who won the chess championship of 1972?", "--model", endpoint)
    assert "The documents do not answer this question." in out


def test_a_printed_strategy_can_be_given_back(run: Run, tmp_path: Path) -> None:
    _, printed, _ = run("strategy", "best")
    (tmp_path / "mine.toml").write_text(printed.replace("passages = 5", "passages = 0"))
    status, _, err = run("strategy", "mine.toml")
    assert status == 1
    assert "context.passages = 0 must lie between 1 and 100" in err


def test_indexing_a_folder_takes_its_pictures_too(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "docs"
    folder.mkdir()
    (folder / "harbour.md").write_text("# Harbour\n\n![The red flag of the harbour](flag.png)\n")
    drawn = Image.new("RGB", (90, 60), "white")
    ImageDraw.Draw(drawn).rectangle((10, 10, 80, 40), fill="red")
    drawn.save(folder / "flag.png")
    (folder / "bad.png").write_bytes(b"\x89PNG nothing")
    status, out, err = run("index", str(folder), "--no-pictures")
    assert (status, "pictures" in out) == (0, False), err
    status, out, err = run("index", str(folder))
    assert status == 0, err
    assert "1 pictures, 1 of them new, 1 left out" in out
    assert "left out bad.png: bad.png is not a picture" in err
    _, out, _ = run("pictures", "caption", str(folder / "flag.png"))
    assert out == "The red flag of the harbour  (harbour.md, line 3)\n"
    (folder / "bad.png").unlink()
    assert "1 pictures, 0 of them new, 0 left out" in run("index", str(folder))[1]
    (folder / "flag.png").unlink()
    assert "0 pictures, 0 of them new" in run("index", str(folder))[1]
    status, _, err = run("pictures", "find", "a flag")
    assert status == 1
    assert "there are no pictures" in err
