"""A server with the console, and a headless Chromium to look at it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from support.serving import Server, running_server, write_tiny_model

CHROMIUM_NAMES = ("chromium", "chromium-browser", "google-chrome")
ARGUMENTS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with a tiny model."""
    directory = tmp_path_factory.mktemp("console")
    model = write_tiny_model(directory / "tiny")
    with running_server(model, directory / "output.txt") as running:
        yield running


# Of a module, because Playwright's event loop must not run where other tests want one of their own.
@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Headless Chromium."""
    program = next(filter(None, map(shutil.which, CHROMIUM_NAMES)), None)
    if program is None:
        pytest.skip(f"no Chromium here (looked for {', '.join(CHROMIUM_NAMES)})")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=ARGUMENTS)
        yield browser
        browser.close()


OpenPage = Callable[..., Page]


@pytest.fixture
def open_page(browser: Browser, server: Server) -> Iterator[OpenPage]:
    """Opens the console in a fresh profile; fails afterwards if a page logged an error or asked another host."""
    contexts = []
    troubles: list[str] = []

    def watch(page: Page) -> None:
        page.on("pageerror", lambda error: troubles.append(f"uncaught: {error}"))
        page.on("console", lambda message: note(message.type, message.text))
        page.on("request", lambda request: note_request(request.url))

    def note(kind: str, text: str) -> None:
        # Chromium logs every failed request; the tests that make one fail look at the page instead.
        if kind == "error" and "Failed to load resource" not in text:
            troubles.append(text)

    def note_request(url: str) -> None:
        if not url.startswith(server.url):
            troubles.append(f"asked {url}")

    def open_it(**options: Any) -> Page:
        context = browser.new_context(base_url=server.url, **options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(20_000)
        watch(page)
        page.goto("/")
        # Not wait_for_function: it polls by eval inside the page, which the page's own policy may forbid.
        expect(page.locator("#model")).not_to_be_empty()
        return page

    yield open_it
    for context in contexts:
        context.close()
    assert not troubles


@pytest.fixture
def page(open_page: OpenPage) -> Page:
    """The console on a desktop."""
    return open_page(viewport={"width": 1280, "height": 800})
